"""Gated delta net with stock MLX operations: one step of the recurrence, or chunks in matrix form.

In a chunk of C tokens with decays g, let G_t = g_1 ... g_t. The rank-one updates u_t of the memory S obey
    u_t = beta_t (v_t - G_t S k_t - sum_{i<t} (G_t / G_i) (k_t . k_i) u_i),
which is a unit lower triangular system (I + A) U = rhs; A does not depend on S, so it is inverted for all
chunks at once, and only a few products a chunk remain in sequence. (arXiv:2412.06464, section 3.3.)
"""

from __future__ import annotations

from functools import reduce

import mlx.core as mx

from mixbit.kernels import ops
from mixbit.kernels.mlx.arrays import Values, heads_of
from mixbit.kernels.mlx.feed_forward import silu
from mixbit.kernels.mlx.operation import Binding
from mixbit.kernels.mlx.rows import Norm
from mixbit.kernels.mlx.step import Group, Step

QK_EPS = 1e-6  # added to the sum of squares of q and k, as transformers does
_CHUNK = 64


class GatedDelta:
    """Short convolution, gates, recurrence and gated norm. All but its ends is in float32."""

    def __init__(self, node: ops.GatedDelta, binding: Binding) -> None:
        spec, weights = node.spec, binding.weights
        self.node, self.spec = node, spec
        self.pool = binding.state_pools[node.cache]
        self.taps = weights.vector(spec.conv, mx.float32).T
        self.rate = -mx.exp(weights.vector(spec.a_log, mx.float32))
        self.dt_bias = weights.vector(spec.dt_bias, mx.float32)
        self.norm = Norm(spec.norm, binding, mx.float32)

    def __call__(self, step: Step, values: Values) -> None:
        """Advance the state of every sequence."""
        node, spec = self.node, self.spec
        ratio = spec.value_heads // spec.key_heads
        rows = step.tokens.shape[0]
        q = heads_of(node.q, values, spec.key_heads, spec.key_dim).reshape(rows, -1)
        k = heads_of(node.k, values, spec.key_heads, spec.key_dim).reshape(rows, -1)
        v = heads_of(node.v, values, spec.key_heads, ratio * spec.value_dim).reshape(rows, -1)
        z = heads_of(node.z, values, spec.key_heads, ratio * spec.value_dim)
        b = heads_of(node.b, values, spec.key_heads, ratio).reshape(rows, -1).astype(mx.float32)
        a = heads_of(node.a, values, spec.key_heads, ratio).reshape(rows, -1).astype(mx.float32)

        inputs = mx.concatenate([q, k, v], axis=-1)
        log_decay = self.rate * mx.logaddexp(a + self.dt_bias, mx.array(0.0))
        beta = mx.sigmoid(b)
        outs = []
        for group in step.groups:
            shape = (len(group.slots), group.new, -1)
            parts = (part[group.rows].reshape(shape) for part in (inputs, log_decay, beta))
            outs.append(self._advance(group, *parts))
        out = self.norm(mx.concatenate(outs)) * silu(z.reshape(rows, -1, spec.value_dim).astype(mx.float32))
        values[node.out.index] = out.reshape(rows, -1).astype(inputs.dtype)

    def _advance(self, group: Group, inputs: mx.array, log_decay: mx.array, beta: mx.array) -> mx.array:
        """Advance the group's states.

        inputs: [sequences, new, channels]; log_decay, beta: [sequences, new, value_heads].
        Returns [sequences * new, value_heads, value_dim].
        """
        spec = self.spec
        conv, memory = self.pool.read(group)
        window = mx.concatenate([conv, inputs], axis=1)
        q, k, v = self._mix(window, group.new)
        recur = recur_once if group.new == 1 else recur_in_chunks
        out, memory = recur(q, k, v, log_decay.swapaxes(1, 2), beta.swapaxes(1, 2), memory)
        # A contiguous copy: a view would keep the whole window in memory.
        self.pool.write(group, mx.contiguous(window[:, group.new :]), memory)
        return out.swapaxes(1, 2).reshape(-1, spec.value_heads, spec.value_dim)

    def _mix(self, window: mx.array, new: int) -> tuple[mx.array, mx.array, mx.array]:
        """Convolution and SiLU, then q, k, v [sequences, value_heads, new, dim], q and k normalised."""
        spec = self.spec
        window = window.astype(mx.float32)
        taps = range(spec.kernel)
        mixed = silu(reduce(mx.add, (window[:, tap : tap + new] * self.taps[tap] for tap in taps)))
        keys = spec.key_heads * spec.key_dim
        q, k, v = (
            part.reshape(len(part), new, -1, width).swapaxes(1, 2)
            for part, width in zip(
                mx.split(mixed, [keys, 2 * keys], axis=-1),
                (spec.key_dim, spec.key_dim, spec.value_dim),
                strict=True,
            )
        )
        q = mx.fast.rms_norm(q, None, QK_EPS / spec.key_dim) / spec.key_dim
        k = mx.fast.rms_norm(k, None, QK_EPS / spec.key_dim) / spec.key_dim**0.5
        ratio = spec.value_heads // spec.key_heads
        return mx.repeat(q, ratio, axis=1), mx.repeat(k, ratio, axis=1), v


