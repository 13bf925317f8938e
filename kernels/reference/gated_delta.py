"""Gated delta net: short convolution, gates, recurrence, gated norm (Qwen3-Next's linear attention).

The recurrence is the gated delta rule of arXiv:2412.06464.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mixbit.kernels.executor import Batch, CacheConfig
from mixbit.kernels.ops import GatedDeltaSpec
from mixbit.kernels.reference.activations import sigmoid, silu, softplus
from mixbit.kernels.reference.matrix import Float32Array
from mixbit.kernels.reference.norm import rms_norm, unit_rms

QK_EPS = 1e-6  # added to the sum of squares of q and k, as transformers does


@dataclass(frozen=True, eq=False)
class StatePool:
    """Recurrent state of one layer.

    conv: [slots, kernel - 1, channels], the last inputs of the convolution.
    memory: [slots, value_heads, value_dim, key_dim].
    """

    conv: Float32Array
    memory: Float32Array

    @classmethod
    def zeros(cls, spec: GatedDeltaSpec, cache: CacheConfig) -> StatePool:
        """A pool of zero states."""
        conv = (cache.state_slots, spec.kernel - 1, spec.channels)
        memory = (cache.state_slots, spec.value_heads, spec.value_dim, spec.key_dim)
        return cls(np.zeros(conv, np.float32), np.zeros(memory, np.float32))


def gated_delta(
    spec: GatedDeltaSpec,
    q: Float32Array,
    k: Float32Array,
    v: Float32Array,
    z: Float32Array,
    b: Float32Array,
    a: Float32Array,
    pool: StatePool,
    batch: Batch,
) -> Float32Array:
    """Advance the states of the batch's sequences; returns [tokens, value_heads * value_dim].

    q, k: [tokens, key_heads, key_dim]. v, z: [tokens, value_heads, value_dim]. b, a: [tokens, value_heads].
    """
    tokens = len(q)
    decay = np.exp(-np.exp(spec.a_log.data.astype(np.float32)) * softplus(a + spec.dt_bias.data.astype(np.float32)))
    beta = sigmoid(b)
    inputs = np.concatenate([part.reshape(tokens, -1) for part in (q, k, v)], axis=1)
    out = np.empty_like(v)
    for s, slot in enumerate(batch.state_slots):
        rows = slice(batch.query_starts[s], batch.query_starts[s + 1])
        if batch.context_lengths[s] == 0:
            pool.conv[slot] = 0
            pool.memory[slot] = 0
        mixed = convolve(spec, inputs[rows], pool.conv[slot])
        qs, ks, vs = split_channels(spec, mixed)
        qs = unit_rms(qs, QK_EPS / spec.key_dim) / np.float32(spec.key_dim)
        ks = unit_rms(ks, QK_EPS / spec.key_dim) / np.float32(np.sqrt(spec.key_dim))
        out[rows] = recur(qs, ks, vs, decay[rows], beta[rows], pool.memory[slot])
    return (rms_norm(spec.norm, out) * silu(z)).reshape(tokens, -1)


def convolve(spec: GatedDeltaSpec, inputs: Float32Array, state: Float32Array) -> Float32Array:
    """SiLU of the causal depthwise convolution of inputs [new, channels]; state is replaced in place."""
    taps = spec.conv.data.astype(np.float32)
    window = np.concatenate([state, inputs])
    out = np.zeros_like(inputs)
    for tap in range(spec.kernel):
        out += window[tap : tap + len(inputs)] * taps[:, tap]
    state[:] = window[len(inputs) :]
    return silu(out)


def split_channels(spec: GatedDeltaSpec, mixed: Float32Array) -> tuple[Float32Array, Float32Array, Float32Array]:
    """q, k [new, key_heads, key_dim] and v [new, value_heads, value_dim] of mixed [new, channels]."""
    keys = spec.key_heads * spec.key_dim
    q, k, v = np.split(mixed, [keys, 2 * keys], axis=1)
    key_shape = (len(mixed), spec.key_heads, spec.key_dim)
    return q.reshape(key_shape), k.reshape(key_shape), v.reshape(len(mixed), spec.value_heads, spec.value_dim)


def recur(
    q: Float32Array, k: Float32Array, v: Float32Array, decay: Float32Array, beta: Float32Array, memory: Float32Array
) -> Float32Array:
    """The gated delta rule, token by token; memory [value_heads, value_dim, key_dim] is updated in place.

    q, k: [new, key_heads, key_dim]. v: [new, value_heads, value_dim]. decay, beta: [new, value_heads].
    Returns what q reads from the memory after each token: [new, value_heads, value_dim].
    """
    repeats = v.shape[1] // k.shape[1]
    q, k = np.repeat(q, repeats, axis=1), np.repeat(k, repeats, axis=1)
    out = np.empty_like(v)
    for t in range(len(v)):
        memory *= decay[t][:, None, None]
        recalled = np.einsum("hvk,hk->hv", memory, k[t])
        delta = beta[t][:, None] * (v[t] - recalled)
        memory += delta[:, :, None] * k[t][:, None, :]
        out[t] = np.einsum("hvk,hk->hv", memory, q[t])
    return out
