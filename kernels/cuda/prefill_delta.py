"""Gated delta net over many tokens, in chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mixbit.kernels.cuda.compiler import Source
from mixbit.kernels.cuda.driver import Addressed, Device, Launch
from mixbit.kernels.cuda.prefill import CHUNK, Modules, Plan, Size, Tables, ceil_div
from mixbit.kernels.cuda.prefill_attention import columns_defines, even
from mixbit.kernels.ops import GatedDelta, GatedDeltaSpec

_PITCH, _FETCHERS = 68, 64  # of prefill_delta.cu


@dataclass(frozen=True, eq=False)
class DeltaPlaces:
    """Where a layer's arrays lie. q, k, v, z, b, a: the values that the node's columns name, bfloat16 [tokens, dim].

    Parameters are float32: taps [channels, kernel], rate [value_heads] (-exp(a_log)), dt_bias [value_heads],
    norm [value_dim]. conv: the convolution's states [slots, kernel - 1, channels]; memory: float32
    [slots, value_heads, value_dim, key_dim]. out: bfloat16 [tokens, value_heads * value_dim].
    """

    q: Addressed
    k: Addressed
    v: Addressed
    z: Addressed
    b: Addressed
    a: Addressed
    taps: Addressed
    rate: Addressed
    dt_bias: Addressed
    norm: Addressed
    conv: Addressed
    memory: Addressed
    out: Addressed


class DeltaScratch:
    """What a layer needs between its kernels; one serves all layers of the same sizes."""

    def __init__(self, device: Device, spec: GatedDeltaSpec, max_tokens: int, max_sequences: int) -> None:
        self.mixed = device.alloc(max_tokens * spec.channels * 2)
        chunks = Plan.most(max_tokens, max_sequences, CHUNK)
        self.pieces = device.alloc(chunks * spec.value_heads * piece_bytes(spec))


def piece_bytes(spec: GatedDeltaSpec) -> int:
    """Bytes that a chunk and head hand from one kernel to the next: PIECE_BYTES of prefill_delta.cu."""
    return 2 * CHUNK * (spec.value_dim + _padded(spec.key_dim) + CHUNK) + 2 * CHUNK * 4


def _padded(dim: int) -> int:
    return 64 if dim <= 64 else 128


def applies(node: GatedDelta) -> bool:
    """Whether the kernels serve this layer."""
    spec = node.spec
    fits = all(dim % 16 == 0 and dim <= 128 for dim in (spec.key_dim, spec.value_dim))
    return fits and all(even(columns) for columns in (node.q, node.k, node.v, node.z))


class PrefillDelta:
    """One gated delta layer. conv_dtype: of the convolution's states."""

    def __init__(
        self,
        node: GatedDelta,
        places: DeltaPlaces,
        scratch: DeltaScratch,
        tables: Tables,
        conv_dtype: Literal["float32", "bfloat16"],
    ) -> None:
        self._node, self._places, self._scratch, self._tables = node, places, scratch, tables
        spec = node.spec
        self._source = Source(
            "prefill_delta.cu",
            (
                f"KEY_HEADS {spec.key_heads}",
                f"VALUE_HEADS {spec.value_heads}",
                f"KEY_DIM {spec.key_dim}",
                f"VALUE_DIM {spec.value_dim}",
                f"KERNEL {spec.kernel}",
                f"CONV_TYPE {'float' if conv_dtype == 'float32' else 'u16'}",
                *columns_defines("Q", node.q),
                *columns_defines("K", node.k),
                *columns_defines("V", node.v),
                *columns_defines("Z", node.z),
                *columns_defines("B", node.b),
                *columns_defines("A", node.a),
            ),
        )

    @property
    def sources(self) -> tuple[Source, ...]:
        """What must be compiled."""
        return (self._source,)

    def launches(self, modules: Modules, size: Size) -> list[Launch]:
        """Convolution, all chunks, chunk after chunk, gated norm."""
        spec, at, scratch, tables = self._node.spec, self._places, self._scratch, self._tables
        module, heads = modules[self._source], spec.value_heads
        key_tile, value_tile = 2 * CHUNK * _padded(spec.key_dim), 2 * CHUNK * _padded(spec.value_dim)
        solve_shared = key_tile + max(key_tile, 4 * CHUNK * CHUNK) + value_tile + 4 * _PITCH * (CHUNK + CHUNK // 2)
        advance_shared = 2 * (3 * key_tile + 2 * CHUNK * CHUNK + 2 * CHUNK * 4)
        warps = 2 if spec.value_dim % 32 == 0 else 1
        slices, threads = spec.value_dim // (16 * warps), 32 * warps + _FETCHERS
        sequences = (tables.context_lengths, tables.state_slots)
        mix = (at.q, at.k, at.v, at.taps, at.conv, tables.chunks, *sequences, scratch.mixed)
        tail = (at.q, at.k, at.v, at.conv, tables.query_starts, *sequences)
        solve = (scratch.mixed, at.b, at.a, at.rate, at.dt_bias, tables.chunks, scratch.pieces)
        advance = (
            scratch.mixed,
            scratch.pieces,
            at.memory,
            tables.query_starts,
            *sequences,
            tables.first_chunks,
            at.out,
        )
        norm = (at.out, at.z, at.norm, at.out, np.int32(size.tokens), np.float32(spec.norm.eps))

        def kernel(
            name: str,
            grid: tuple[int, int, int],
            threads: int,
            arguments: tuple[Addressed | np.generic, ...],
            shared: int = 0,
        ) -> Launch:
            return Launch(module.function(f"prefill_delta_{name}", shared), grid, (threads, 1, 1), arguments)

        return [
            kernel("mix", (size.chunks, 2 * spec.key_heads + heads, 1), 128, mix),
            kernel("tail", (ceil_div(spec.channels, 256), size.sequences, 1), 256, tail),
            kernel("solve", (heads, size.chunks, 1), 128, solve, solve_shared),
            kernel("advance", (slices, heads, size.sequences), threads, advance, advance_shared),
            kernel("norm", (ceil_div(size.tokens * heads, 4), 1, 1), 128, norm),
        ]
