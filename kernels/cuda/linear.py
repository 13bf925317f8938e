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
_RESIDENT = 2  # blocks of a multiprocessor at a time
_SHARED = 40 << 10  # bytes that a block may have for its sums


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

    @property
    def depth(self) -> int:
        """Columns that a warp holds at once: a float32 value takes three registers where a bfloat16 takes one."""
        return 128 if self.dtype == "float32" else 256

    def warps(self, depth: int) -> int:
        """Warps that share the columns of a matrix."""
        return min(_MOST_WARPS, ceil_div(depth, self.depth))


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
    warps = kind.warps(depth)
    most = max(1, _SHARED // (warps * columns * 4 * 32 * 4))
    sixteens = [ceil_div(output.weights.rows, 16) for output in outputs]
    wanted = max(1, round(sum(sixteens) / (kind.multiprocessors * _RESIDENT)))
    tiles = [min(4, most, wanted, count) for count in sixteens]
    blocks = [ceil_div(count, tile) for count, tile in zip(sixteens, tiles, strict=True)]
    matrices = []
    for i, (output, tile, count) in enumerate(zip(outputs, tiles, blocks, strict=True)):
        weights, group = output.weights, group_of(output.weights)
        scale, out = SCALES[weights.format.dtype], "float" if output.exact else "T"
        sizes = (i, weights.format.bits, group, padded(weights) // group, weights.rows, count, tile, scale, out)
        matrices.append(f"F({', '.join(map(str, sizes))})")
    defines = [
        *kind.defines,
        f"DIM {depth}",
        f"WARPS {warps}",
        f"COLUMNS {columns}",
        f"MOST_DEPTH {kind.depth}",
        f"MATRIX_COUNT {len(outputs)}",
        f"MOST_TILES {max(tiles)}",
        f"MATRICES(F) {' '.join(matrices)}",
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
    places = [addresses(output.weights) for output in outputs]
    operands = [*(part for parts in zip(*places, strict=True) for part in parts)]
    operands += [address(output.bias) for output in outputs] + [output.out.address for output in outputs]
    arguments = (
        x,
        NULL if norm is None else norm.weight,
        np.float32(0 if norm is None else norm.eps),
        NULL if residual is None else residual,
        as_struct(f"<{len(operands)}Q", *operands),
        as_struct("<3Q", *chosen),
        np.int32(rows),
    )
    grid = (sum(blocks), ceil_div(rows, 8 * columns), 1)
    return Planned(Source("matvec.cu", tuple(defines)), "matvec", grid, 32 * warps, arguments)
