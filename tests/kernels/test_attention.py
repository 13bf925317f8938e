"""Attention over the paged KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from mixbit.kernels.executor import CacheConfig
from mixbit.kernels.ops import AttentionSpec, Columns, Program, ProgramBuilder, Rope, Value
from tests.kernels.builders import CACHE, Sequences, Tensors, assert_close, program_of, run_in_pieces
from tests.kernels.conftest import REFERENCE, Candidate


@dataclass(frozen=True)
class Shape:
    """One layer. fused: q and gate are interleaved per head, as in Qwen3-Next; rotated: values under RoPE."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    rotated: int = 32
    normed: bool = False
    gated: bool = False
    rope_scale: float = 1.0
    layers: int = 1

    @property
    def width(self) -> int:
        """Values in a row that hold q, k, v and the gate of one layer."""
        return (self.heads * (2 if self.gated else 1) + 2 * self.kv_heads) * self.head_dim


SHAPES = {
    "plain": Shape(),
    "multi-head": Shape(heads=3, kv_heads=3),
    "one-kv-head": Shape(heads=7, kv_heads=1, head_dim=16, rotated=16),
    "no-rope": Shape(rotated=0),
    "partial-rope": Shape(rotated=8),
    "odd-half": Shape(head_dim=24, rotated=18),
    "normed": Shape(normed=True),
    "yarn": Shape(rope_scale=1.3),
    "gated": Shape(heads=4, kv_heads=2, head_dim=64, rotated=16, normed=True, gated=True),
    "two-layers": Shape(layers=2, normed=True),
}


def attend(builder: ProgramBuilder, x: Value, shape: Shape, tensors: Tensors, start: int) -> Value:
    """One layer whose q, k, v and gate lie in x from column `start`."""
    dim = shape.head_dim
    q_stride = 2 * dim if shape.gated else dim
    k_start = start + shape.heads * q_stride
    v_start = k_start + shape.kv_heads * dim
    inv_freq = (10000.0 ** -(np.arange(0, shape.rotated, 2) / max(shape.rotated, 1))).astype(np.float32)
    spec = AttentionSpec(
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=dim,
        scale=dim**-0.5,
        rope=Rope(inv_freq, shape.rope_scale) if shape.rotated else None,
        q_norm=tensors.norm(dim) if shape.normed else None,
        k_norm=tensors.norm(dim) if shape.normed else None,
    )
    gate = Columns(x, start + dim, q_stride) if shape.gated else None
    return builder.attention(
        Columns(x, start, q_stride), Columns(x, k_start, dim), Columns(x, v_start, dim), spec, gate
    )


def layer(shape: Shape, rows: int = 24, seed: int = 0) -> Program:
    """Rows of random q, k, v; with two layers, the sum of what both give."""
    tensors = Tensors(seed)
    x = tensors.values(rows, shape.layers * shape.width)

    def verb(builder: ProgramBuilder, value: Value) -> Value:
        outs = [attend(builder, value, shape, tensors, n * shape.width) for n in range(shape.layers)]
        total = outs[0]
        for out in outs[1:]:
            total, _ = builder.add_norm(total, out, tensors.norm(out.dim))
        return total

    return program_of(x, verb)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_like_reference_over_mixed_steps(candidate: Candidate, shape: Shape) -> None:
    """Prefill, chunks and decode of sequences of different lengths, together, in scattered blocks."""
    program = layer(shape)
    ours, reference = candidate.compile(program), REFERENCE.compile(program)
    sequences = Sequences(CACHE, count=4, seed=3)
    rng = np.random.default_rng(1)
    for lengths in (
        {0: 5},
        {1: 1, 0: 1, 2: 9},
        {2: 3, 3: 3, 1: 3},
        {3: 1, 2: 1, 1: 1, 0: 1},
        {0: 7, 3: 1, 1: 2},
        {0: 1, 1: 1, 2: 1, 3: 1},
    ):
        batch = sequences.step({s: rng.integers(0, 24, n) for s, n in lengths.items()})
        assert_close(ours.run(batch), reference.run(batch))


@pytest.mark.parametrize("shape", ["plain", "gated", "two-layers"])
@pytest.mark.parametrize("sizes", [[20], [1] * 20, [7, 13], [4, 4, 4, 8], [19, 1], [1, 19]], ids=str)
def test_pieces_equal_the_whole(any_candidate: Candidate, shape: str, sizes: list[int]) -> None:
    program = layer(SHAPES[shape])
    tokens = np.random.default_rng(2).integers(0, 24, 20)
    whole = run_in_pieces(REFERENCE.compile(program), CACHE, tokens, [20])
    assert_close(run_in_pieces(any_candidate.compile(program), CACHE, tokens, sizes), whole)


