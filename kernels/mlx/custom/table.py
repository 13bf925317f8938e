"""The table of our own kernels. Each operation keeps the stock one for what its kernels do not serve."""

from __future__ import annotations

from functools import partial

import mlx.core as mx

from mixbit.kernels import ops
from mixbit.kernels.mlx import feed_forward, rows
from mixbit.kernels.mlx import gated_delta as stock_delta
from mixbit.kernels.mlx.arrays import Values
from mixbit.kernels.mlx.custom import gated_delta, prefill_delta
from mixbit.kernels.mlx.custom.attention import Attention
from mixbit.kernels.mlx.custom.experts import MAX_TOP_K, Experts, QuantizedMlp, Router
from mixbit.kernels.mlx.custom.launch import Launcher
from mixbit.kernels.mlx.custom.matvec import MAX_TOKENS, BatchedMatvec, applies
from mixbit.kernels.mlx.custom.norm import AddNorm as AddNormKernel
from mixbit.kernels.mlx.custom.prefill_experts import PrefillExperts
from mixbit.kernels.mlx.operation import Binding, Gathers, Table
from mixbit.kernels.mlx.step import Step
from mixbit.kernels.mlx.stock import STOCK
from mixbit.kernels.mlx.weights import Weight

_MAX_PAIRS = 256
"""(token, expert) pairs up to which each is better done by itself than sorted by expert."""


def custom_table(launcher: Launcher) -> Table:
    """Our kernels where they apply, stock operations elsewhere."""
    own = {
        ops.BatchMatvec: BatchMatvec,
        ops.Moe: Moe,
        ops.AddNorm: AddNorm,
        ops.Attention: Attention,
        ops.GatedDelta: GatedDelta,
    }
    return {**STOCK, **{kind: partial(operation, launcher) for kind, operation in own.items()}}


class Matrices:
    """Matrices on one input: the quantized ones in one launch, others with stock operations."""

    def __init__(self, launcher: Launcher, weights: list[Weight], dtype: mx.Dtype) -> None:
        self.weights = weights
        self.own = [i for i, weight in enumerate(weights) if applies(weight)]
        taken = [weight for weight in weights if applies(weight)]
        self.batched = BatchedMatvec(launcher, taken, dtype) if taken else None

    def __call__(self, x: mx.array) -> list[mx.array]:
        """x [tokens, in] -> [tokens, out] for each matrix."""
        if self.batched is None or x.shape[0] > MAX_TOKENS:
            return [weight.apply(x) for weight in self.weights]
        own = dict(zip(self.own, self.batched(x), strict=True))
        return [own[i] if i in own else weight.apply(x) for i, weight in enumerate(self.weights)]


class BatchMatvec:
    """Matrices of any width on one input."""

    def __init__(self, launcher: Launcher, node: ops.BatchMatvec, binding: Binding) -> None:
        self.stock = rows.BatchMatvec(node, binding)
        self.matrices = Matrices(launcher, list(self.stock.matrices), binding.weights.dtype)

    def __call__(self, step: Step, values: Values) -> None:
        """One output for each matrix."""
        stock = self.stock
        outs = self.matrices(values[stock.x])
        for out, y, bias in zip(stock.outs, outs, stock.biases, strict=True):
            values[out] = y if bias is None else y + bias


class AddNorm:
    """Residual sum and its norm, in one launch."""

    def __init__(self, launcher: Launcher, node: ops.AddNorm, binding: Binding) -> None:
        self.stock = rows.AddNorm(node, binding)
        self.kernel = AddNormKernel(launcher, self.stock.norm.weight, self.stock.norm.eps)

    def __call__(self, step: Step, values: Values) -> None:
        """x + delta, and its norm."""
        stock = self.stock
        values[stock.total], values[stock.out] = self.kernel(values[stock.x], values[stock.delta])


class GatedDelta:
    """One token a sequence in one launch, several in four (on Metal)."""

    def __init__(self, launcher: Launcher, node: ops.GatedDelta, binding: Binding) -> None:
        self.stock = stock = stock_delta.GatedDelta(node, binding)
        self.decode = gated_delta.DeltaStep(launcher, node, stock) if gated_delta.applies(node.spec) else None
        self.prefill = None
        if launcher.language == "metal" and prefill_delta.applies(node.spec):
            self.prefill = prefill_delta.PrefillDelta(launcher, node, stock)

    def __call__(self, step: Step, values: Values) -> None:
        """Advance the state of every sequence."""
        pool, outs = self.stock.pool, []
        served = [(self.decode if group.new == 1 else self.prefill, group) for group in step.groups]
        if any(advance is None for advance, _ in served):
            self.stock(step, values)
            return
        for advance, group in served:
            assert advance is not None
            out, conv, memory = advance(values, group, *pool.read(group))
            pool.write(group, conv, memory)
            outs.append(out)
        values[self.stock.node.out.index] = outs[0] if len(outs) == 1 else mx.concatenate(outs)


class Moe:
    """Mixture of experts: in four launches for few tokens, by tiles of tokens of one expert for many (on Metal)."""

    def __init__(self, launcher: Launcher, node: ops.Moe, binding: Binding) -> None:
        self.stock = stock = feed_forward.Moe(node, binding)
        dtype = binding.weights.dtype
        experts = _quantized(stock.experts)
        shared = None if stock.shared is None else _quantized(stock.shared)
        served = experts is not None and (stock.shared is None) == (shared is None) and stock.top_k <= MAX_TOP_K
        self.experts = None
        self.prefill = None
        if experts is not None and launcher.language == "metal":
            self.prefill = PrefillExperts(launcher, experts, dtype)
        if experts is not None and served:
            gates = [stock.router] if stock.shared_gate is None else [stock.router, stock.shared_gate]
            self.gates = Matrices(launcher, gates, dtype)
            self.router = Router(launcher, stock.top_k, normalize=stock.normalize)
            self.experts = Experts(launcher, experts, shared, dtype, gated=stock.shared_gate is not None)

    def __call__(self, step: Step, values: Values) -> None:
        """Route, apply the chosen experts and the shared one."""
        x = values[self.stock.x]
        if self.experts is None or x.shape[0] * self.stock.top_k > _MAX_PAIRS:
            routed = self.stock.routed if self.prefill is None else self.prefill
            values[self.stock.out] = self.stock.combined(x, routed)
            return
        logits, *shared_logit = self.gates(x)
        experts, weights = self.router(logits)
        values[self.stock.out] = self.experts(x, experts, weights, *shared_logit)


def _quantized(mlp: Gathers) -> QuantizedMlp | None:
    """The feed-forward for our kernels, or None if they do not take all of its matrices, or these are in slots."""
    if not isinstance(mlp, feed_forward.FeedForward):
        return None
    if applies(mlp.gate) and applies(mlp.up) and applies(mlp.down):
        return QuantizedMlp(mlp.gate, mlp.up, mlp.down)
    return None
