"""Rotary position embedding."""

from __future__ import annotations

import numpy as np

from mixbit.kernels.executor import Int32Array
from mixbit.kernels.ops import Rope
from mixbit.kernels.reference.matrix import Float32Array


def rotate(rope: Rope, x: Float32Array, positions: Int32Array) -> Float32Array:
    """x [tokens, heads, head_dim] with the pairs (i, i + half) of its first 2 * half values rotated.

    The angle is position * inv_freq[i], in float32 as the models were trained.
    """
    half = len(rope.inv_freq)
    angles = positions.astype(np.float32)[:, None, None] * rope.inv_freq
    cos, sin = np.cos(angles) * np.float32(rope.scale), np.sin(angles) * np.float32(rope.scale)
    first, second = x[..., :half], x[..., half : 2 * half]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, x[..., 2 * half :]], axis=-1)
