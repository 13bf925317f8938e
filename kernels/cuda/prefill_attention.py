"""Attention of many tokens over the paged KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mixbit.kernels.cuda.compiler import Source
from mixbit.kernels.cuda.driver import Addressed, Launch
from mixbit.kernels.cuda.prefill import CHUNK, NULL, QUERIES, Modules, Size, Tables
from mixbit.kernels.ops import Attention, Columns, Norm


@dataclass(frozen=True, eq=False)
class AttentionPlaces:
    """Where a layer's arrays lie. q, k, v, gate: the values that the node's columns name, bfloat16 [tokens, dim].

    q_norm, k_norm: float32 [head_dim]; inv_freq: float32. keys, values: bfloat16 pools
    [blocks * block_size, kv_heads, head_dim]. queries: room for bfloat16 [tokens, heads * head_dim]; it can be shared.
    """

    q: Addressed
    k: Addressed
    v: Addressed
    gate: Addressed | None
    q_norm: Addressed | None
    k_norm: Addressed | None
    inv_freq: Addressed | None
    keys: Addressed
    values: Addressed
    queries: Addressed
    out: Addressed


def applies(node: Attention) -> bool:
    """Whether the kernels serve this layer."""
    columns = [node.q, node.k, node.v, *([] if node.gate is None else [node.gate])]
    return node.spec.head_dim % 16 == 0 and node.spec.head_dim <= 256 and all(even(part) for part in columns)


def even(columns: Columns) -> bool:
    """Whether the columns' values can be read in pairs."""
    return columns.offset % 2 == 0 and columns.stride % 2 == 0 and columns.value.dim % 2 == 0


def columns_defines(name: str, columns: Columns) -> tuple[str, ...]:
    """Macros for where columns lie in rows."""
    return (f"{name}_ROW {columns.value.dim}", f"{name}_OFFSET {columns.offset}", f"{name}_STRIDE {columns.stride}")


class PrefillAttention:
    """One attention layer."""

    def __init__(self, node: Attention, block_size: int, places: AttentionPlaces, tables: Tables) -> None:
        self._node, self._places, self._tables = node, places, tables
        spec = node.spec
        self._source = Source(
            "prefill_attention.cu",
            (
                f"HEADS {spec.heads}",
                f"KV_HEADS {spec.kv_heads}",
                f"HEAD_DIM {spec.head_dim}",
                f"HALF {0 if spec.rope is None else len(spec.rope.inv_freq)}",
                f"Q_NORM {int(spec.q_norm is not None)}",
                f"K_NORM {int(spec.k_norm is not None)}",
                f"GATED {int(node.gate is not None)}",
                f"BLOCK_SIZE {block_size}",
                *columns_defines("Q", node.q),
                *columns_defines("K", node.k),
                *columns_defines("V", node.v),
                *columns_defines("GATE", node.gate or node.q),
            ),
        )

    @property
    def sources(self) -> tuple[Source, ...]:
        """What must be compiled."""
        return (self._source,)

    def launches(self, modules: Modules, size: Size) -> list[Launch]:
        """Norms, RoPE and the cache's new entries; then the attention."""
        spec, places, tables = self._node.spec, self._places, self._tables
        module = modules[self._source]
        where = (tables.tiles, tables.block_tables, tables.table_length)
        write = (
            places.q,
            places.k,
            places.v,
            *(NULL if part is None else part for part in (places.q_norm, places.k_norm, places.inv_freq)),
            *where,
            places.queries,
            places.keys,
            places.values,
            np.float32(_eps(spec.q_norm)),
            np.float32(_eps(spec.k_norm)),
            np.float32(1 if spec.rope is None else spec.rope.scale),
        )
        gate = NULL if places.gate is None else places.gate
        attend = (places.queries, places.keys, places.values, gate, *where, np.float32(spec.scale), places.out)
        padded = max(64, 1 << (spec.head_dim - 1).bit_length())
        shared = (QUERIES + 4 * CHUNK) * padded * 2
        return [
            Launch(module.function("prefill_attention_write"), (size.tiles, QUERIES, 1), (256, 1, 1), write),
            Launch(module.function("prefill_attention", shared), (spec.heads, size.tiles, 1), (256, 1, 1), attend),
        ]


def _eps(norm: Norm | None) -> float:
    return 0.0 if norm is None else norm.eps
