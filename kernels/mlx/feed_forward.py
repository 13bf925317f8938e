"""Mlp and Moe with stock MLX operations."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from mixbit.kernels import ops
from mixbit.kernels.mlx.arrays import Values
from mixbit.kernels.mlx.operation import Binding, Gathers
from mixbit.kernels.mlx.step import Step
from mixbit.kernels.mlx.weights import Weight

# From so many (token, expert) pairs on, sorting them by expert pays.
_SORT_FROM = 64


def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x)."""
    return x * mx.sigmoid(x)


class FeedForward:
    """down(silu(gate(x)) * up(x)), for one matrix each or for gathered experts."""

    def __init__(self, gate: Weight, up: Weight, down: Weight) -> None:
        self.gate, self.up, self.down = gate, up, down

    @classmethod
    def of(cls, spec: ops.MlpSpec, binding: Binding) -> FeedForward:
        """With all of its matrices on the device."""
        return cls(*(binding.weights.matrix(matrix) for matrix in (spec.gate, spec.up, spec.down)))

    def apply(self, x: mx.array) -> mx.array:
        """x [rows, dim] -> [rows, dim]."""
        return self.down.apply(silu(self.gate.apply(x)) * self.up.apply(x))

    def gather(self, x: mx.array, experts: mx.array) -> mx.array:
        """x [rows, dim] through experts [rows, k] -> [rows, k, dim]."""
        rows, k = experts.shape
        if rows * k < _SORT_FROM:
            return self._gather(x[:, None, None], experts, ordered=False).squeeze(-2)
        flat = experts.flatten()
        order = mx.argsort(flat)
        out = self._gather(x[order // k][:, None], flat[order], ordered=True).squeeze(-2)
        return out[mx.argsort(order)].reshape(rows, k, -1)

    def _gather(self, x: mx.array, experts: mx.array, *, ordered: bool) -> mx.array:
        gate = self.gate.gather(x, experts, ordered=ordered)
        up = self.up.gather(x, experts, ordered=ordered)
        return self.down.gather(silu(gate) * up, experts, ordered=ordered)


class Mlp:
    """SwiGLU feed-forward."""

    def __init__(self, node: ops.Mlp, binding: Binding) -> None:
        self.x, self.out = node.x.index, node.out.index
        self.feed_forward = FeedForward.of(node.spec, binding)

    def __call__(self, step: Step, values: Values) -> None:
        """One feed-forward for all rows."""
        values[self.out] = self.feed_forward.apply(values[self.x])


class Moe:
    """Mixture of experts with an optional shared one."""

    def __init__(self, node: ops.Moe, binding: Binding) -> None:
        spec, weights = node.spec, binding.weights
        self.x, self.out = node.x.index, node.out.index
        self.top_k, self.normalize = spec.top_k, spec.normalize
        self.router = weights.matrix(spec.router)
        slots = binding.slots.get(node)
        self.experts: Gathers = FeedForward.of(spec.experts, binding) if slots is None else slots
        self.shared = None if spec.shared is None else FeedForward.of(spec.shared, binding)
        self.shared_gate = None if spec.shared_gate is None else weights.matrix(spec.shared_gate)

    def __call__(self, step: Step, values: Values) -> None:
        """Route, gather the experts, add the shared one."""
        x = values[self.x]
        values[self.out] = self.combined(x, self.routed)

    def routed(self, x: mx.array, experts: mx.array, weights: mx.array) -> mx.array:
        """x [tokens, dim] through its experts [tokens, top_k], summed by their weights -> [tokens, dim]."""
        return (self.experts.gather(x, experts) * weights[..., None].astype(x.dtype)).sum(axis=1)

    def combined(self, x: mx.array, routed: Callable[[mx.array, mx.array, mx.array], mx.array]) -> mx.array:
        """What `routed` makes of the choice, plus the shared expert."""
        out = routed(x, *self._route(x))
        if self.shared is not None:
            shared = self.shared.apply(x)
            out = out + (shared if self.shared_gate is None else mx.sigmoid(self.shared_gate.apply(x)) * shared)
        return out

    def _route(self, x: mx.array) -> tuple[mx.array, mx.array]:
        logits = self.router.apply(x).astype(mx.float32)
        # A full, stable sort: equal logits keep the lower expert first, which argpartition does not.
        experts = mx.argsort(-logits, axis=-1)[:, : self.top_k]
        weights = mx.take_along_axis(mx.softmax(logits, axis=-1), experts, axis=-1)
        if self.normalize:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        return experts, weights
