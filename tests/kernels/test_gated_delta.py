"""The gated delta net: convolution, gates, recurrence, gated norm, and its state."""

from __future__ import annotations

import numpy as np
import pytest

from mixbit.kernels.executor import CacheConfig
from mixbit.kernels.ops import Columns, GatedDeltaSpec, Program, ProgramBuilder, Value
from mixbit.kernels.reference.gated_delta import recur
from tests.kernels.builders import CACHE, DTYPES, Sequences, Tensors, assert_close, program_of, run_in_pieces
from tests.kernels.conftest import REFERENCE, Candidate

SHAPES = {
    "one-to-one": (2, 2, 16, 16),
    "two-to-one": (2, 4, 32, 16),
    "three-to-one": (1, 3, 8, 24),
    "as-in-qwen3-next": (2, 4, 128, 128),
}
ROWS = 40


def spec_of(shape: str, tensors: Tensors, kernel: int = 4, dtype: str = "float32") -> GatedDeltaSpec:
    key_heads, value_heads, key_dim, value_dim = SHAPES[shape]
    channels = 2 * key_heads * key_dim + value_heads * value_dim
    return GatedDeltaSpec(
        key_heads=key_heads,
        value_heads=value_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        conv=tensors.dense(channels, kernel, dtype=dtype),
        a_log=tensors.dense(value_heads, dtype=dtype, scale=1.0),
        dt_bias=tensors.dense(value_heads, dtype=dtype, scale=1.0),
        norm=tensors.norm(value_dim, dtype=dtype),
    )


def columns_of(spec: GatedDeltaSpec, *, fused: bool) -> tuple[list[tuple[int, int]], int]:
    """(offset, stride) of q, k, v, z, b, a, and the width of a row.

    fused: all six for one key head, then for the next. Else all heads of q, then of k, and so on.
    """
    ratio = spec.value_heads // spec.key_heads
    widths = [spec.key_dim] * 2 + [ratio * spec.value_dim] * 2 + [ratio] * 2
    starts = np.cumsum([0, *widths])
    if fused:
        return [(int(start), int(starts[-1])) for start in starts[:-1]], int(starts[-1]) * spec.key_heads
    return [(int(s) * spec.key_heads, w) for s, w in zip(starts, widths, strict=False)], int(
        starts[-1]
    ) * spec.key_heads


def record(builder: ProgramBuilder, x: Value, places: list[tuple[int, int]], spec: GatedDeltaSpec) -> Value:
    q, k, v, z, b, a = (Columns(x, *place) for place in places)
    return builder.gated_delta(q, k, v, z, b, a, spec)


def layer(shape: str, *, fused: bool = True, kernel: int = 4, dtype: str = "float32", seed: int = 0) -> Program:
    tensors = Tensors(seed)
    spec = spec_of(shape, tensors, kernel, dtype)
    places, width = columns_of(spec, fused=fused)
    x = tensors.values(ROWS, width)

    def verb(builder: ProgramBuilder, value: Value) -> Value:
        return record(builder, value, places, spec)

    return program_of(x, verb)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "split"])
@pytest.mark.parametrize("shape", SHAPES)
def test_like_reference_over_mixed_steps(candidate: Candidate, shape: str, fused: bool) -> None:
    """Sequences come, go on, change company, and start anew in a slot that another one used."""
    program = layer(shape, fused=fused)
    ours, reference = candidate.compile(program), REFERENCE.compile(program)
    sequences = Sequences(CACHE, count=4, seed=2)
    rng = np.random.default_rng(1)
    steps: list[dict[int, int]] = [
        {0: 5},
        {1: 1, 0: 1, 2: 9},
        {0: 1, 1: 1},
        {0: 1, 1: 1},
        {2: 3, 3: 3, 1: 3},
        {3: 1, 2: 1, 1: 1, 0: 1},
        {1: 1, 0: 1},
        {0: 6, 2: 1, 1: 2},
    ]
    for number, lengths in enumerate(steps):
        if number == 4:
            sequences.restart(1)
        batch = sequences.step({s: rng.integers(0, ROWS, n) for s, n in lengths.items()})
        assert_close(ours.run(batch), reference.run(batch))


@pytest.mark.parametrize("sizes", [[20], [1] * 20, [3, 17], [2, 2, 16], [19, 1], [1, 3, 16], [6, 1, 13]], ids=str)
def test_pieces_equal_the_whole(any_candidate: Candidate, sizes: list[int]) -> None:
    """Pieces shorter and longer than the convolution carry its state and the memory."""
    program = layer("two-to-one")
    tokens = np.random.default_rng(2).integers(0, ROWS, 20)
    whole = run_in_pieces(REFERENCE.compile(program), CACHE, tokens, [20])
    assert_close(run_in_pieces(any_candidate.compile(program), CACHE, tokens, sizes), whole)


def test_long_prefill(candidate: Candidate) -> None:
    program = layer("two-to-one")
    cache = CacheConfig(blocks=10, block_size=32, state_slots=2)
    tokens = np.random.default_rng(3).integers(0, ROWS, 230)
    whole = run_in_pieces(REFERENCE.compile(program), cache, tokens, [230])
    assert_close(run_in_pieces(candidate.compile(program, cache), cache, tokens, [200, 30]), whole)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 31, 32, 33, 63, 64, 65])
