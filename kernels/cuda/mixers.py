"""Attention and gated delta net over the device's pools, for any batch of few rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mixbit.kernels import ops
from mixbit.kernels.cuda.compiler import Source
from mixbit.kernels.cuda.driver import Addressed, Argument, Buffer
from mixbit.kernels.cuda.linear import Kind
from mixbit.kernels.cuda.plan import NULL, Planned, Scratch
from mixbit.kernels.cuda.step import StepData, as_struct
from mixbit.kernels.executor import BackendError

_SHARE = 4  # query heads of a block: SHARE of attention.cu
_PARTS = 16  # of a context, where there are few rows
_FEW_ROWS = 64
_MOST_CLUSTER = 8  # blocks that every device can start together
_QK_EPS = 1e-6


@dataclass(frozen=True, eq=False)
class AttentionParts:
    """A layer's parameters, float32, and its pools."""

    q_norm: Addressed | None
    k_norm: Addressed | None
    inv_freq: Addressed | None
    keys: Buffer
    values: Buffer


@dataclass(frozen=True, eq=False)
class DeltaParts:
    """A layer's parameters, float32, and its pools."""

    taps: Addressed
    rate: Addressed
    dt_bias: Addressed
    norm: Addressed
    conv: Buffer
    memory: Buffer


def columns(columns: ops.Columns | None, place: Addressed | None) -> np.void:
    """`struct Columns` of columns.cuh."""
    if columns is None or place is None:
        return as_struct("<Qiiii", 0, 0, 0, 0, 0)
    return as_struct("<Qiiii", place.address, columns.value.dim, columns.offset, columns.stride, 0)


def attention(
    kind: Kind,
    node: ops.Attention,
    block_size: int,
    parts: AttentionParts,
    inputs: tuple[np.void, np.void, np.void, np.void],
    out: Addressed,
    scratch: Scratch,
    data: StepData,
    rows: int,
) -> list[Planned]:
    """Write the cache, then attend: two launches. inputs: q, k, v and gate."""
    spec = node.spec
    sharers = spec.heads // spec.kv_heads
    share = min(sharers, _SHARE)
    blocks = spec.kv_heads * -(-sharers // share)
    splits = _PARTS if rows <= _FEW_ROWS else 1
    width = 4 if kind.dtype == "float32" else 2
    queries = scratch("queries", rows * spec.heads * spec.head_dim * width)
    made = rows * blocks * splits * share if splits > 1 else 0
    sums, totals = scratch("part sums", made * spec.head_dim * 4), scratch("part totals", made * 8)
    arrived = scratch("parts arrived", rows * blocks * 4)
    source = Source(
        "attention.cu",
        (
            *kind.defines,
            f"HEADS {spec.heads}",
            f"KV_HEADS {spec.kv_heads}",
            f"HEAD_DIM {spec.head_dim}",
            f"BLOCK {block_size}",
            f"HALF {0 if spec.rope is None else len(spec.rope.inv_freq)}",
            f"PARTS {_PARTS}",
        ),
    )
    q, k, v, gate = inputs
    write: tuple[Argument, ...] = (
        q,
        k,
        v,
        NULL if parts.q_norm is None else parts.q_norm,
        NULL if parts.k_norm is None else parts.k_norm,
        np.float32(0 if spec.q_norm is None else spec.q_norm.eps),
        np.float32(0 if spec.k_norm is None else spec.k_norm.eps),
        NULL if parts.inv_freq is None else parts.inv_freq,
        np.float32(1 if spec.rope is None else spec.rope.scale),
        np.float32(spec.scale),
        queries,
        parts.keys,
        parts.values,
        data.step,
    )
    attend = (queries, parts.keys, parts.values, gate, sums, totals, arrived, out, data.step)
    return [
        Planned(source, "attention_write", (spec.heads + 2 * spec.kv_heads, rows, 1), 32, write),
        Planned(source, "attention", (blocks, rows, splits), 256, attend),
    ]


def delta(
    kind: Kind,
    node: ops.GatedDelta,
    parts: DeltaParts,
    inputs: tuple[np.void, ...],
    out: Addressed,
    data: StepData,
    sequences: int,
) -> Planned:
    """Every sequence's new tokens, one after another: one launch. inputs: q, k, v, z, b, a."""
    spec = node.spec
    if spec.value_heads // spec.key_heads > _MOST_CLUSTER or spec.key_dim % 4 or spec.kernel < 2:
        raise BackendError(
            f"the CUDA kernels have gated delta nets of at most {_MOST_CLUSTER} value heads a key head, of keys in "
            f"fours and two taps or more, not {spec.value_heads} for {spec.key_heads}, {spec.key_dim} and {spec.kernel}"
        )
    warps = min(16, spec.value_dim)
    source = Source(
        "delta.cu",
        (
            *kind.defines,
            f"WARPS {warps}",
            f"KEY_HEADS {spec.key_heads}",
            f"VALUE_HEADS {spec.value_heads}",
            f"KEY_DIM {spec.key_dim}",
            f"VALUE_DIM {spec.value_dim}",
            f"KERNEL {spec.kernel}",
            f"QK_EPS {_QK_EPS}f",
        ),
    )
    norm_eps = np.float32(spec.norm.eps)
    arguments: tuple[Argument, ...] = (
        *inputs,
        *(parts.taps, parts.rate, parts.dt_bias, parts.norm),
        norm_eps,
        *(parts.conv, parts.memory, out),
        data.step,
    )
    return Planned(source, "delta", (spec.value_heads, sequences, 1), 32 * warps, arguments)