def test_definition_of_one_head(any_candidate: Candidate) -> None:
    """Against the formula written out: q of the last row reads all rows."""
    dim, rows = 32, 6
    tensors = Tensors(4)
    x = tensors.values(rows, 3 * dim)

    def verb(builder: ProgramBuilder, value: Value) -> Value:
        spec = AttentionSpec(heads=1, kv_heads=1, head_dim=dim, scale=0.5, rope=None)
        q, k, v = (Columns(value, n * dim, dim) for n in range(3))
        return builder.attention(q, k, v, spec)

    q, k, v = np.split(x.astype(np.float64), 3, axis=1)
    weights = np.exp(0.5 * k @ q[-1])
    got = any_candidate.compile(program_of(x, verb)).run(Sequences(CACHE, count=1).step({0: range(rows)}))
    assert_close(got[-1], (weights @ v / weights.sum()).astype(np.float32))
    assert_close(got[0], x[0, 2 * dim :])


def test_rope_turns_pairs_by_position(any_candidate: Candidate) -> None:
    """With q = k = (1, 0, ...) and one frequency, the score of positions p and s is cos((p - s) f)."""
    dim, frequency = 32, 0.3
    unit = np.zeros(dim, np.float32)
    unit[0] = 1
    values = np.eye(dim, dtype=np.float32)[:8]
    x = np.concatenate([np.tile(unit, (8, 2)), values], axis=1)

    def verb(builder: ProgramBuilder, value: Value) -> Value:
        rope = Rope(np.array([frequency], np.float32), scale=2.0)
        spec = AttentionSpec(heads=1, kv_heads=1, head_dim=dim, scale=1.0, rope=rope)
        q, k, v = (Columns(value, n * dim, dim) for n in range(3))
        return builder.attention(q, k, v, spec)

    got = any_candidate.compile(program_of(x, verb)).run(Sequences(CACHE, count=1).step({0: range(8)}))
    # scale multiplies cos and sin of q and of k: 4 times in the score
    scores = np.exp(4 * np.cos((7 - np.arange(8)) * frequency))
    assert_close(got[-1, :8], (scores / scores.sum()).astype(np.float32))


def test_sequences_do_not_see_each_other(any_candidate: Candidate) -> None:
    """The rows of a sequence are the same alone and in any company, in any order."""
    program = layer(SHAPES["gated"])
    rng = np.random.default_rng(5)
    prompts = {s: rng.integers(0, 24, n) for s, n in enumerate((3, 11, 1, 6))}
    alone = {}
    for s, tokens in prompts.items():
        alone[s] = any_candidate.compile(program).run(Sequences(CACHE, count=1).step({0: tokens}))
    together = any_candidate.compile(program).run(Sequences(CACHE, count=4, seed=9).step(prompts))
    start = 0
    for s, tokens in prompts.items():
        assert_close(together[start : start + len(tokens)], alone[s])
        start += len(tokens)


def test_reused_blocks_show_nothing_of_before(any_candidate: Candidate) -> None:
    program = layer(SHAPES["plain"])
    executor = any_candidate.compile(program)
    sequences = Sequences(CACHE, count=1)
    executor.run(sequences.step({0: range(20)}))
    sequences.restart(0)
    fresh = any_candidate.compile(program).run(Sequences(CACHE, count=1).step({0: [3, 1, 2]}))
    assert_close(executor.run(sequences.step({0: [3, 1, 2]})), fresh, 1e-6)


@pytest.mark.parametrize("block_size", [1, 3, 16, 64])
def test_any_block_size(candidate: Candidate, block_size: int) -> None:
    program = layer(SHAPES["plain"])
    cache = CacheConfig(blocks=128 // block_size, block_size=block_size, state_slots=1)
    tokens = np.random.default_rng(6).integers(0, 24, 40)
    whole = run_in_pieces(REFERENCE.compile(program), CACHE, tokens, [40])
    assert_close(run_in_pieces(candidate.compile(program, cache), cache, tokens, [17, 1, 1, 21]), whole)


def test_blocks_may_be_shared_by_sequences(any_candidate: Candidate) -> None:
    """A prefix that another sequence computed is read through the block table, as a prefix cache does."""
    program = layer(SHAPES["normed"])
    executor = any_candidate.compile(program)
    prefix, rest = list(range(8)), [20, 21, 22]
    first = Sequences(CACHE, count=2).step({0: prefix})
    executor.run(first)
    tail = Sequences(CACHE, count=2).step({1: prefix + rest})
    tables = tail.block_tables.copy()
    tables[:, :2] = first.block_tables[:, :2]
    shared = type(tail)(
        tokens=np.array(rest, np.int32),
        query_starts=np.array([0, 3], np.int32),
        context_lengths=np.array([8], np.int32),
        block_tables=tables,
        state_slots=tail.state_slots,
        logit_rows=np.arange(3, dtype=np.int32),
    )
    whole = REFERENCE.compile(program).run(Sequences(CACHE, count=1).step({0: prefix + rest}))
    assert_close(executor.run(shared), whole[8:])