def recur_once(
    q: mx.array, k: mx.array, v: mx.array, log_decay: mx.array, beta: mx.array, memory: mx.array
) -> tuple[mx.array, mx.array]:
    """The gated delta rule for one token; shapes as in recur_in_chunks with new = 1."""
    memory = memory * mx.exp(log_decay)[..., None]
    delta = beta[..., None] * (v - k @ memory.swapaxes(-1, -2))
    memory = memory + delta.swapaxes(-1, -2) * k
    return q @ memory.swapaxes(-1, -2), memory


def recur_in_chunks(
    q: mx.array, k: mx.array, v: mx.array, log_decay: mx.array, beta: mx.array, memory: mx.array
) -> tuple[mx.array, mx.array]:
    """The gated delta rule for many tokens; returns (out like v, memory).

    q, k: [sequences, heads, new, key_dim]; v: [..., new, value_dim]; log_decay, beta: [..., new];
    memory: [sequences, heads, value_dim, key_dim]. All float32.
    """
    new = v.shape[2]
    size = min(_CHUNK, 1 << (new - 1).bit_length())
    count = -(-new // size)

    def chunks(x: mx.array) -> mx.array:
        """[sequences, heads, count, size, ...]; padding (no decay, beta 0) leaves the memory as it is."""
        padding = [(0, 0), (0, 0), (0, count * size - new), *[(0, 0)] * (x.ndim - 3)]
        return mx.pad(x, padding).reshape(*x.shape[:2], count, size, *x.shape[3:])

    q, k, v, log_decay, beta = (chunks(x) for x in (q, k, v, log_decay, beta))
    total = mx.cumsum(log_decay, axis=-1)
    kept = mx.tril(mx.exp(mx.minimum(total[..., :, None] - total[..., None, :], 0)))
    since_start, to_end = mx.exp(total)[..., None], mx.exp(total[..., -1:] - total)[..., None]

    inverse = invert_unit_lower(mx.tril(beta[..., None] * kept * (k @ k.swapaxes(-1, -2)), -1))
    fresh = inverse @ (beta[..., None] * v)
    recalled = inverse @ (beta[..., None] * since_start * k)
    within = kept * (q @ k.swapaxes(-1, -2))
    q, k = q * since_start, k * to_end
    outs = []
    for n in range(count):
        update = fresh[:, :, n] - recalled[:, :, n] @ memory.swapaxes(-1, -2)
        outs.append(q[:, :, n] @ memory.swapaxes(-1, -2) + within[:, :, n] @ update)
        memory = since_start[:, :, n, -1:] * memory + update.swapaxes(-1, -2) @ k[:, :, n]
    return mx.concatenate(outs, axis=2)[:, :, :new], memory


def invert_unit_lower(lower: mx.array) -> mx.array:
    """(I + lower)^-1 for strictly lower triangular [..., n, n], n a power of two.

    By blocks of doubling size: the inverse of [[A, 0], [B, D]] has -D^-1 B A^-1 in place of B. Stable, unlike
    the series I - L + L^2 - ..., whose terms grow when keys resemble each other.
    """
    size = lower.shape[-1]
    index = mx.arange(size)
    inverse = mx.broadcast_to(mx.eye(size), lower.shape)
    block = 1
    while block < size:
        row, column = (index // block)[:, None], (index // block)[None, :]
        siblings = (row % 2 == 1) & (column == row - 1)
        inverse = inverse - inverse @ mx.where(siblings, lower, 0) @ inverse
        block *= 2
    return inverse
