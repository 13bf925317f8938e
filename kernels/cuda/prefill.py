"""What the prefill wrappers share: how weights lie on the device, shapes of blocks, and the tables of a batch.

Every wrapper (prefill_linear, prefill_moe, prefill_attention, prefill_delta, prefill_rows) is made once for a layer,
from addresses that stay. `sources` are what must be compiled for it, and `launches(modules, size)` the kernels of one
step, which depend on nothing but the step's `Size`: they can be kept, or captured as a graph, by that.
Activations are bfloat16 [rows, dim]; sums are float32. `applies` says where a wrapper can be used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mixbit.kernels.cuda.compiler import Source
from mixbit.kernels.cuda.driver import Addressed, Module
from mixbit.kernels.executor import Batch, Int32Array
from mixbit.kernels.spec import FLOAT_DTYPES, Matrix, QuantizedTensor

Modules = Mapping[Source, Module]

NULL = np.uint64(0)
CHUNK = 64  # tokens of a chunk of the gated delta net
QUERIES = 128  # of a tile of the attention
LEAST_TOKENS = 9  # below, the kernels for decode read weights as fast
MOST_SHARED = 227 << 10  # bytes a block can have

BF16, F16, F32 = range(3)
_DTYPES = {FLOAT_DTYPES[2]: BF16, FLOAT_DTYPES[1]: F16, FLOAT_DTYPES[0]: F32}


def dtype_code(dtype: np.dtype[Any]) -> int:
    """How the kernels number a float type."""
    return _DTYPES[dtype]


def ceil_div(count: int, by: int) -> int:
    """Pieces of `by` that hold `count`."""
    return -(-count // by)


@dataclass(frozen=True)
class Format:
    """How weights are stored. bits: of a code, or 16 or 32 for dense values. dtype: of the scales, or dense values."""

    bits: int
    group_size: int
    dtype: int

    @classmethod
    def of(cls, matrix: Matrix) -> Format:
        """The format of a matrix of a program."""
        if isinstance(matrix, QuantizedTensor):
            return cls(matrix.bits, matrix.group_size, dtype_code(matrix.scales.dtype))
        return cls(8 * matrix.data.dtype.itemsize, 32, dtype_code(matrix.data.dtype))


@dataclass(frozen=True, eq=False)
class Weights:
    """A matrix [rows, depth], or a stack of them, on the device as the checkpoint stores it.

    codes: packed codes, or the dense values; scales, biases: None for these.
    """

    codes: Addressed
    scales: Addressed | None
    biases: Addressed | None
    format: Format
    rows: int
    depth: int


@dataclass(frozen=True)
class Block:
    """What a block of a matrix product makes: tokens x columns, with this many warps along each.

    stages: tiles of activations and of codes in flight. resident: blocks on a multiprocessor that registers are spared
    for.
    """

    tokens: int
    columns: int
    warps_m: int
    warps_n: int
    stages: int
    resident: int

    @property
    def threads(self) -> int:
        """Threads of the block."""
        return 32 * self.warps_m * self.warps_n

    @property
    def defines(self) -> tuple[str, ...]:
        """Macros of prefill_matmul.cuh."""
        return (
            f"BM {self.tokens}",
            f"BN {self.columns}",
            f"WARPS_M {self.warps_m}",
            f"WARPS_N {self.warps_n}",
            f"STAGES {self.stages}",
            f"RESIDENT {self.resident}",
        )

    def shared(self, bits: int) -> int:
        """Bytes of shared memory with codes of this width: tiles of x, of codes, and of expanded weights."""
        return self.stages * (self.tokens * 128 + self.columns * 8 * bits) + 2 * self.columns * 128


SQUARE = Block(128, 128, 8, 1, stages=3, resident=2)
LOW = Block(64, 128, 4, 1, stages=2, resident=4)  # for few tokens, or some tens for each expert


@dataclass(frozen=True)
class Size:
    """How large a step is: all that its launches depend on."""

    tokens: int
    sequences: int
    chunks: int
    tiles: int


@dataclass(frozen=True, eq=False)
class Tables:
    """Where a step's tables lie on the device; int32, filled before every step from `plan` and the batch.

    chunks, tiles: [.., 4], of `Plan`. first_chunks: [sequences]. query_starts: [sequences + 1]. context_lengths,
    state_slots, block_tables: as in Batch. table_length: [1], entries in a row of block_tables.
    """

    chunks: Addressed
    first_chunks: Addressed
    tiles: Addressed
    query_starts: Addressed
    context_lengths: Addressed
    state_slots: Addressed
    block_tables: Addressed
    table_length: Addressed


@dataclass(frozen=True, eq=False)
class Plan:
    """The tables of a batch that say which tokens a block works on.

    chunks: (sequence, first row, rows, index within the sequence), of at most CHUNK rows each.
    first_chunks: index of each sequence's first chunk.
    tiles: (sequence, first row, rows, position of the first row), of at most QUERIES rows, the costliest first.
    """

    chunks: Int32Array
    first_chunks: Int32Array
    tiles: Int32Array
    size: Size

    @classmethod
    def of(cls, batch: Batch) -> Plan:
        """The plan of a batch."""
        chunks, first_chunks = _pieces(batch, CHUNK)
        tiles, _ = _pieces(batch, QUERIES)
        tiles[:, 3] = batch.context_lengths[tiles[:, 0]] + tiles[:, 3] * QUERIES
        tiles = tiles[np.argsort(-(tiles[:, 2] + tiles[:, 3]), kind="stable")]
        size = Size(len(batch.tokens), len(batch.context_lengths), len(chunks), len(tiles))
        return cls(chunks, first_chunks, np.ascontiguousarray(tiles), size)

    @staticmethod
    def most(tokens: int, sequences: int, each: int) -> int:
        """The most pieces of `each` rows that so many tokens of so many sequences can make."""
        return min(tokens, tokens // each + sequences)


def _pieces(batch: Batch, most: int) -> tuple[Int32Array, Int32Array]:
    """((sequence, first row, rows, index) for each piece of at most `most` rows, first piece of each sequence)."""
    lengths = np.diff(batch.query_starts)
    counts = -(-lengths // most)
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])
    sequence = np.repeat(np.arange(len(counts)), counts)
    index = np.arange(counts.sum()) - first[sequence]
    rows = np.minimum(lengths[sequence] - index * most, most)
    pieces: npt.NDArray[Any] = np.stack([sequence, batch.query_starts[sequence] + index * most, rows, index], axis=1)
    return pieces.astype(np.int32), first.astype(np.int32)
