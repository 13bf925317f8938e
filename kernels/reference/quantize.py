"""Affine quantization, with MLX's choice of scale and bias."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mixbit.kernels.reference.packing import pack

_SMALLEST_SCALE = np.float32(1e-7)

Float32Array = npt.NDArray[np.float32]


def quantize(
    weight: npt.NDArray[Any], bits: int, group_size: int
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[Any], npt.NDArray[Any]]:
    """Packed codes [..., out, in * bits / 32], scales and biases [..., out, in / group_size].

    weight: [..., out, in], float32, float16 or bfloat16; scales and biases get its dtype. Bit for bit what
    mx.quantize gives. Rows are independent, so a large tensor can be quantized in pieces.
    """
    *lead, in_dim = weight.shape
    groups = weight.astype(np.float32).reshape(*lead, in_dim // group_size, group_size)
    scale, bias = _range(groups.min(-1), groups.max(-1), bits)
    # Codes come from the scale before it is rounded to the dtype of the weight.
    codes = np.clip(np.rint((groups - bias[..., None]) / scale[..., None]), 0, 2**bits - 1)
    packed = pack(codes.astype(np.uint8).reshape(*lead, in_dim), bits)
    return packed, scale.astype(weight.dtype), bias.astype(weight.dtype)


def _range(low: Float32Array, high: Float32Array, bits: int) -> tuple[Float32Array, Float32Array]:
    """(scale, bias) of groups with these least and greatest values.

    The edge with the larger magnitude becomes the bias, and the scale is adjusted so that zero is a
    code too; the scale is negative where that edge is the greatest value. Where the edge is within
    half a step of zero, the bias is zero. One bit has only its two edges to represent.
    """
    step = np.maximum((high - low) / np.float32(2**bits - 1), _SMALLEST_SCALE)
    if bits == 1:
        return step, low
    low_is_edge = np.abs(low) > np.abs(high)
    edge = np.where(low_is_edge, low, high)
    scale = np.where(low_is_edge, step, -step)
    zero_code = np.rint(edge / scale)
    at_zero = zero_code == 0
    scale = np.where(at_zero, scale, edge / np.where(at_zero, 1, zero_code))
    return scale, np.where(at_zero, np.float32(0), edge)
