"""One token of the gated delta net in one launch."""

from __future__ import annotations

import mlx.core as mx

from mixbit.kernels import ops
from mixbit.kernels.mlx import gated_delta as stock
from mixbit.kernels.mlx.arrays import Values
from mixbit.kernels.mlx.custom.launch import Launcher, Template, float_bits
from mixbit.kernels.mlx.step import Group

_THREADS = 512
_ROWS = 4
_INPUTS = ("q", "k", "v", "z", "b", "a")


def applies(spec: ops.GatedDeltaSpec) -> bool:
    """Whether the kernel takes these sizes."""
    return spec.kernel > 1 and spec.key_dim % 4 == 0


def sizes(node: ops.GatedDelta) -> Template:
    """What the text of all kernels of this operation expects: the sizes of heads, and where their columns lie."""
    spec = node.spec
    columns = {"Q": node.q, "K": node.k, "V": node.v, "Z": node.z, "B": node.b, "A": node.a}
    return [
        *(("KEY_HEADS", spec.key_heads), ("VALUE_HEADS", spec.value_heads)),
        *(("KEY_DIM", spec.key_dim), ("VALUE_DIM", spec.value_dim), ("KERNEL", spec.kernel)),
        *(("QK_EPS", float_bits(stock.QK_EPS)), ("NORM_EPS", float_bits(spec.norm.eps))),
        *(
            pair
            for name, column in columns.items()
            for pair in (
                (f"{name}_ROW", column.value.dim),
                (f"{name}_OFFSET", column.offset),
                (f"{name}_STRIDE", column.stride),
            )
        ),
    ]


def rows_of(node: ops.GatedDelta, values: Values, group: Group) -> list[mx.array]:
    """The group's rows of the values that hold q, k, v, z, b and a."""
    found = [values[column.value.index] for column in (node.q, node.k, node.v, node.z, node.b, node.a)]
    count = group.rows.stop - group.rows.start
    return [x if count == x.shape[0] else x[group.rows] for x in found]


class DeltaStep:
    """Convolution, gates, recurrence and gated norm of one token a sequence."""

    def __init__(self, launcher: Launcher, node: ops.GatedDelta, layer: stock.GatedDelta) -> None:
        """layer: the stock operation, for its weights."""
        spec = node.spec
        self._node = node
        self._weights = [mx.contiguous(layer.taps), layer.rate, layer.dt_bias, layer.norm.weight]
        self._width = spec.value_heads * spec.value_dim
        self._template: Template = [*sizes(node), ("THREADS", _THREADS), ("ROWS", _ROWS)]
        inputs = [*_INPUTS, "conv", "memory", "taps", "rate", "dt_bias", "weight"]
        self._kernel = launcher.kernel("gated_delta", inputs, ["out", "new_conv", "new_memory"])
        self._heads = spec.value_heads

    def __call__(
        self, values: Values, group: Group, conv: mx.array, memory: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """(out [sequences, value_heads * value_dim], conv, memory) after the group's tokens."""
        out, conv, memory = self._kernel(
            inputs=[*rows_of(self._node, values, group), conv, memory, *self._weights],
            template=[("T", conv.dtype), *self._template],
            grid=(self._heads * _THREADS, len(group.slots), 1),
            threadgroup=(_THREADS, 1, 1),
            output_shapes=[(len(group.slots), self._width), conv.shape, memory.shape],
            output_dtypes=[conv.dtype, conv.dtype, mx.float32],
        )
        return out, conv, memory
