"""Residual sum and RMS norm in one launch."""

from __future__ import annotations

import mlx.core as mx

from mixbit.kernels.mlx.custom.launch import Launcher, Template, float_bits

_THREADS = 256


class AddNorm:
    """(x + delta, norm(x + delta))."""

    def __init__(self, launcher: Launcher, weight: mx.array, eps: float) -> None:
        """weight: [dim]."""
        self._kernel = launcher.kernel("add_norm", ["x", "delta", "weight"], ["total", "out"])
        self._weight = weight
        self._template: Template = [("DIM", weight.size), ("THREADS", _THREADS), ("EPS", float_bits(eps))]

    def __call__(self, x: mx.array, delta: mx.array) -> tuple[mx.array, mx.array]:
        """x, delta [rows, dim] of one dtype -> the sum and its norm, in that dtype."""
        total, out = self._kernel(
            inputs=[x, delta, self._weight],
            template=[("T", x.dtype), *self._template],
            grid=(x.shape[0] * _THREADS, 1, 1),
            threadgroup=(_THREADS, 1, 1),
            output_shapes=[x.shape, x.shape],
            output_dtypes=[x.dtype, x.dtype],
        )
        return total, out
