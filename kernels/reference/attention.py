"""Causal grouped-query attention over a paged KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mixbit.kernels.executor import Batch, CacheConfig
from mixbit.kernels.ops import AttentionSpec
from mixbit.kernels.reference.activations import sigmoid, softmax
from mixbit.kernels.reference.matrix import Float32Array
from mixbit.kernels.reference.norm import rms_norm
from mixbit.kernels.reference.rope import rotate


@dataclass(frozen=True, eq=False)
class KvPool:
    """Keys and values of one layer: [blocks, block_size, kv_heads, head_dim] each."""

    keys: Float32Array
    values: Float32Array

    @classmethod
    def zeros(cls, spec: AttentionSpec, cache: CacheConfig) -> KvPool:
        """An empty pool."""
        shape = (cache.blocks, cache.block_size, spec.kv_heads, spec.head_dim)
        return cls(np.zeros(shape, np.float32), np.zeros(shape, np.float32))


def attention(
    spec: AttentionSpec,
    q: Float32Array,
    k: Float32Array,
    v: Float32Array,
    gate: Float32Array | None,
    pool: KvPool,
    batch: Batch,
) -> Float32Array:
    """Write k and v to the pool and attend; returns [tokens, heads * head_dim].

    q, gate: [tokens, heads, head_dim]. k, v: [tokens, kv_heads, head_dim].
    """
    q = q if spec.q_norm is None else rms_norm(spec.q_norm, q)
    k = k if spec.k_norm is None else rms_norm(spec.k_norm, k)
    if spec.rope is not None:
        q, k = rotate(spec.rope, q, batch.positions), rotate(spec.rope, k, batch.positions)
    block_size = pool.keys.shape[1]
    out = np.empty_like(q)
    for s, table in enumerate(batch.block_tables):
        rows = slice(batch.query_starts[s], batch.query_starts[s + 1])
        positions = batch.positions[rows]
        blocks, places = table[positions // block_size], positions % block_size
        pool.keys[blocks, places] = k[rows]
        pool.values[blocks, places] = v[rows]

        seen = np.arange(positions[-1] + 1)
        blocks, places = table[seen // block_size], seen % block_size
        out[rows] = _attend(spec, q[rows], pool.keys[blocks, places], pool.values[blocks, places])
    if gate is not None:
        out *= sigmoid(gate)
    return out.reshape(len(out), -1)


def _attend(spec: AttentionSpec, q: Float32Array, keys: Float32Array, values: Float32Array) -> Float32Array:
    """q [new, heads, head_dim] are the last of the positions that keys and values [all, kv_heads, ...] hold."""
    repeats = spec.heads // spec.kv_heads
    keys, values = np.repeat(keys, repeats, axis=1), np.repeat(values, repeats, axis=1)
    scores = np.einsum("qhd,khd->hqk", q, keys) * np.float32(spec.scale)
    visible = np.tri(len(q), len(keys), len(keys) - len(q), dtype=bool)
    weights = softmax(np.where(visible, scores, np.float32(-np.inf)))
    out: Float32Array = np.einsum("hqk,khd->qhd", weights, values)
    return out
