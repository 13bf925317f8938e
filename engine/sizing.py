"""How large the caches are: what the sequences could use, within what memory there is."""

from __future__ import annotations

from pathlib import Path

import psutil

from mixbit.engine.config import EngineConfig
from mixbit.engine.errors import UserError
from mixbit.kernels.executor import CacheConfig
from mixbit.kernels.memory import NarrowCache, OwnMemory
from mixbit.kernels.ops import Program

USEFUL_LENGTH = 256  # tokens: a cache too small for one sequence of this length is refused
_CHECKPOINTS = 8  # for each running sequence, at most
_CGROUP = Path("/sys/fs/cgroup")


class CacheError(UserError):
    """There is not enough memory for a useful cache; the message has the numbers."""


def block_bytes(program: Program, block_size: int, value_bytes: int) -> int:
    """Bytes of one block in all attention layers: keys and values."""
    values = sum(2 * node.spec.kv_heads * node.spec.head_dim for node in program.attentions)
    return values * block_size * value_bytes


def slot_bytes(program: Program) -> int:
    """Bytes of one sequence's recurrent state in all gated delta layers, float32."""
    specs = [node.spec for node in program.gated_deltas]
    return sum(
        4 * ((spec.kernel - 1) * spec.channels + spec.value_heads * spec.value_dim * spec.key_dim) for spec in specs
    )


def available_memory(cgroup: Path = _CGROUP) -> int:
    """Bytes that can be allocated without swapping, within the limit of a container where there is one."""
    available = int(psutil.virtual_memory().available)  # type: ignore[no-untyped-call]
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no container, or no limit ("max")
        return available
    reclaimable = int(statistics.get("inactive_file", 0)) + int(statistics.get("active_file", 0))
    return max(0, min(available, limit - used + reclaimable))


def usable_memory(config: EngineConfig, backend: object = None) -> int:
    """Bytes that there are, in main memory or of the device, or fewer if it was said how many may be used."""
    available = backend.free_memory() if isinstance(backend, OwnMemory) else available_memory()
    return min(available, config.memory_bytes or available)


def cache_bytes(program: Program, cache: CacheConfig, config: EngineConfig, backend: object) -> int:
    """Bytes of the pools."""
    each = block_bytes(program, cache.block_size, _value_bytes(config, backend))
    return cache.blocks * each + cache.state_slots * slot_bytes(program)


def _value_bytes(config: EngineConfig, backend: object) -> int:
    if isinstance(backend, OwnMemory):
        return backend.value_bytes(config.dtype)
    if isinstance(backend, NarrowCache):
        return backend.value_bytes_for(config.precision)
    return 2 if config.dtype in {"float16", "bfloat16"} else 4


def cache_config(
    program: Program, config: EngineConfig, context_length: int, weight_bytes: int, backend: object = None
) -> CacheConfig:
    """Blocks for every running sequence at full length, or as many as the memory allows: both those in use
    and those kept for later prompts. Models with recurrent layers get further state slots for checkpoints, in
    at most half of what one useful sequence leaves.

    Without config.cache_bytes half of what the weights will leave free is used, or config.memory_share of that;
    weights larger than memory are read again and again from disk, and leave an eighth. Values count as float32,
    unless a narrower dtype is asked for. A `backend` may say how wide values are; one with memory of its own also
    says how much there is, and there the weights must fit. Raises CacheError if they do not, or not even one
    sequence of a useful length does.
    """
    width = _value_bytes(config, backend)
    available = usable_memory(config, backend)
    if isinstance(backend, OwnMemory) and weight_bytes > available:
        raise CacheError(
            f"the model's weights ({_megabytes(weight_bytes)}) do not fit in the {_megabytes(available)} that are "
            "free on the device, or were given; free some, or choose another with --device (cpu and mlx-cuda stream "
            "experts from disk)"
        )
    left_free = max(available - weight_bytes, available // 8)
    budget = config.cache_bytes or int(config.memory_share * left_free) // 2
    slot = slot_bytes(program)
    states = slot * config.max_running
    each = block_bytes(program, config.block_size, width)
    useful = min(context_length, USEFUL_LENGTH)
    wanted = config.max_running * _blocks(context_length, config.block_size)
    least = _blocks(useful, config.block_size)
    left = max(0, budget - states - least * each)
    spare = min(_CHECKPOINTS * config.max_running, left // 2 // slot) if slot else 0
    blocks = min(wanted, max(0, budget - states - slot * spare) // each) if each else wanted
    if blocks < least:
        raise CacheError(
            f"the cache may take {_megabytes(budget)}, but {config.max_running} recurrent states "
            f"({_megabytes(states)}) and one sequence of {useful} tokens ({_megabytes(least * each)}) need "
            f"{_megabytes(states + least * each)}; free memory, raise the cache size or lower max_running"
        )
    return CacheConfig(blocks=blocks, block_size=config.block_size, state_slots=config.max_running + spare)


def _blocks(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
