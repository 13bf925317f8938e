"""Matrices of any formats on one input of few rows, with norm, residual and choice of experts folded in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mixbit.kernels.cuda.compiler import Source
from mixbit.kernels.cuda.driver import Addressed
from mixbit.kernels.cuda.plan import NULL, SCALES, Planned, address, addresses, ceil_div, group_of, padded
from mixbit.kernels.cuda.prefill import Weights
from mixbit.kernels.cuda.step import as_struct

_MOST_WARPS = 16
_SHARED = 36 << 10  # bytes that a block may have for its sums


@dataclass(frozen=True, eq=False)
class Output:
    """One matrix, its additive bias, float32, if any, and its result [rows, out], of activations or float32."""

    weights: Weights
    out: Addressed
    bias: Addressed | None = None
    exact: bool = False


@dataclass(frozen=True, eq=False)
class FoldedNorm:
    """The norm that the input goes through. weight: of the type of activations."""

    weight: Addressed
    eps: float


@dataclass(frozen=True, eq=False)
class Choice:
    """The choice of experts from the first output."""

    top_k: int
    normalize: bool
    experts: Addressed
    weights: Addressed
    arrived: Addressed  # a zero for each sixteen rows


@dataclass(frozen=True)
class Kind:
    """What kernels are made for. dtype: of activations. multiprocessors: of the device."""

    dtype: str
    multiprocessors: int

    @property
    def defines(self) -> tuple[str, ...]:
        """Macros of base.cuh."""
        return ("FLOAT32",) if self.dtype == "float32" else ()

    def depth(self, columns: int = 1) -> int:
        """Columns of a matrix that a warp holds at once, beside `columns` eights of activations.

        A float32 activation takes three registers where a bfloat16 takes one.
        """
        return 128 if self.dtype == "float32" or columns > 1 else 256

    def warps(self, depth: int, columns: int = 1) -> int:
        """Warps that share the columns of a matrix."""
        return min(_MOST_WARPS, ceil_div(depth, self.depth(columns)))


def linear(
    kind: Kind,
    x: Addressed,
    outputs: Sequence[Output],
    rows: int,
    *,
    norm: FoldedNorm | None = None,
    residual: Addressed | None = None,
    choice: Choice | None = None,
) -> Planned:
    """One launch of matvec.cu."""
    columns = 1 if rows <= 8 else 2
    depth = outputs[0].weights.depth
    warps = kind.warps(depth, columns)
    resident = max(1, _MOST_WARPS // warps)  # blocks of a multiprocessor at a time
    sixteens = [ceil_div(output.weights.rows, 16) for output in outputs]
    each = max(1, round(sum(sixteens) / (kind.multiprocessors * resident)))  # tiles of a block
    tiles = min(each, 4, max(1, _SHARED // (warps * columns * 4 * 32 * 4)))
    chunks = ceil_div(each, tiles)
    formats: list[str] = []
    matrices: list[int] = []
    blocks = 0
    for output, count in zip(outputs, sixteens, strict=True):
        weights, group = output.weights, group_of(output.weights)
        scale, out = SCALES[weights.format.dtype], "float" if output.exact else "T"
        form = f"{weights.format.bits}, {group}, {padded(weights) // group}, {scale}, {out}"
        if form not in formats:
            formats.append(form)
        matrices += [*addresses(weights), address(output.bias), output.out.address]
        matrices += [weights.rows, blocks, formats.index(form), 0]
        blocks += ceil_div(count, tiles * chunks)
    defines = [
        *kind.defines,
        f"DIM {depth}",
        f"WARPS {warps}",
        f"COLUMNS {columns}",
        f"MOST_DEPTH {kind.depth(columns)}",
        f"MATRIX_COUNT {len(outputs)}",
        f"TILES {tiles}",
        f"CHUNKS {chunks}",
        f"FORMATS(F) {' '.join(f'F({i}, {form})' for i, form in enumerate(formats))}",
    ]
    chosen = [0, 0, 0]
    if norm is not None:
        defines.append("WITH_NORM")
    if residual is not None:
        defines.append("WITH_RESIDUAL")
    if choice is not None:
        defines += [
            f"TOP_K {choice.top_k}",
            f"EXPERTS {outputs[0].weights.rows}",
            f"NORMALIZE {int(choice.normalize)}",
        ]
        chosen = [address(part) for part in (choice.experts, choice.weights, choice.arrived)]
    arguments = (
        x,
        NULL if norm is None else norm.weight,
        np.float32(0 if norm is None else norm.eps),
        NULL if residual is None else residual,
        as_struct(f"<{'QQQQQiiii' * len(outputs)}", *matrices),
        as_struct("<3Q", *chosen),
        np.int32(rows),
    )
    grid = (blocks, ceil_div(rows, 8 * columns), 1)
    return Planned(Source("matvec.cu", tuple(defines)), "matvec", grid, 32 * warps, arguments)
