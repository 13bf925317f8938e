"""Sizes of caches."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixbit.engine.config import EngineConfig
from mixbit.engine.loader import load
from mixbit.engine.sizing import CacheError, available_memory, block_bytes, cache_config, slot_bytes
from mixbit.kernels.executor import CacheConfig, ExecutorOptions, Precision
from mixbit.kernels.ops import Program
from mixbit.kernels.registry import choose
from tests.checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Program:
    directory = tmp_path_factory.mktemp("models") / "hybrid"
    write_checkpoint(directory, "qwen3_next")
    return load(directory).program


def test_the_sizes_are_what_an_executor_allocates(hybrid: Program) -> None:
    cache = CacheConfig(blocks=7, block_size=16, state_slots=3)
    executor = choose("reference").backend.compile(hybrid, cache, ExecutorOptions(max_tokens=16))
    assert slot_bytes(hybrid) > 0
    assert executor.cache_bytes == 7 * block_bytes(hybrid, 16, 4) + 3 * slot_bytes(hybrid)


def test_never_more_than_the_sequences_can_use(hybrid: Program) -> None:
    config = EngineConfig(model="", max_running=3, block_size=16, cache_bytes=10**12)
    assert cache_config(hybrid, config, 100, 0) == CacheConfig(blocks=3 * 7, block_size=16, state_slots=3 + 8 * 3)


def test_never_more_than_the_memory_asked_for(hybrid: Program) -> None:
    config = EngineConfig(model="", max_running=3, block_size=16, cache_bytes=5_000_000)
    cache = cache_config(hybrid, config, 4096, 0)
    used = cache.blocks * block_bytes(hybrid, 16, 4) + cache.state_slots * slot_bytes(hybrid)
    assert 3 < cache.state_slots < 3 + 8 * 3
    assert 5_000_000 - block_bytes(hybrid, 16, 4) < used <= 5_000_000


def test_too_little_memory_is_refused_with_the_numbers(hybrid: Program) -> None:
    config = EngineConfig(model="", max_running=3, cache_bytes=100_000)
    with pytest.raises(CacheError, match=r"may take 0\.1 MB.*3 recurrent states.*256 tokens"):
        cache_config(hybrid, config, 4096, 0)


def test_weights_larger_than_memory_leave_an_eighth(hybrid: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixbit.engine.sizing.available_memory", lambda: 160_000_000)
    config = EngineConfig(model="", max_running=1, block_size=16)
    each, states = block_bytes(hybrid, 16, 4), 9 * slot_bytes(hybrid)
    assert cache_config(hybrid, config, 10**6, 10**12).blocks == (10_000_000 - states) // each
    assert cache_config(hybrid, config, 10**6, 60_000_000).blocks == (50_000_000 - states) // each


def test_engines_side_by_side_share_what_is_free(hybrid: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixbit.engine.sizing.available_memory", lambda: 160_000_000)
    config = EngineConfig(model="", max_running=1, block_size=16, memory_share=0.25)
    each, states = block_bytes(hybrid, 16, 4), 9 * slot_bytes(hybrid)
    assert cache_config(hybrid, config, 10**6, 60_000_000).blocks == (12_500_000 - states) // each


class Card:
    """A backend with memory of its own."""

    def free_memory(self) -> int:
        return 100_000_000

    def value_bytes(self, dtype: str | None) -> int:
        return 4 if dtype == "float32" else 2


def test_a_device_counts_its_own_memory_and_width(hybrid: Program) -> None:
    config = EngineConfig(model="", max_running=1, block_size=16)
    states = 9 * slot_bytes(hybrid)
    cache = cache_config(hybrid, config, 10**6, 60_000_000, Card())
    assert cache.blocks == (20_000_000 - states) // block_bytes(hybrid, 16, 2)
    with pytest.raises(CacheError, match=r"weights \(200\.0 MB\) do not fit in the 100\.0 MB"):
        cache_config(hybrid, config, 10**6, 200_000_000, Card())


def test_the_limit_of_a_container_counts(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 200000\nactive_file 100000\n")
    assert available_memory(tmp_path) == 600_000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(tmp_path) > 600_000
    assert available_memory(tmp_path / "none") > 600_000


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_the_processor_counts_the_width_of_its_mode(hybrid: Program, precision: Precision) -> None:
    config = EngineConfig(model="", max_running=3, block_size=16, cache_bytes=5_000_000, precision=precision)
    backend = choose("cpu").backend
    cache = cache_config(hybrid, config, 10**6, 0, backend)
    executor = backend.compile(hybrid, cache, ExecutorOptions(max_tokens=16, precision=precision))
    assert 5_000_000 - executor.export_block(0).nbytes < executor.cache_bytes <= 5_000_000
