"""How a model lies in memory: all weights where they are mapped, or its experts streamed from disk within a budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import msgspec
import psutil

from mixbit.engine.config import EngineConfig
from mixbit.engine.sizing import CacheError, available_memory, cache_bytes, cache_config, usable_memory
from mixbit.kernels.executor import CacheConfig, ExecutorOptions
from mixbit.kernels.experts import Access, ExpertMemory, StreamingBackend, expert_bytes
from mixbit.kernels.memory import OwnMemory
from mixbit.kernels.ops import Program

STEP_TOKENS = 512
_LONGEST_STEP = 4096  # a step reads each expert once: the longer, the fewer reads, and the longer others wait
_WAYS: Mapping[Access, str] = {
    "direct": "past the page cache",
    "cached": "by way of the page cache",
    "mapped": "mapped from the page cache",
}
_MARGIN = 256 << 20  # bytes for what requests need beside the caches


@dataclass(frozen=True)
class MemoryPlan:
    """cache: sizes of the pools. step_tokens: rows of the largest step.

    experts: None where all stay where they are mapped. explanation: for people.
    """

    cache: CacheConfig
    step_tokens: int
    experts: ExpertMemory | None
    explanation: str


def plan_memory(
    program: Program,
    weight_bytes: int,
    config: EngineConfig,
    context_length: int,
    backend: object,
    options: ExecutorOptions,
) -> MemoryPlan:
    """Stream the experts if they were given memory of their own, or if the weights do not fit.

    options: those of the executor; its max_tokens and experts are what the plan says. Raises CacheError if what must
    be in memory does not fit.
    """
    streamed = expert_bytes(program) if isinstance(backend, StreamingBackend) else 0
    if config.expert_bytes is not None and not streamed:
        why = "the model has no experts in files"
        if expert_bytes(program):
            why = "the device cannot stream them (--device cpu can)"
        raise CacheError(f"memory for experts is set, but {why}; leave it out")
    if isinstance(backend, StreamingBackend) and streamed:
        budget = usable_memory(config, backend)
        plain = replace(options, max_tokens=config.step_tokens or STEP_TOKENS)
        least = weight_bytes + backend.step_bytes(program, plain) + _program_memory(backend)
        if config.expert_bytes is not None or least + (config.cache_bytes or 0) > budget:
            return _streaming(program, weight_bytes - streamed, streamed, config, context_length, backend, plain)
    cache = cache_config(program, config, context_length, weight_bytes, backend)
    where = "on the device" if isinstance(backend, OwnMemory) else "where they are mapped"
    return MemoryPlan(
        cache, config.step_tokens or STEP_TOKENS, None, f"weights of {_gigabytes(weight_bytes)} stay {where}"
    )


def _streaming(
    program: Program,
    dense: int,
    streamed: int,
    config: EngineConfig,
    context_length: int,
    backend: StreamingBackend,
    options: ExecutorOptions,
) -> MemoryPlan:
    budget, own = _budget(config, backend), _program_memory(backend)
    left = budget - dense - own
    step = options.max_tokens
    if config.step_tokens is None:
        step = min(_LONGEST_STEP, max(step, context_length))
        while step > STEP_TOKENS and backend.step_bytes(program, replace(options, max_tokens=step)) > left // 8:
            step //= 2
    step_bytes = backend.step_bytes(program, replace(options, max_tokens=step))
    share = config.cache_bytes or max(1, left // 8)
    cache = cache_config(program, msgspec.structs.replace(config, cache_bytes=share), context_length, 0, backend)
    caches = cache_bytes(program, cache, config, backend)
    room = left - step_bytes - caches
    least = backend.least_expert_bytes(program)
    host = config.expert_bytes if config.expert_bytes is not None else min(room, _all_slots(streamed))
    if host < least or host > room:
        raise CacheError(
            f"of {_gigabytes(budget)} of memory, {_gigabytes(dense)} of weights that every token needs, "
            f"{_gigabytes(step_bytes)} for a step of {step} tokens, {_gigabytes(caches)} of caches and "
            f"{_gigabytes(own)} for the program leave {_gigabytes(max(0, room))} for experts, "
            f"of {_gigabytes(max(host, least))} that were asked for or one of each size takes; "
            "give more memory, or lower the context length, max_running or step_tokens"
        )
    access = _access(backend, streamed, host, available_memory() - (budget - room))
    why = "as asked" if config.expert_bytes is not None else f"the weights do not fit in {_gigabytes(budget)}"
    return MemoryPlan(
        cache,
        step,
        ExpertMemory(host, access),
        f"{_gigabytes(streamed)} of experts are streamed from disk through {_gigabytes(host)} of memory, "
        f"{_WAYS[access]} ({why}); {_gigabytes(dense)} of weights stay in memory, "
        f"steps take {step} tokens",
    )


def _access(backend: object, streamed: int, host: int, spare: int) -> Access:
    """spare: main memory that nothing but the experts will take."""
    if isinstance(backend, OwnMemory):
        return "cached"  # main memory is the tier below the device's
    if streamed <= spare * 7 // 8:
        return "mapped"
    return "direct" if spare - host < host else "cached"  # worth its copies where it holds more than the slots


def _budget(config: EngineConfig, backend: object) -> int:
    """What was given; else what is free, but for a sixteenth that other programs may come to need."""
    usable = usable_memory(config, backend)
    return int(config.memory_share * (usable if config.memory_bytes else usable * 15 // 16))


def _all_slots(streamed: int) -> int:
    """More than the slots of all experts take with what page alignment costs them."""
    return streamed + streamed // 2


def _program_memory(backend: object) -> int:
    """Of the memory that the weights are in."""
    return _MARGIN if isinstance(backend, OwnMemory) else _own_memory()


def _own_memory() -> int:
    """What this process has taken so far, and a margin."""
    memory = psutil.Process().memory_info()  # type: ignore[no-untyped-call]
    return int(memory.rss - getattr(memory, "shared", 0)) + _MARGIN


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
