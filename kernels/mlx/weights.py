"""Matrices on an MLX device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mixbit.kernels.mlx.arrays import to_device
from mixbit.kernels.reference.packing import pack, unpack
from mixbit.kernels.spec import DenseTensor, Matrix, QuantizedTensor

# Detours around MLX 0.32.4's CUDA build, each for a failure of the op tests there: it has no 1-bit codes, its
# float32 product of more than 32 rows cannot be launched with groups of 128, and its gather_mm of dense
# experts was wrong once it was told that the indices are sorted.
_CUDA = mx.cuda.is_available()
_CUDA_ROWS = 32


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
        if _CUDA and x.dtype == mx.float32 and self.group_size == 128 and x.size > _CUDA_ROWS * x.shape[-1]:
            return x @ self._expanded().T
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

    def _expanded(self) -> mx.array:
        return mx.dequantize(self.codes, self.scales, self.biases, group_size=self.group_size, bits=self.bits)


@dataclass(frozen=True, eq=False)
class DenseWeight:
    """Values in the dtype of the activations."""

    data: mx.array

    def apply(self, x: mx.array) -> mx.array:
        """x [..., in] -> [..., out]."""
        return x @ self.data.T

    def gather(self, x: mx.array, experts: mx.array, *, ordered: bool) -> mx.array:
        """See Weight.gather."""
        matrices = self.data.swapaxes(-1, -2)
        return mx.gather_mm(x, matrices, rhs_indices=experts, sorted_indices=ordered and not _CUDA)

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
            widened = _CUDA and matrix.bits == 1
            return QuantizedWeight(
                self._widened(matrix.weight) if widened else self._place(matrix.weight, None),
                self._place(matrix.scales, self.dtype),
                self._place(matrix.biases, self.dtype),
                2 if widened else matrix.bits,
                matrix.group_size,
            )
        return DenseWeight(self._place(matrix.data, self.dtype))

    def vector(self, tensor: DenseTensor, dtype: mx.Dtype | None = None) -> mx.array:
        """A dense tensor on the device, in `dtype` or else the dtype of the activations."""
        return self._place(tensor.data, self.dtype if dtype is None else dtype)

    def _widened(self, words: npt.NDArray[np.uint32]) -> mx.array:
        """1-bit codes as 2-bit ones: the same values in twice the memory."""
        key = (words.ctypes.data, words.shape, "widened")
        if key not in self._placed:
            self._placed[key] = to_device(pack(unpack(words, 1), 2))
        return self._placed[key]

    def _place(self, array: npt.NDArray[Any], dtype: mx.Dtype | None) -> mx.array:
        key = (array.ctypes.data, array.shape, array.dtype, dtype)
        if key not in self._placed:
            placed = to_device(np.ascontiguousarray(array))
            if dtype is not None:
                placed = placed.astype(dtype)
            mx.eval(placed)  # now, so that no more than one array is held twice
            self._placed[key] = placed
        return self._placed[key]