def test_lengths_about_a_chunk(candidate: Candidate, length: int) -> None:
    """New and resumed, alone and beside another sequence."""
    program = layer("two-to-one")
    cache = CacheConfig(blocks=16, block_size=32, state_slots=2)
    ours, reference = candidate.compile(program, cache), REFERENCE.compile(program, cache)
    sequences = Sequences(cache, count=2, seed=4)
    rng = np.random.default_rng(5)
    for lengths in ({0: length}, {1: length, 0: length}, {0: 1, 1: length}, {1: length}):
        batch = sequences.step({s: rng.integers(0, ROWS, n) for s, n in lengths.items()})
        assert_close(ours.run(batch), reference.run(batch))


def test_a_token_that_never_changes(candidate: Candidate) -> None:
    """All keys of a chunk are alike, nothing is forgotten, and every token replaces all: the hardest to solve."""
    tensors = Tensors(12)
    spec = spec_of("as-in-qwen3-next", tensors)
    places, width = columns_of(spec, fused=False)
    x = tensors.values(1, width)
    x[:, places[4][0] : places[5][0]] = 30  # b: replace
    x[:, places[5][0] :] = -30  # a: keep
    program = program_of(x, lambda builder, value: record(builder, value, places, spec))
    batch = Sequences(CACHE, count=1).step({0: [0] * 90})
    assert_close(candidate.compile(program).run(batch), REFERENCE.compile(program).run(batch), 1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_of_any_dtype(candidate: Candidate, dtype: str) -> None:
    program = layer("two-to-one", dtype=dtype)
    batch = Sequences(CACHE, count=1).step({0: range(9)})
    assert_close(candidate.compile(program).run(batch), REFERENCE.compile(program).run(batch))


@pytest.mark.parametrize("kernel", [2, 3, 5])
def test_convolutions_of_other_lengths(candidate: Candidate, kernel: int) -> None:
    program = layer("one-to-one", kernel=kernel)
    tokens = np.random.default_rng(4).integers(0, ROWS, 12)
    whole = run_in_pieces(REFERENCE.compile(program), CACHE, tokens, [12])
    assert_close(run_in_pieces(candidate.compile(program), CACHE, tokens, [5, 1, 6]), whole)


def test_split_columns_equal_fused_ones(any_candidate: Candidate) -> None:
    """The same numbers laid out in both ways give the same result."""
    tensors = Tensors(7)
    spec = spec_of("two-to-one", tensors)
    fused, width = columns_of(spec, fused=True)
    split, _ = columns_of(spec, fused=False)
    x = tensors.values(8, width)
    ratio = spec.value_heads // spec.key_heads
    widths = [spec.key_dim] * 2 + [ratio * spec.value_dim] * 2 + [ratio] * 2
    moved = np.empty_like(x)
    for (start, stride), (to, step), size in zip(fused, split, widths, strict=True):
        for head in range(spec.key_heads):
            moved[:, to + head * step :][:, :size] = x[:, start + head * stride :][:, :size]
    batch = Sequences(CACHE, count=1).step({0: range(8)})
    outs = []
    for rows, places in ((x, fused), (moved, split)):

        def verb(builder: ProgramBuilder, value: Value, places: list[tuple[int, int]] = places) -> Value:
            return record(builder, value, places, spec)

        outs.append(any_candidate.compile(program_of(rows, verb)).run(batch))
    assert_close(outs[0], outs[1], 1e-6)


def test_extreme_gates_stay_finite(candidate: Candidate) -> None:
    """Decays that forget all at once or nothing at all, and inputs far from zero."""
    tensors = Tensors(8)
    spec = spec_of("two-to-one", tensors)
    places, width = columns_of(spec, fused=False)
    x = tensors.values(ROWS, width)
    x[:, places[4][0] :] *= 60  # b and a
    x[::3, : places[3][0]] *= 30

    def verb(builder: ProgramBuilder, value: Value) -> Value:
        return record(builder, value, places, spec)

    program = program_of(x, verb)
    batch = Sequences(CACHE, count=1).step({0: range(24)})
    assert_close(candidate.compile(program).run(batch), REFERENCE.compile(program).run(batch), 1e-4)


def test_recurrence_by_its_formula() -> None:
    """One head, in float64: S = g S + beta (v - g S k) k^T, read by q."""
    tensors = Tensors(9)
    q, k, v = (tensors.values(6, 1, n) for n in (4, 4, 3))
    decay, beta = tensors.rng.uniform(0, 1, (2, 6, 1)).astype(np.float32)
    memory = tensors.values(1, 3, 4)
    state = memory[0].astype(np.float64)
    out = recur(q, k, v, decay, beta, memory)
    for t in range(6):
        state = decay[t, 0] * state
        state += beta[t, 0] * np.outer(v[t, 0] - state @ k[t, 0], k[t, 0])
        assert_close(out[t, 0], (state @ q[t, 0]).astype(np.float32), 1e-5)
    assert_close(memory[0], state.astype(np.float32), 1e-5)
