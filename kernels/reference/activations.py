"""Elementwise functions, written so that no input overflows."""

from __future__ import annotations

import numpy as np

from mixbit.kernels.reference.matrix import Float32Array


def softplus(x: Float32Array) -> Float32Array:
    """log(1 + e^x)."""
    return np.logaddexp(np.float32(0), x)


def sigmoid(x: Float32Array) -> Float32Array:
    """1 / (1 + e^-x)."""
    return np.exp(-softplus(-x))


def silu(x: Float32Array) -> Float32Array:
    """x * sigmoid(x)."""
    return x * sigmoid(x)


def softmax(x: Float32Array) -> Float32Array:
    """e^x / sum(e^x) over the last dimension; -inf is allowed beside finite values."""
    powers: Float32Array = np.exp(x - np.max(x, axis=-1, keepdims=True))
    total: Float32Array = np.sum(powers, axis=-1, keepdims=True)
    return powers / total
