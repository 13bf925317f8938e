"""The gated delta net's prefill on the host: random sizes, tails of chunks, states to go on from, half types."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest

from mixbit.kernels.executor import CacheConfig, Dtype, ExecutorOptions
from mixbit.kernels.mlx.custom.prefill_delta import CHUNK
from mixbit.kernels.ops import GatedDeltaSpec, Program
from tests.kernels import test_gated_delta
from tests.kernels.builders import Sequences, Tensors, assert_close, program_of
from tests.kernels.conftest import REFERENCE
from tests.metal.backend import HostMetalBackend
from tests.metal.host import HostMetal

CACHE = CacheConfig(blocks=48, block_size=16, state_slots=3)
ROWS = 24
KERNELS = {f"prefill_delta_{name}" for name in ("mix", "solve", "advance", "norm")}
TOLERANCES: dict[Dtype, float] = {"float32": 5e-6, "float16": 5e-4, "bfloat16": 4e-3}


@pytest.fixture(autouse=True)
def _on_cpu() -> None:
    mx.set_default_device(mx.cpu)


def layer(heads: tuple[int, int], dims: tuple[int, int], kernel: int, *, fused: bool, seed: int) -> Program:
    """heads, dims: of keys and of values."""
    tensors = Tensors(seed)
    spec = GatedDeltaSpec(
        *heads,
        *dims,
        conv=tensors.dense(2 * heads[0] * dims[0] + heads[1] * dims[1], kernel),
        a_log=tensors.dense(heads[1], scale=1.0),
        dt_bias=tensors.dense(heads[1], scale=1.0),
        norm=tensors.norm(dims[1]),
    )
    places, width = test_gated_delta.columns_of(spec, fused=fused)
    x = tensors.values(ROWS, width).astype(ml_dtypes.bfloat16).astype(np.float32)  # what half types hold exactly
    return program_of(x, lambda builder, value: test_gated_delta.record(builder, value, places, spec))


def compare(program: Program, steps: list[dict[int, int]], seed: int = 0, dtype: Dtype = "float32") -> set[str]:
    """Each step's outputs beside the reference's; steps: new tokens by sequence. Returns the kernels that ran."""
    backend = HostMetalBackend(HostMetal(seed=seed))
    ours = backend.compile(program, CACHE, ExecutorOptions(max_tokens=256, dtype=dtype))
    reference = REFERENCE.compile(program, CACHE)
    sequences, rng = Sequences(CACHE, count=3, seed=seed), np.random.default_rng(seed)
    for lengths in steps:
        batch = sequences.step({s: rng.integers(0, ROWS, n) for s, n in lengths.items()})
        assert_close(ours.run(batch), reference.run(batch), TOLERANCES[dtype])
    return set(backend.host.sources)


@pytest.mark.parametrize("seed", range(6))
def test_random_sizes_tails_and_states(seed: int) -> None:
    """New sequences and such with a state, alike and unlike in length, all about whole chunks."""
    rng = np.random.default_rng(seed)
    key_heads = int(rng.integers(1, 4))
    heads = key_heads, key_heads * int(rng.integers(1, 4))
    dims = 8 * int(rng.integers(1, 10)), 8 * int(rng.integers(1, 8))
    program = layer(heads, dims, int(rng.integers(2, 6)), fused=bool(seed % 2), seed=seed)

    def length() -> int:
        return max(2, CHUNK * int(rng.integers(0, 3)) + int(rng.integers(-2, 3)))

    alike = length()
    steps = [{0: length()}, {1: alike, 2: alike}, {2: length(), 0: length()}, {1: alike, 0: alike}]
    assert compare(program, steps, seed) == KERNELS


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types(dtype: Dtype) -> None:
    program = layer((2, 4), (32, 16), 4, fused=True, seed=20)
    assert compare(program, [{0: 45}, {0: 1, 1: 3}, {0: 33}], dtype=dtype) == {*KERNELS, "gated_delta"}


def test_wide_keys_take_half_as_many_rows() -> None:
    assert compare(layer((1, 1), (136, 16), 3, fused=False, seed=21), [{0: 34}, {0: 2}]) == KERNELS


def test_a_step_of_decodes_and_prompts_takes_all_kernels() -> None:
    program = layer((1, 2), (16, 16), 4, fused=True, seed=22)
    steps = [{0: 3}, {0: 1, 1: 40}, {1: 1, 0: 1}, {2: 2, 0: 1, 1: 2}]
    assert compare(program, steps) == {*KERNELS, "gated_delta"}


@pytest.mark.parametrize("dims", [(12, 16), (16, 12), (264, 8)])
def test_other_sizes_are_left_to_stock_operations(dims: tuple[int, int]) -> None:
    program = layer((1, 2), dims, 4, fused=True, seed=23)
    assert compare(program, [{0: 40}, {0: 1, 1: 2}]) == set()


def test_updates_that_undo_one_another() -> None:
    """Keys that are all alike, nothing forgotten, all replaced: the system is as far from the identity as it gets."""
    tensors = Tensors(24)
    spec = test_gated_delta.spec_of("two-to-one", tensors)
    spec = replace(spec, dt_bias=tensors.dense(spec.value_heads, scale=0.0))
    places, width = test_gated_delta.columns_of(spec, fused=False)
    x = np.tile(tensors.values(1, width), (ROWS, 1))
    x[:, places[4][0] : places[5][0]] = 30  # b: replace
    x[:, places[5][0] :] = -30  # a: keep
    program = program_of(x, lambda builder, value: test_gated_delta.record(builder, value, places, spec))
    assert compare(program, [{0: 2 * CHUNK + 5}, {0: CHUNK}]) == KERNELS
