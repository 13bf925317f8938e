"""Matrices as float32, and their product with activations."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mixbit.kernels.reference.packing import unpack
from mixbit.kernels.spec import BatchMatvecSpec, Matrix, QuantizedTensor

Float32Array = npt.NDArray[np.float32]


def dequantize(matrix: Matrix, index: Any = ...) -> Float32Array:
    """The values [..., in] of `matrix`, in float32: scale * code + bias, or the dense values.

    index: selects rows of a matrix, or experts of a stack, before they are expanded.
    """
    if not isinstance(matrix, QuantizedTensor):
        dense: Float32Array = matrix.data[index].astype(np.float32)
        return dense
    scales = matrix.scales[index].astype(np.float32)[..., None]
    biases = matrix.biases[index].astype(np.float32)[..., None]
    codes = unpack(matrix.weight[index], matrix.bits)
    groups = codes.reshape(*scales.shape[:-1], matrix.group_size).astype(np.float32)
    values: Float32Array = (scales * groups + biases).reshape(codes.shape)
    return values


def apply(matrix: Matrix, x: Float32Array, expert: int | None = None) -> Float32Array:
    """x [rows, in] -> [rows, out], with one matrix of a stack where `expert` is given."""
    return x @ dequantize(matrix, ... if expert is None else expert).T


def batch_matvec(specs: tuple[BatchMatvecSpec, ...], x: Float32Array) -> tuple[Float32Array, ...]:
    """Every spec's matrix applied to the same x [rows, in], plus its bias vector if it has one."""
    outs = []
    for spec in specs:
        out = apply(spec.matrix, x)
        outs.append(out if spec.bias is None else out + spec.bias.data.astype(np.float32))
    return tuple(outs)
