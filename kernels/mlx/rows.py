"""Embed, SelectRows, RmsNorm, AddNorm and BatchMatvec with stock MLX operations."""

from __future__ import annotations

import mlx.core as mx

from mixbit.kernels import ops
from mixbit.kernels.mlx.arrays import Values
from mixbit.kernels.mlx.operation import Binding
from mixbit.kernels.mlx.step import Step


class Norm:
    """RMS norm of the last dimension, accumulated in float32."""

    def __init__(self, norm: ops.Norm, binding: Binding, dtype: mx.Dtype | None = None) -> None:
        self.weight = binding.weights.vector(norm.weight, dtype)
        self.eps = norm.eps

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., dim] -> the same shape."""
        return mx.fast.rms_norm(x, self.weight, self.eps)


class Embed:
    """Rows of a table."""

    def __init__(self, node: ops.Embed, binding: Binding) -> None:
        self.out = node.out.index
        self.table = binding.weights.matrix(node.table)

    def __call__(self, step: Step, values: Values) -> None:
        """table[tokens]."""
        values[self.out] = self.table.rows(step.tokens)


class SelectRows:
    """The rows whose logits are wanted."""

    def __init__(self, node: ops.SelectRows, binding: Binding) -> None:
        self.x, self.out = node.x.index, node.out.index

    def __call__(self, step: Step, values: Values) -> None:
        """x[logit_rows]."""
        values[self.out] = values[self.x][step.logit_rows]


class RmsNorm:
    """Norm of a value."""

    def __init__(self, node: ops.RmsNorm, binding: Binding) -> None:
        self.x, self.out = node.x.index, node.out.index
        self.norm = Norm(node.norm, binding)

    def __call__(self, step: Step, values: Values) -> None:
        """norm(x)."""
        values[self.out] = self.norm(values[self.x])


class AddNorm:
    """Residual sum and its norm."""

    def __init__(self, node: ops.AddNorm, binding: Binding) -> None:
        self.x, self.delta = node.x.index, node.delta.index
        self.total, self.out = node.total.index, node.out.index
        self.norm = Norm(node.norm, binding)

    def __call__(self, step: Step, values: Values) -> None:
        """x + delta, and its norm."""
        total = values[self.x] + values[self.delta]
        values[self.total] = total
        values[self.out] = self.norm(total)


class BatchMatvec:
    """Matrices of any width on one input, one stock operation for each."""

    def __init__(self, node: ops.BatchMatvec, binding: Binding) -> None:
        self.x = node.x.index
        self.outs = [out.index for out in node.outs]
        self.matrices = [binding.weights.matrix(spec.matrix) for spec in node.specs]
        self.biases = [None if spec.bias is None else binding.weights.vector(spec.bias) for spec in node.specs]

    def __call__(self, step: Step, values: Values) -> None:
        """One output for each matrix."""
        x = values[self.x]
        for out, matrix, bias in zip(self.outs, self.matrices, self.biases, strict=True):
            y = matrix.apply(x)
            values[out] = y if bias is None else y + bias
