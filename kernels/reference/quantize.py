"""Affine quantization, with MLX's choice of scale and bias."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mixbit.kernels.reference.packing import pack

_SMALLEST_SCALE = np.float32(1e-7)


def quantize(
    weight: npt.NDArray[Any], bits: int, group_size: int
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[Any], npt.NDArray[Any]]:
    """Packed codes [..., out, in * bits / 32], scales and biases [..., out, in / group_size].

    weight: [..., out, in], float32, float16 or bfloat16; scales and biases get its dtype. Bit for bit what
    mx.quantize gives. Rows are independent, so a large tensor can be quantized in pieces.

    The edge of the range with the larger magnitude is represented exactly (it becomes the bias, and
    the scale is adjusted so that zero is a code too); the scale is negative where that edge is the
    maximum. A group of zeros gets bias 0.
    """
    *lead, in_dim = weight.shape
    groups = weight.astype(np.float32).reshape(*lead, in_dim // group_size, group_size)
    low, high = groups.min(-1), groups.max(-1)
    most = np.float32(2**bits - 1)

    low_is_edge = np.abs(low) > np.abs(high)
    scale = np.maximum((high - low) / most, _SMALLEST_SCALE)
    scale = np.where(low_is_edge, scale, -scale)
    edge = np.where(low_is_edge, low, high)
    steps = np.rint(edge / scale)  # codes between zero and the edge, negative
    scale = np.where(steps != 0, edge / np.where(steps != 0, steps, 1), scale)
    bias = np.where(steps != 0, edge, np.float32(0))

    codes = np.clip(np.rint((groups - bias[..., None]) / scale[..., None]), 0, most)
    packed = pack(codes.astype(np.uint8).reshape(*lead, in_dim), bits)
    return packed, scale.astype(weight.dtype), bias.astype(weight.dtype)
