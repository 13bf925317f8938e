"""What a benchmark runs and counts. Never how fast: only that the figures are those of the steps that were run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixbit.engine.benchmark import BenchmarkError, BenchmarkOptions, Driver, run_benchmark
from mixbit.engine.inspection import inspect_model
from mixbit.engine.loader import load
from mixbit.engine.step_cost import step_cost
from mixbit.kernels.executor import Batch, ExecutorOptions
from tests.checkpoints import CONFIGS, write_checkpoint


class Recorder:
    """Stands for an executor: notes every batch."""

    cache_bytes = 0

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def run(self, batch: Batch) -> None:
        self.batches.append(batch)


@pytest.fixture
def steps(tmp_path: Path) -> tuple[Driver, Recorder]:
    model = load(write_checkpoint(tmp_path / "m", "llama"))
    driver = Driver("cpu", model.program, model.vocab_size, 100, 3, ExecutorOptions(max_tokens=48, threads=1))
    recorder: Any = Recorder()
    driver.executor = recorder
    return driver, recorder


def test_decoding_fills_the_context_once(steps: tuple[Driver, Recorder]) -> None:
    driver, recorder = steps
    driver.decode(2, 50, 3)
    filled = [(batch.context_lengths[0], np.diff(batch.query_starts).tolist()) for batch in recorder.batches]
    assert filled == [(0, [16] * 3), (16, [16] * 3), (32, [16] * 3), (48, [2] * 3), (50, [1] * 3), (51, [1] * 3)]
    driver.decode(2, 50, 3)
    assert [int(batch.context_lengths[0]) for batch in recorder.batches[6:]] == [50, 51]
    driver.decode(1, 50, 1)
    assert len(recorder.batches) == 8 + 2 + 1
    for batch in recorder.batches:
        tables = batch.block_tables
        assert len(set(tables.ravel().tolist())) == tables.size
        assert (batch.context_lengths + np.diff(batch.query_starts) <= tables.shape[1] * 32).all()
        assert ((batch.tokens >= 0) & (batch.tokens < 384)).all()


@pytest.mark.parametrize("model_type", CONFIGS)
def test_bytes_of_a_token_are_those_that_inspect_counts(model_type: str, tmp_path: Path) -> None:
    """Two counts, one from the classes of tensors and one from the nodes; and the cache's bytes on top."""
    path = write_checkpoint(tmp_path / "m", model_type)
    report, program = inspect_model(path), load(path).program
    small = {"norm", "bias", "conv", "decay"}  # read too, but nothing beside the matrices
    matrices = sum(each.token_bytes for each in report.classes if not small & set(each.role.split()))
    cost = step_cost(program, 1, 1, 99, kv_token_bytes=10)
    assert cost.bytes == pytest.approx(matrices + 2 * report.memory.state + 1000, abs=8)


def test_operations_grow_with_tokens_and_bytes_with_experts(tmp_path: Path) -> None:
    program = load(write_checkpoint(tmp_path / "m", "qwen3_moe")).program
    one, many = step_cost(program, 1, 1, 0, 0), step_cost(program, 64, 1, 0, 0)
    assert many.matrix_operations == pytest.approx(64 * one.matrix_operations)
    stored = sum(tensor.nbytes for tensor in load(tmp_path / "m").checkpoint.tensors.values())
    assert one.bytes < 0.8 * many.bytes
    assert many.bytes < stored + 64 * 1024
    weights = 2 * (384 * 128)  # the head; hidden 128
    assert step_cost(program, 1, 8, 0, 0).matrix_operations < 8 * one.matrix_operations - 6 * weights


def test_every_row_that_was_asked_for(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "m", "qwen3_next")
    options = BenchmarkOptions(prompt=40, contexts=(8, 30), batches=(1, 2, 3), tokens=2, repeat=2, threads=1)
    told: list[tuple[str, int, int]] = []
    found = run_benchmark(path, options, lambda *step: told.append(step))
    rows = [(each.work, each.context, each.sequences) for each in found.measurements]
    assert rows == [("prefill", 40, 1), ("decode", 8, 1), ("decode", 30, 1), ("decode", 8, 2), ("decode", 8, 3)]
    assert all(each.tokens_per_second > 0 for each in found.measurements)
    assert [each.bytes_per_second is None for each in found.measurements] == [True, False, False, False, False]
    one = found.measurements[1]
    assert one.bytes_per_second is not None
    program = load(path).program
    kv = Driver("cpu", program, 384, 42, 3, options.executor).kv_token_bytes
    cost = step_cost(program, 1, 1, 9, kv)
    assert one.bytes_per_second / one.tokens_per_second == pytest.approx(cost.bytes, rel=0.01)
    assert told[-1] == ("measuring", 10, 10)


def test_refusals(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "m", "llama")
    shape: dict[str, Any] = {"batches": (1,), "tokens": 4, "repeat": 1, "threads": 1}
    with pytest.raises(BenchmarkError, match="516 tokens are to be measured; the model was made for 512"):
        run_benchmark(path, BenchmarkOptions(prompt=8, contexts=(512,), **shape), lambda *_: None)
