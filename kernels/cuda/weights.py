"""The weights of a program on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from mixbit.kernels.cuda.driver import Buffer, Device
from mixbit.kernels.cuda.prefill import Format, Weights, dtype_code
from mixbit.kernels.spec import DenseTensor, Matrix, QuantizedTensor

Place = Callable[[npt.NDArray[Any]], Buffer]
"""Puts an array on the device."""

PITCH = 16
"""Rows of a dense matrix are padded with zeros to a multiple of so many values."""

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def pitch(matrix: Matrix) -> int:
    """Values in a row as it lies on the device."""
    return matrix.in_dim if isinstance(matrix, QuantizedTensor) else -(-matrix.in_dim // PITCH) * PITCH


class Store:
    """Puts the tensors of one program on the device, each array once, however often it is used.

    Codes, scales and biases stay as the checkpoint has them. Dense matrices are bfloat16, unless activations are
    float32 and the checkpoint has more.
    """

    def __init__(self, device: Device, dtype: str, place: Place | None = None) -> None:
        """dtype: of the activations, "bfloat16" or "float32". place: device.put if not given."""
        self._place = place or device.put
        self._exact = dtype == "float32"
        self._placed: dict[tuple[Any, ...], tuple[Buffer, npt.NDArray[Any]]] = {}  # with the array: it owns its address

    def matrix(self, matrix: Matrix) -> Weights:
        """The matrix or stack on the device."""
        if isinstance(matrix, QuantizedTensor):
            return Weights(
                self._put(matrix.weight),
                self._put(matrix.scales),
                self._put(matrix.biases),
                Format.of(matrix),
                matrix.out_dim,
                matrix.in_dim,
            )
        stored = matrix.data.dtype
        dtype = np.dtype(np.float32) if self._exact and stored != _BFLOAT16 else _BFLOAT16
        padding = pitch(matrix) - matrix.in_dim
        form = Format(8 * dtype.itemsize, 32, dtype_code(dtype))
        return Weights(self._put(matrix.data, dtype, padding), None, None, form, matrix.out_dim, matrix.in_dim)

    def vector(self, tensor: DenseTensor | npt.NDArray[np.float32]) -> Buffer:
        """A vector or small tensor, as float32."""
        return self._put(tensor.data if isinstance(tensor, DenseTensor) else tensor, np.dtype(np.float32))

    def values(self, tensor: DenseTensor) -> Buffer:
        """A vector in the type of the activations."""
        return self._put(tensor.data, np.dtype(np.float32) if self._exact else _BFLOAT16)

    def _put(self, array: npt.NDArray[Any], dtype: np.dtype[Any] | None = None, padding: int = 0) -> Buffer:
        key = (array.ctypes.data, array.shape, array.strides, array.dtype, dtype)
        if key not in self._placed:
            made = array if dtype is None else array.astype(dtype, copy=False)
            if padding:
                made = np.pad(made, [(0, 0)] * (made.ndim - 1) + [(0, padding)])
            self._placed[key] = (self._place(made), array)
        return self._placed[key][0]
