"""Attention with stock MLX operations: pages are gathered, then one fused call for each group."""

from __future__ import annotations

import mlx.core as mx

from mixbit.kernels import ops
from mixbit.kernels.mlx.arrays import Values, heads_of, to_device
from mixbit.kernels.mlx.operation import Binding
from mixbit.kernels.mlx.rows import Norm
from mixbit.kernels.mlx.step import Group, Step


class Rope:
    """Rotary embedding of the first values of each head."""

    def __init__(self, rope: ops.Rope) -> None:
        self.dims = 2 * len(rope.inv_freq)
        self.periods = to_device(1 / rope.inv_freq)
        self.scale = rope.scale

    def __call__(self, x: mx.array, positions: mx.array) -> mx.array:
        """x [tokens, heads, head_dim], each token at its own position."""
        if self.scale != 1:  # of cos and sin: the rotation is linear, so it can be applied before
            x = mx.concatenate([x[..., : self.dims] * self.scale, x[..., self.dims :]], axis=-1)
        # Each token is a batch entry of length one, since positions are given for batch entries.
        return mx.fast.rope(
            x[:, :, None],
            self.dims,
            traditional=False,
            base=None,
            scale=1.0,
            offset=positions,
            freqs=self.periods,
        ).squeeze(2)


class Attention:
    """Causal grouped-query attention over the paged KV pool."""

    def __init__(self, node: ops.Attention, binding: Binding) -> None:
        self.node, self.spec = node, node.spec
        self.pool = binding.kv_pools[node.cache]
        self.rope = None if self.spec.rope is None else Rope(self.spec.rope)
        self.q_norm = None if self.spec.q_norm is None else Norm(self.spec.q_norm, binding)
        self.k_norm = None if self.spec.k_norm is None else Norm(self.spec.k_norm, binding)

    def __call__(self, step: Step, values: Values) -> None:
        """Write the new keys and values, then attend."""
        node, spec = self.node, self.spec
        q = heads_of(node.q, values, spec.heads, spec.head_dim)
        k = heads_of(node.k, values, spec.kv_heads, spec.head_dim)
        v = heads_of(node.v, values, spec.kv_heads, spec.head_dim)
        q = q if self.q_norm is None else self.q_norm(q)
        k = k if self.k_norm is None else self.k_norm(k)
        if self.rope is not None:
            q, k = self.rope(q, step.positions), self.rope(k, step.positions)
        self.pool.write(step.places, k, v)
        out = mx.concatenate([self._attend(q[group.rows], group) for group in step.groups])
        if node.gate is not None:
            out = out * mx.sigmoid(heads_of(node.gate, values, spec.heads, spec.head_dim))
        values[node.out.index] = out.reshape(out.shape[0], -1)

    def _attend(self, q: mx.array, group: Group) -> mx.array:
        """q [rows of the group, heads, head_dim] -> the same shape."""
        keys, cached = self.pool.read(group)
        queries = q.reshape(len(group.slots), group.new, *q.shape[1:]).swapaxes(1, 2)
        out = mx.fast.scaled_dot_product_attention(queries, keys, cached, scale=self.spec.scale, mask=group.mask)
        return out.swapaxes(1, 2).reshape(q.shape)
