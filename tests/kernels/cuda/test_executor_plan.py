"""The CUDA executor on a device that only counts: uploads, launches, graphs, pools. Needs no GPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from mixbit.kernels.cuda import executor as executors
from mixbit.kernels.cuda import plan
from mixbit.kernels.cuda.compiler import Source
from mixbit.kernels.cuda.executor import CudaExecutor
from mixbit.kernels.cuda.step import StepData
from mixbit.kernels.executor import Batch, CacheConfig, ExecutorOptions
from tests.kernels.builders import CACHE, Sequences
from tests.kernels.cuda.fakes import FakeDevice
from tests.kernels.test_executor import PROGRAM, VOCAB, last_rows

# Without out projections in this model, two residual sums stay with their norms.
STEP = ["embed", "matvec", "delta", "rms_norm", "matvec", "experts_hidden", "experts_project"]
STEP += [
    "matvec",
    "attention_write",
    "attention",
    "rms_norm",
    "experts_hidden",
    "matvec",
    "rms_norm",
    "select",
    "matvec",
]


def kernels(launches: Any) -> list[str]:
    return [launch[0][1] for launch in launches]


class Names:
    """Compiles to the name of the file."""

    def __init__(self) -> None:
        self.compiled: list[Source] = []

    def compile(self, sources: Iterable[Source], progress: Any = None) -> list[bytes]:
        made = list(sources)
        self.compiled += made
        return [source.file.encode() for source in made]


class Made(tuple[Any, ...]):
    """A launch that is never made: kernel, grid, block, arguments."""

    __slots__ = ()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    monkeypatch.setattr(plan, "Launch", lambda *arguments, early: Made(arguments))
    return FakeDevice()


def compile_on(device: Any, cache: CacheConfig = CACHE, **options: Any) -> CudaExecutor:
    compiler: Any = Names()
    return CudaExecutor(PROGRAM, cache, ExecutorOptions(max_tokens=128, **options), device, compiler)


def test_a_step_is_one_graph_and_is_captured_once(device: FakeDevice) -> None:
    executor = compile_on(device, dtype="float32")
    sequences = Sequences(CACHE, count=2)
    for _ in range(3):
        logits = executor.run(last_rows(sequences, {0: [1], 1: [2]}))
        assert logits.shape == (2, VOCAB)
    assert (device.captured, len(device.replayed), device.launched) == (1, 3, [])
    assert kernels(device.replayed[0]) == STEP
    executor.run(last_rows(sequences, {0: [1]}))
    assert device.captured == 2


def test_many_rows_are_launched_without_a_graph(device: FakeDevice) -> None:
    executor = compile_on(device, CacheConfig(40, 4, 2), dtype="float32")
    executor.run(Sequences(CacheConfig(40, 4, 2), count=1).step({0: [1] * (executors.FEW_ROWS + 1)}))
    assert device.captured == 0
    assert len(device.launched) == len(STEP)


def test_a_step_without_logits_ends_before_the_head(device: FakeDevice) -> None:
    executor = compile_on(device, dtype="float32")
    assert executor.run(Sequences(CACHE, count=1).step({0: [1, 2]}, [])).shape == (0, VOCAB)
    assert kernels(device.replayed[0]) == STEP[:-2]


def test_states_and_blocks_travel(device: FakeDevice) -> None:
    executor = compile_on(device, dtype="bfloat16")
    block, state = executor.export_block(3), executor.export_state(2)
    assert not block.any()
    assert not state.any()
    rng = np.random.default_rng(0)
    for kept, put, get, copy in (
        (block, executor.import_block, executor.export_block, executor.copy_block),
        (state, executor.import_state, executor.export_state, executor.copy_state),
    ):
        data = rng.integers(0, 256, len(kept), dtype=np.uint8)
        put(1, data)
        copy(1, 4)
        np.testing.assert_array_equal(get(4), data)
        assert not get(0).any()
        with pytest.raises(ValueError, match=f"{len(data) - 1} bytes, expected {len(data)}"):
            put(1, data[:-1])
    assert executor.cache_bytes == CACHE.blocks * len(block) + CACHE.state_slots * len(state)


def batch(width: int) -> Batch:
    arrays = ([5, 6, 7], [0, 2, 3], [8, 0], np.arange(2 * width).reshape(2, width), [1, 0], [1, 2])
    return Batch(*(np.asarray(part, np.int32) for part in arrays))


def test_a_batch_lies_where_the_kernels_look(device: Any) -> None:
    data = StepData(device, 4)
    assert not data.upload(batch(3))

    def at(place: int, count: int) -> list[int]:
        memory: Any = data._memory
        start = place - memory.address
        found: list[int] = memory.bytes[start : start + 4 * count].view(np.int32).tolist()
        return found

    assert at(int(data.tokens), 3) == [5, 6, 7]
    assert at(data.at(1).address, 3) == [8, 9, 0]
    assert at(data.at(2).address, 3) == [0, 0, 1]
    assert at(data.at(3).address, 3) == [0, 2, 3]
    assert at(data.at(4).address, 2) == [8, 0]
    assert at(data.at(5).address, 2) == [1, 0]
    assert at(int(data.logit_rows), 2) == [1, 2]
    assert at(data.tables.address, 6) == [0, 1, 2, 3, 4, 5]
    assert at(data.width.address, 1) == [3]
    pointers = np.frombuffer(data.step.tobytes(), np.uint64).tolist()
    assert pointers == [data.at(i).address for i in range(6)] + [data.tables.address, data.width.address]


def test_longer_tables_move_the_arrays(device: Any) -> None:
    data = StepData(device, 4)
    before = data.width.address
    assert data.upload(batch(1 << 16))
    assert data.width.address != before
    assert not data.upload(batch(1 << 16))
