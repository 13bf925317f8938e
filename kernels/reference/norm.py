"""Root-mean-square norm."""

from __future__ import annotations

import numpy as np

from mixbit.kernels.ops import Norm
from mixbit.kernels.reference.matrix import Float32Array


def unit_rms(x: Float32Array, eps: float) -> Float32Array:
    """x / sqrt(mean(x^2) + eps) over the last dimension."""
    root: Float32Array = np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + np.float32(eps))
    return x / root


def rms_norm(norm: Norm, x: Float32Array) -> Float32Array:
    """unit_rms(x) * weight; x: [..., dim]."""
    return unit_rms(x, norm.eps) * norm.weight.data.astype(np.float32)
