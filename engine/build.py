"""From a configuration to an engine that is ready: loads the model, sizes its caches, compiles, warms up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from mixbit.engine.admission import Admission, Limits
from mixbit.engine.config import ConfigError, EngineConfig
from mixbit.engine.core import EngineCore
from mixbit.engine.disk_tier import open_tier
from mixbit.engine.errors import UserError
from mixbit.engine.inspection import describe
from mixbit.engine.loader import load
from mixbit.engine.memory_plan import plan_memory
from mixbit.engine.pace import Pace
from mixbit.engine.protocol import Ready
from mixbit.engine.runner import Runner, warm_up
from mixbit.engine.scheduler import Scheduler
from mixbit.engine.sizing import slot_bytes
from mixbit.engine.tokenizer import load_tokenizer
from mixbit.kernels.executor import Executor, ExecutorOptions
from mixbit.kernels.experts import StreamingExecutor
from mixbit.kernels.registry import BackendError, choose
from mixbit.kernels.spec import SpecError

log = logging.getLogger("mixbit.engine")

Progress = Callable[[str, int, int], None]

# What a person can do something about.
LOAD_ERRORS = (UserError, SpecError, BackendError, MemoryError)


@dataclass(frozen=True, eq=False)
class BuiltEngine:
    """An engine that can take requests. `executor` is for timings."""

    core: EngineCore
    ready: Ready
    executor: Executor


def build(config: EngineConfig, progress: Progress) -> BuiltEngine:
    """Load the model at config.model. Raises one of LOAD_ERRORS, with a message for people."""
    start = time.perf_counter()
    config.check()
    choice = choose(config.device, config.kernels)
    path = Path(config.model)
    tokenizer = load_tokenizer(path)
    model = load(path, top_k_experts=config.top_k_experts, progress=progress)
    for warning in model.warnings:
        log.warning("%s", warning)
    context_length = _context_length(config, model.context_length)
    options = ExecutorOptions(
        max_tokens=config.step_tokens or 1,
        threads=config.threads,
        profile=config.profile,
        isa=config.isa,
        dtype=cast(Any, config.dtype),  # checked by EngineConfig
        precision=config.precision,
    )
    plan = plan_memory(model.program, model.weight_bytes, config, context_length, choice.backend, options)
    cache = plan.cache
    if config.context_length is None and cache.blocks * cache.block_size < context_length:
        # A prompt that does not fit is then too long, which clients know how to answer: they shorten it.
        context_length = cache.blocks * cache.block_size
        log.warning(
            "memory holds %d tokens of the model's %d: this is the context", context_length, model.context_length
        )
    progress("preparing the device", 0, 1)
    options = replace(options, max_tokens=plan.step_tokens, experts=plan.experts)
    executor = choice.backend.compile(model.program, cache, options)
    pace = Pace(plan.step_tokens)
    if plan.experts is None:  # else it would read gigabytes
        for step, seconds in warm_up(executor, cache, plan.step_tokens, context_length):
            pace.note(step, seconds)
    progress("preparing the device", 1, 1)
    scheduler = Scheduler(
        blocks=cache.blocks,
        block_size=cache.block_size,
        max_running=config.max_running,
        step_tokens=plan.step_tokens,
        spare_states=cache.state_slots - config.max_running if model.program.gated_deltas else None,
    )
    limits = Limits(
        context_length=context_length,
        cache_capacity=scheduler.capacity,
        vocab_size=model.vocab_size,
        max_requests=config.max_running + config.max_queue,
        embedding_size=executor.hidden_dim,
    )
    streaming = executor if plan.experts is not None and isinstance(executor, StreamingExecutor) else None
    ready = Ready(
        model=describe(model),
        context_length=context_length,
        vocab_size=model.vocab_size,
        backend=choice.backend.name,
        backend_reason=str(choice),
        memory_reason=plan.explanation,
        weight_bytes=model.weight_bytes,
        cache_bytes=executor.cache_bytes,
        expert_bytes=0 if streaming is None else streaming.expert_bytes,
        block_bytes=(executor.cache_bytes - slot_bytes(model.program) * cache.state_slots) // cache.blocks,
        load_seconds=time.perf_counter() - start,
        embedding_size=executor.hidden_dim,
    )
    runner = Runner(executor)
    disk = open_tier(config, scheduler, runner, choice.backend.name)
    core = EngineCore(runner.run, scheduler, Admission(tokenizer, limits), disk, pace, streaming)
    return BuiltEngine(core, ready, executor)


def _context_length(config: EngineConfig, longest: int) -> int:
    if config.context_length is None:
        return longest
    if config.context_length > longest:
        raise ConfigError(f"context_length is {config.context_length}, but the model was made for {longest} tokens")
    return config.context_length
