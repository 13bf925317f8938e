"""One token of the gated delta net in one launch."""

from __future__ import annotations

import mlx.core as mx

from mixbit.kernels import ops
from mixbit.kernels.mlx import gated_delta as stock
from mixbit.kernels.mlx.arrays import Values
from mixbit.kernels.mlx.custom.launch import Launcher, Template, float_bits
from mixbit.kernels.mlx.operation import Binding
from mixbit.kernels.mlx.step import Group, Step

_THREADS = 512
_ROWS = 4
_INPUTS = ("q", "k", "v", "z", "b", "a")


def applies(spec: ops.GatedDeltaSpec) -> bool:
    """Whether the kernel takes these sizes."""
    return spec.kernel > 1 and spec.key_dim % 4 == 0


class DeltaStep:
    """Convolution, gates, recurrence and gated norm of one token a sequence."""

    def __init__(self, launcher: Launcher, node: ops.GatedDelta, layer: stock.GatedDelta) -> None:
        """layer: the stock operation, for its weights."""
        spec = node.spec
        columns = [node.q, node.k, node.v, node.z, node.b, node.a]
        self._values = [column.value.index for column in columns]
        self._weights = [mx.contiguous(layer.taps), layer.rate, layer.dt_bias, layer.norm.weight]
        self._width = spec.value_heads * spec.value_dim
        self._template: Template = [
            *(("KEY_HEADS", spec.key_heads), ("VALUE_HEADS", spec.value_heads)),
            *(("KEY_DIM", spec.key_dim), ("VALUE_DIM", spec.value_dim), ("KERNEL", spec.kernel)),
            *(("QK_EPS", float_bits(stock.QK_EPS)), ("NORM_EPS", float_bits(spec.norm.eps))),
            *(("THREADS", _THREADS), ("ROWS", _ROWS)),
            *(
                pair
                for name, column in zip("QKVZBA", columns, strict=True)
                for pair in (
                    (f"{name}_ROW", column.value.dim),
                    (f"{name}_OFFSET", column.offset),
                    (f"{name}_STRIDE", column.stride),
                )
            ),
        ]
        inputs = [*_INPUTS, "conv", "memory", "taps", "rate", "dt_bias", "weight"]
        self._kernel = launcher.kernel("gated_delta", inputs, ["out", "new_conv", "new_memory"])
        self._heads = spec.value_heads

    def __call__(
        self, values: Values, group: Group, conv: mx.array, memory: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """(out [sequences, value_heads * value_dim], conv, memory) after the group's tokens."""
        rows = [values[index] for index in self._values]
        taken = [x if len(group.slots) == x.shape[0] else x[group.rows] for x in rows]
        out, conv, memory = self._kernel(
            inputs=[*taken, conv, memory, *self._weights],
            template=[("T", conv.dtype), *self._template],
            grid=(self._heads * _THREADS, len(group.slots), 1),
            threadgroup=(_THREADS, 1, 1),
            output_shapes=[(len(group.slots), self._width), conv.shape, memory.shape],
            output_dtypes=[conv.dtype, conv.dtype, mx.float32],
        )
        return out, conv, memory


class GatedDelta:
    """Decode through our kernel; groups of several new tokens through the stock operation."""

    def __init__(self, launcher: Launcher, node: ops.GatedDelta, binding: Binding) -> None:
        self.stock = stock.GatedDelta(node, binding)
        self.decode = DeltaStep(launcher, node, self.stock) if applies(node.spec) else None

    def __call__(self, step: Step, values: Values) -> None:
        """Advance the state of every sequence."""
        if self.decode is None or any(group.new > 1 for group in step.groups):
            self.stock(step, values)
            return
        pool, outs = self.stock.pool, []
        for group in step.groups:
            out, conv, memory = self.decode(values, group, *pool.read(group))
            pool.write(group, conv, memory)
            outs.append(out)
        values[self.stock.node.out.index] = outs[0] if len(outs) == 1 else mx.concatenate(outs)
