"""Matrices on an MLX device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mixbit.kernels.mlx.arrays import to_device
from mixbit.kernels.spec import DenseTensor, Matrix, QuantizedTensor


class Weight(Protocol):
    """A matrix [out, in], or a stack of experts [experts, out, in]."""

    def apply(self, x: mx.array) -> mx.array:
        """x [..., in] -> [..., out]."""

    def gather(self, x: mx.array, experts: mx.array, *, ordered: bool) -> mx.array:
        """x [*a, 1, in] with the experts of each entry, whose shape broadcasts with a -> [*b, 1, out].

        ordered: the experts are ascending.
        """

    def rows(self, index: mx.array) -> mx.array:
        """The rows [n, in] at index [n]."""


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """Codes as the checkpoint packs them; scales and biases in the dtype of the activations."""

    codes: mx.array
    scales: mx.array
    biases: mx.array
    bits: int
    group_size: int

    def apply(self, x: mx.array) -> mx.array:
        """x [..., in] -> [..., out]."""
        return mx.quantized_matmul(
            x, self.codes, self.scales, self.biases, transpose=True, group_size=self.group_size, bits=self.bits
        )

    def gather(self, x: mx.array, experts: mx.array, *, ordered: bool) -> mx.array:
        """See Weight.gather."""
        return mx.gather_qmm(
            x,
            self.codes,
            self.scales,
            self.biases,
            rhs_indices=experts,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            sorted_indices=ordered,
        )

    def rows(self, index: mx.array) -> mx.array:
        """The rows [n, in] at index [n]."""
        return mx.dequantize(
            self.codes[index], self.scales[index], self.biases[index], group_size=self.group_size, bits=self.bits
        )


@dataclass(frozen=True, eq=False)
class DenseWeight:
    """Values in the dtype of the activations."""

    data: mx.array

    def apply(self, x: mx.array) -> mx.array:
        """x [..., in] -> [..., out]."""
        return x @ self.data.T

    def gather(self, x: mx.array, experts: mx.array, *, ordered: bool) -> mx.array:
        """See Weight.gather."""
        return mx.gather_mm(x, self.data.swapaxes(-1, -2), rhs_indices=experts, sorted_indices=ordered)

    def rows(self, index: mx.array) -> mx.array:
        """The rows [n, in] at index [n]."""
        return self.data[index]


class Weights:
    """Puts the tensors of one program on the device, each array once, however often it is used."""

    def __init__(self, dtype: mx.Dtype) -> None:
        """dtype: of the activations; scales, biases and dense values take it too."""
        self.dtype = dtype
        self._placed: dict[tuple[Any, ...], mx.array] = {}

    def matrix(self, matrix: Matrix) -> Weight:
        """The matrix on the device."""
        if isinstance(matrix, QuantizedTensor):
            return QuantizedWeight(
                self._place(matrix.weight, None),
                self._place(matrix.scales, self.dtype),
                self._place(matrix.biases, self.dtype),
                matrix.bits,
                matrix.group_size,
            )
        return DenseWeight(self._place(matrix.data, self.dtype))

    def vector(self, tensor: DenseTensor, dtype: mx.Dtype | None = None) -> mx.array:
        """A dense tensor on the device, in `dtype` or else the dtype of the activations."""
        return self._place(tensor.data, self.dtype if dtype is None else dtype)

    def _place(self, array: npt.NDArray[Any], dtype: mx.Dtype | None) -> mx.array:
        key = (array.ctypes.data, array.shape, array.dtype, dtype)
        if key not in self._placed:
            placed = to_device(np.ascontiguousarray(array))
            if dtype is not None:
                placed = placed.astype(dtype)
            mx.eval(placed)  # now, so that no more than one array is held twice
            self._placed[key] = placed
        return self._placed[key]
