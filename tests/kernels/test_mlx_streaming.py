"""Experts in slots of an MLX device: the same numbers with two slots a layer and with all, counts, faults, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mixbit.engine.loader import load
from mixbit.kernels.executor import BackendError, Dtype, ExecutorOptions
from mixbit.kernels.experts import ExpertMemory, StreamingBackend, StreamingExecutor, WeightsError, streamable
from mixbit.kernels.mlx.backend import MlxBackend
from mixbit.kernels.mlx.executor import MlxExecutor
from mixbit.kernels.ops import Program
from tests.checkpoints import VOCAB_SIZE, Width, write_checkpoint
from tests.kernels.builders import CACHE, FloatArray, Sequences, assert_close

BACKEND = MlxBackend("mlx-cpu")
EXPERTS, LAYERS = 16, 4
WIDTHS: dict[str, dict[str, Width | None]] = {
    "mixed widths": {
        "*.mlp.gate": (8, 64),
        "model.layers.0.mlp.switch_mlp.up_proj": (5, 128),
        "model.layers.1.mlp.switch_mlp.down_proj": (3, 32),
    },
    "unquantized experts": {"*.switch_mlp.*": None},
}


@pytest.fixture(scope="module", params=WIDTHS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {"num_experts": EXPERTS, "num_experts_per_tok": 3}
    folder = tmp_path_factory.mktemp("models") / "model"
    return write_checkpoint(folder, "qwen3_next", config=config, overrides=WIDTHS[request.param], dtype="bfloat16")


def compile_with(program: Program, slots: int | None, dtype: Dtype | None = None) -> MlxExecutor:
    """slots: of each layer."""
    memory = None if slots is None else ExpertMemory(slots * BACKEND.least_expert_bytes(program) // 2)
    return BACKEND.compile(program, CACHE, ExecutorOptions(max_tokens=64, dtype=dtype, experts=memory))


def outputs(executor: MlxExecutor) -> FloatArray:
    """Two sequences: prompts, then steps together."""
    sequences, rng = Sequences(CACHE, count=2), np.random.default_rng(3)
    steps = [{0: 30}, {1: 7}, *[{0: 1, 1: 1}] * 6]
    tokens = [{s: rng.integers(0, VOCAB_SIZE, n) for s, n in step.items()} for step in steps]
    return np.concatenate([executor.run(sequences.step(step)) for step in tokens])


def test_the_protocols_are_met(path: Path) -> None:
    assert isinstance(BACKEND, StreamingBackend)
    assert isinstance(compile_with(load(path).program, 2), StreamingExecutor)


@pytest.mark.parametrize("slots", [2, 3, 7, EXPERTS])
def test_results_equal_the_resident_form(path: Path, slots: int) -> None:
    program = load(path).program
    streamed = compile_with(program, slots)
    assert streamed.expert_slots == slots * LAYERS
    assert_close(outputs(streamed), outputs(compile_with(program, None)), 1e-5)
    for counts in streamed.expert_counts():
        assert counts.misses > 0
        assert counts.bytes_read > 0
        if slots == EXPERTS:
            assert counts.misses <= EXPERTS
            assert counts.hits > counts.misses


def test_slots_stay_within_their_memory(path: Path) -> None:
    program = load(path).program
    streamed = compile_with(program, 5)
    assert 0 < streamed.expert_bytes <= 5 * BACKEND.least_expert_bytes(program) // 2
    each = {counts.bytes_read for counts in streamed.expert_counts()}
    assert each == {0}, "nothing is read before it is chosen"


def test_too_little_memory_is_refused_with_what_it_takes(path: Path) -> None:
    program = load(path).program
    options = ExecutorOptions(max_tokens=8, experts=ExpertMemory(1000))
    with pytest.raises(BackendError, match=r"1000 bytes of memory for experts; 2 in each layer take \d+: give more"):
        BACKEND.compile(program, CACHE, options)


def test_a_file_that_ends_early_names_itself_and_the_rest_goes_on(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    copy.mkdir()
    for file in path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    program = load(copy).program
    streamed = compile_with(program, 2)
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    moved = weights.rename(weights.with_suffix(".kept"))  # what is mapped stays whole
    first = min(place.offset for node in streamable(program) for place in node.spec.experts.gate.stored)
    weights.write_bytes(whole[: first + 10])
    with pytest.raises(WeightsError, match=r"model\.safetensors: weights at byte \d+ cannot be read: .*check the disk"):
        outputs(streamed)
    moved.rename(weights)
    assert_close(outputs(streamed), outputs(compile_with(program, None)), 1e-5)
