"""Random programs of the tests of the op table, for parity on a GPU machine where pytest's fixtures do not fit."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any
from unittest.mock import MagicMock

import numpy as np

from mixbit.kernels import ops
from mixbit.kernels.spec import BITS, BatchMatvecSpec


def cases() -> dict[str, tuple[ops.Program, list[int]]]:
    """Programs of the tests of the op table, and how many tokens to feed at once."""
    try:
        from mixbit.kernels.cpu import _cpu  # noqa: F401
    except ImportError:  # a GPU machine where only MLX is installed: the tests want the native module's name
        sys.modules["mixbit.kernels.cpu._cpu"] = MagicMock()
    from tests.kernels import test_attention, test_executor, test_gated_delta
    from tests.kernels.builders import Tensors, program_of

    t, made = Tensors(7), {}
    for rows in (1, 5, 8):
        specs = [BatchMatvecSpec(t.quantized(70, 576, bits=bits, group_size=64)) for bits in BITS]
        made[f"matvec of all widths, add and norm, {rows} tokens"] = (_sum(t.values(rows, 576), specs, t), [rows])
    for bits in (3, 4, 8):  # few: each is compiled here, and the host runs them all
        spec = t.moe(dim=128, hidden=96, experts=40, top_k=6, bits=bits)
        for rows in (1, 9):
            graph = program_of(t.values(rows, 128), partial(_moe, spec))
            made[f"moe, {bits} bits, {rows} tokens"] = (graph, [rows])
    for name in test_gated_delta.SHAPES:
        made[f"gated delta, {name}"] = (test_gated_delta.layer(name), [5, 1, 1, 1])
    for name in ("plain", "partial-rope", "normed", "gated"):
        made[f"attention, {name}"] = (test_attention.layer(test_attention.SHAPES[name]), [5, 1, 1, 1])
    made["a whole model"] = (test_executor.PROGRAM, [20, 1, 1, 9, 1])
    return made


def _moe(spec: ops.MoeSpec, builder: ops.ProgramBuilder, value: ops.Value) -> ops.Value:
    return builder.moe(value, spec)


def _sum(x: Any, specs: list[BatchMatvecSpec], tensors: Any) -> ops.Program:
    """The norm of the sum of all outputs of a batch."""
    from tests.kernels.builders import feed

    builder, value = feed(x)
    total, *rest = builder.batch_matvec(value, *specs)
    for out in rest:
        total, normed = builder.add_norm(total, out, tensors.norm(total.dim))
    return builder.build(builder.select_rows(normed))


def outputs(executor: Any, sizes: list[int]) -> Any:
    """What a sequence gives that is fed in pieces of these sizes."""
    from tests.kernels.builders import CACHE, Sequences

    made, outs, start = Sequences(CACHE, count=1), [], 0
    for size in sizes:
        outs.append(executor.run(made.step({0: range(start, start + size)})))
        start += size
    return np.concatenate(outs)
