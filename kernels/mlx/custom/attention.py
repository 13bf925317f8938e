"""Attention of one new token a sequence: three launches instead of a dozen."""

from __future__ import annotations

import mlx.core as mx

from mixbit.kernels import ops
from mixbit.kernels.mlx import attention as stock
from mixbit.kernels.mlx.arrays import Values, to_device
from mixbit.kernels.mlx.custom.launch import Launcher, Template, float_bits
from mixbit.kernels.mlx.operation import Binding
from mixbit.kernels.mlx.step import Group, Step

_SPAN = 64
"""Positions a simdgroup attends to; more where a context would need more than _PARTS simdgroups."""
_PARTS = 64
_JOIN_THREADS = 128


def _columns(name: str, columns: ops.Columns) -> list[tuple[str, int]]:
    return [
        (f"{name}_ROW", columns.value.dim),
        (f"{name}_OFFSET", columns.offset),
        (f"{name}_STRIDE", columns.stride),
    ]


def applies(spec: ops.AttentionSpec) -> bool:
    """Whether the kernels take these heads: a group of query heads must fit in registers."""
    registers = spec.heads // spec.kv_heads * spec.head_dim // 32
    return spec.head_dim % 32 == 0 and registers <= 64 and (spec.q_norm is None) == (spec.k_norm is None)


class DecodeAttention:
    """Norms, RoPE and KV write; attention in parts; their join and the gate."""

    def __init__(self, launcher: Launcher, node: ops.Attention, layer: stock.Attention) -> None:
        """layer: the stock operation, for its weights and its pool."""
        spec = node.spec
        self._node, self._pool = node, layer.pool
        self._heads, self._kv_heads, self._dim = spec.heads, spec.kv_heads, spec.head_dim
        self._shape: Template = [("HEADS", spec.heads), ("KV_HEADS", spec.kv_heads), ("HEAD_DIM", spec.head_dim)]
        self._spans: dict[int, mx.array] = {}
        self._scale = float_bits(spec.scale)

        inputs, defines, self._weights = ["q", "k", "v", "positions", "places", "keys", "cached"], [], []
        self._write_template = [*self._shape, *_columns("Q", node.q), *_columns("K", node.k), *_columns("V", node.v)]
        if layer.q_norm is not None and layer.k_norm is not None:
            inputs += ["q_weight", "k_weight"]
            self._weights += [layer.q_norm.weight, layer.k_norm.weight]
            self._write_template += [("Q_EPS", float_bits(layer.q_norm.eps)), ("K_EPS", float_bits(layer.k_norm.eps))]
            defines += ["WITH_NORM"]
        if spec.rope is not None:
            inputs += ["inv_freq"]
            self._weights += [to_device(spec.rope.inv_freq)]
            self._write_template += [("HALF", len(spec.rope.inv_freq)), ("ROPE_SCALE", float_bits(spec.rope.scale))]
            defines += ["WITH_ROPE"]
        self._write = launcher.kernel("attention_write", inputs, ["queries"], *defines)
        self._attend = launcher.kernel(
            "attention_decode",
            ["queries", "keys", "cached", "tables", "positions", "span"],
            ["part_sums", "part_totals"],
        )
        gated = [] if node.gate is None else ["gate"]
        self._join_template = [*self._shape, ("THREADS", _JOIN_THREADS)]
        self._join_template += [] if node.gate is None else _columns("GATE", node.gate)
        self._join = launcher.kernel(
            "attention_join", ["part_sums", "part_totals", *gated], ["out"], *["WITH_GATE"][: len(gated)]
        )

    def __call__(self, step: Step, values: Values) -> mx.array:
        """[tokens, heads * head_dim] for a step of one token a sequence."""
        node, tokens = self._node, step.tokens.shape[0]
        keys, cached = self._pool.arrays()
        units = self._heads + 2 * self._kv_heads
        (queries,) = self._write(
            inputs=[
                *(values[columns.value.index] for columns in (node.q, node.k, node.v)),
                *(step.positions, step.places, keys, cached, *self._weights),
            ],
            template=[("T", keys.dtype), *self._write_template],
            grid=(units * 32, tokens, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[(tokens, self._heads, self._dim)],
            output_dtypes=[keys.dtype],
        )
        outs = [self._group(step, values, group, queries) for group in step.groups]
        return outs[0] if len(outs) == 1 else mx.concatenate(outs)

    def _group(self, step: Step, values: Values, group: Group, queries: mx.array) -> mx.array:
        keys, cached = self._pool.arrays()
        count = len(group.slots)

        def rows(x: mx.array) -> mx.array:
            return x if x.shape[0] == count else x[group.rows]

        span = max(_SPAN, -(-group.context // _PARTS))
        span = 1 << (span - 1).bit_length()
        if span not in self._spans:
            self._spans[span] = mx.array([span], mx.int32)
        parts = -(-group.context // span)
        part_sums, part_totals = self._attend(
            inputs=[rows(queries), keys, cached, group.tables, rows(step.positions), self._spans[span]],
            template=[("T", keys.dtype), *self._shape, ("BLOCK", self._pool.block_size), ("SCALE", self._scale)],
            grid=(self._kv_heads * 32, count, parts),
            threadgroup=(32, 1, 1),
            output_shapes=[(count, self._heads, parts, self._dim), (count, self._heads, parts, 2)],
            output_dtypes=[mx.float32, mx.float32],
        )
        gate = [] if self._node.gate is None else [rows(values[self._node.gate.value.index])]
        (out,) = self._join(
            inputs=[part_sums, part_totals, *gate],
            template=[("T", keys.dtype), *self._join_template],
            grid=(self._heads * _JOIN_THREADS, count, 1),
            threadgroup=(_JOIN_THREADS, 1, 1),
            output_shapes=[(count, self._heads * self._dim)],
            output_dtypes=[keys.dtype],
        )
        return out


class Attention:
    """Steps of one token a sequence through our kernels, others through the stock operation."""

    def __init__(self, launcher: Launcher, node: ops.Attention, binding: Binding) -> None:
        self.stock = stock.Attention(node, binding)
        self.decode = DecodeAttention(launcher, node, self.stock) if applies(node.spec) else None

    def __call__(self, step: Step, values: Values) -> None:
        """Write the new keys and values, then attend."""
        if self.decode is None or any(group.new > 1 for group in step.groups):
            self.stock(step, values)
        else:
            values[self.stock.node.out.index] = self.decode(step, values)
