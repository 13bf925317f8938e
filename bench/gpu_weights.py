"""Models of real size with random weights that are made on the device: nothing is read, nothing is copied."""

from __future__ import annotations

import itertools
from typing import Any

import mlx.core as mx

from mixbit.kernels.mlx.weights import DenseWeight, QuantizedWeight
from mixbit.kernels.spec import DenseTensor, Matrix, QuantizedTensor


def random_matrix(shape: tuple[int, ...], bits: int, group_size: int, dtype: mx.Dtype) -> QuantizedWeight:
    """[..., out, in] whose values are even within +-sqrt(3 / in)."""
    *lead, in_dim = shape
    codes = mx.random.randint(0, 1 << 16, (*lead, in_dim * bits // 32, 2), mx.uint16).view(mx.uint32).squeeze(-1)
    reach = (3 / in_dim) ** 0.5
    groups = (*lead, in_dim // group_size)
    scales, biases = mx.full(groups, 2 * reach / (2**bits - 1), dtype), mx.full(groups, -reach, dtype)
    mx.eval(codes, scales, biases)
    return QuantizedWeight(codes, scales, biases, bits, group_size)


class RandomWeights:
    """Stands for kernels.mlx.weights.Weights: takes shapes from the program and makes values on the device."""

    def __init__(self, dtype: mx.Dtype) -> None:
        self.dtype = dtype
        self._made: dict[str, Any] = {}
        self._count = itertools.count()

    def matrix(self, matrix: Matrix) -> QuantizedWeight | DenseWeight:
        if matrix.name not in self._made:
            assert isinstance(matrix, QuantizedTensor)
            shape = (*matrix.weight.shape[:-1], matrix.in_dim)
            self._made[matrix.name] = random_matrix(shape, matrix.bits, matrix.group_size, self.dtype)
        made: QuantizedWeight = self._made[matrix.name]
        return made

    def vector(self, tensor: DenseTensor, dtype: mx.Dtype | None = None) -> mx.array:
        return (1 + 0.1 * mx.random.normal(tensor.data.shape)).astype(dtype or self.dtype)
