"""What ProgramBuilder refuses, and what a program records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from mixbit.kernels.ops import AttentionSpec, Columns, GatedDeltaSpec, ProgramBuilder, Rope, Value, kind
from mixbit.kernels.spec import BatchMatvecSpec
from tests.kernels.builders import Tensors

T = Tensors()
ATTENTION = AttentionSpec(heads=4, kv_heads=2, head_dim=8, scale=1.0, rope=None)
DELTA = GatedDeltaSpec(
    key_heads=1,
    value_heads=2,
    key_dim=8,
    value_dim=8,
    conv=T.dense(32, 4),
    a_log=T.dense(2),
    dt_bias=T.dense(2),
    norm=T.norm(8),
)
MLP, MOE = T.mlp(64, 32), T.moe()


def attend(b: ProgramBuilder, x: Value, spec: AttentionSpec, *, q: int = 0, v: int = 48) -> Value:
    return b.attention(Columns(x, q, 8), Columns(x, 32, 8), Columns(x, v, 8), spec)


def delta(b: ProgramBuilder, x: Value, spec: GatedDeltaSpec, *, a: int = 50) -> Value:
    q, k, v, z = (Columns(x, start, width) for start, width in ((0, 8), (8, 8), (16, 16), (32, 16)))
    return b.gated_delta(q, k, v, z, Columns(x, 48, 2), Columns(x, a, 2), spec)


def rope(rotated: int) -> Rope:
    return Rope(np.ones(rotated // 2, np.float32))


@pytest.mark.parametrize(
    ("verb", "says"),
    [
        (lambda b, x: b.rms_norm(x, T.norm(63)), "63 values, expected 64"),
        (lambda b, x: b.add_norm(x, x, T.norm(65)), "65 values, expected 64"),
        (lambda b, x: b.add_norm(x, b.embed(T.dense(4, 32)), T.norm(64)), "residual: 32 values, expected 64"),
        (lambda b, x: b.batch_matvec(x, BatchMatvecSpec(T.dense(8, 32))), "32 values, expected 64"),
        (lambda b, x: attend(b, x, replace(ATTENTION, kv_heads=3)), "4 is not a multiple of 3"),
        (lambda b, x: attend(b, x, ATTENTION, v=49), "v: 2 heads of 8 from 49 by 8 do not fit in rows of 64"),
        (lambda b, x: attend(b, x, ATTENTION, q=-8), "q: 4 heads"),
        (lambda b, x: attend(b, x, replace(ATTENTION, q_norm=T.norm(16))), "16 values, expected 8"),
        (lambda b, x: attend(b, x, replace(ATTENTION, rope=rope(16))), "16 values rotated of a head of 8"),
        (lambda b, x: delta(b, x, replace(DELTA, key_heads=3)), "2 is not a multiple of 3"),
        (lambda b, x: delta(b, x, DELTA, a=63), "a: 1 heads of 2 from 63"),
        (lambda b, x: delta(b, x, replace(DELTA, conv=T.dense(33, 4))), "33 values, expected 32"),
        (lambda b, x: delta(b, x, replace(DELTA, a_log=T.dense(3))), "3 values, expected 2"),
        (lambda b, x: delta(b, x, replace(DELTA, norm=T.norm(4))), "4 values, expected 8"),
        (lambda b, x: b.mlp(x, replace(MLP, up=T.dense(32, 32))), "32 values, expected 64"),
        (lambda b, x: b.mlp(x, replace(MLP, up=T.dense(31, 64))), "31 values, expected 32"),
        (lambda b, x: b.mlp(x, replace(MLP, down=T.dense(64, 31))), "31 values, expected 32"),
        (lambda b, x: b.mlp(x, replace(MLP, down=T.dense(63, 32))), "63 values, expected 64"),
        (lambda b, x: b.mlp(x, MOE.experts), "a stack of 8 experts, expected None"),
        (lambda b, x: b.moe(x, replace(MOE, experts=T.mlp(64, 32, 7))), "a stack of 7 experts, expected 8"),
        (lambda b, x: b.moe(x, replace(MOE, router=T.dense(8, 63))), "63 values, expected 64"),
        (lambda b, x: b.moe(x, replace(MOE, top_k=9)), "9 experts a token"),
        (lambda b, x: b.moe(x, replace(MOE, top_k=0)), "0 experts a token"),
        (lambda b, x: b.moe(x, replace(MOE, shared=T.mlp(32, 32))), "32 values, expected 64"),
        (lambda b, x: b.moe(x, replace(MOE, shared_gate=T.dense(2, 64))), "2 values, expected 1"),
        (lambda b, x: b.build(x), "selected rows"),
    ],
)
def test_shapes_that_do_not_fit(verb: Callable[[ProgramBuilder, Value], object], says: str) -> None:
    builder = ProgramBuilder()
    x = builder.embed(T.dense(4, 64))
    with pytest.raises(ValueError, match=says):
        verb(builder, x)


def test_program_records_nodes_values_and_caches() -> None:
    builder = ProgramBuilder()
    x = builder.embed(T.dense(4, 64))
    first = attend(builder, x, ATTENTION)
    state = delta(builder, x, DELTA)
    second = attend(builder, x, ATTENTION)
    total, _ = builder.add_norm(first, second, T.norm(32))
    logits = builder.select_rows(total)
    program = builder.build(logits)
    assert [kind(node) for node in program.nodes] == [
        "embed",
        "attention",
        "gated_delta",
        "attention",
        "add_norm",
        "select_rows",
    ]
    assert [node.out for node in program.attentions] == [first, second]
    assert [node.cache for node in program.attentions] == [0, 1]
    assert [node.out for node in program.gated_deltas] == [state]
    assert all(program.values[value.index] is value for value in program.values)
    assert program.logits is logits
