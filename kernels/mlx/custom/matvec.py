"""Several quantized matrices of any widths on one input, in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import mlx.core as mx

from mixbit.kernels.mlx.custom.launch import Launcher, Template, lanes_for
from mixbit.kernels.mlx.weights import QuantizedWeight, Weight

MAX_TOKENS = 8
"""Rows of x up to which reading the matrices is the cost; beyond, matrix products pay."""
_SIMDGROUPS = 2
_ROWS = 4


def applies(weight: Weight) -> TypeGuard[QuantizedWeight]:
    """Whether the kernels take this matrix: quantized, and not so small that Metal binds it as a constant."""
    return isinstance(weight, QuantizedWeight) and min(weight.codes.size, weight.scales.size) >= 8


class BatchedMatvec:
    """y_i = W_i x for matrices [out_i, in] of one `in`. Codes are read once for up to MAX_TOKENS rows."""

    def __init__(self, launcher: Launcher, weights: Sequence[QuantizedWeight], dtype: mx.Dtype) -> None:
        """dtype: of x, the scales and the outputs."""
        names = [name for i in range(len(weights)) for name in (f"codes_{i}", f"scales_{i}", f"biases_{i}")]
        matrices = "MATRICES(F) " + " ".join(f"F({i})" for i in range(len(weights)))
        outputs = [f"out_{i}" for i in range(len(weights))]
        self._kernel = launcher.kernel("matvec", ["x", *names], outputs, matrices)
        self._arrays = [array for w in weights for array in (w.codes, w.scales, w.biases)]
        self._dtype, self._outs = dtype, [w.codes.shape[0] for w in weights]
        in_dim = weights[0].codes.shape[1] * 32 // weights[0].bits
        lanes = lanes_for(in_dim)
        per_tile = _SIMDGROUPS * _ROWS * 32 // lanes
        tiles = [-(-out // per_tile) for out in self._outs]
        self._tiles = sum(tiles)
        self._template: Template = [
            *(("T", dtype), ("IN", in_dim), ("ROWS", _ROWS), ("LANES", lanes), ("SIMDGROUPS", _SIMDGROUPS)),
            *(
                pair
                for i, (w, out, count) in enumerate(zip(weights, self._outs, tiles, strict=True))
                for pair in (
                    (f"BITS_{i}", w.bits),
                    (f"GROUP_{i}", w.group_size),
                    (f"OUT_{i}", out),
                    (f"TILES_{i}", count),
                )
            ),
        ]

    def __call__(self, x: mx.array) -> list[mx.array]:
        """x [tokens, in] -> [tokens, out_i] for each matrix."""
        tokens = x.shape[0]
        tile = min(1 << (tokens - 1).bit_length(), MAX_TOKENS)
        return self._kernel(
            inputs=[x, *self._arrays],
            template=[*self._template, ("TOKENS", tile)],
            grid=(self._tiles * _SIMDGROUPS * 32, -(-tokens // tile), 1),
            threadgroup=(_SIMDGROUPS * 32, 1, 1),
            output_shapes=[(tokens, out) for out in self._outs],
            output_dtypes=[self._dtype] * len(self._outs),
        )
