"""What a backend offers: `Backend.compile` makes an `Executor`, which runs one `Batch` a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from mixbit.kernels.experts import ExpertMemory
from mixbit.kernels.ops import Program

Int32Array = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.uint8]  # one-dimensional
Precision = Literal["exact", "fast"]
Dtype = Literal["float32", "float16", "bfloat16"]


class BackendError(RuntimeError):
    """The asked-for device, or the way it was asked for, cannot be used here; the message says why."""


@dataclass(frozen=True)
class CacheConfig:
    """Sizes of the pools an executor allocates.

    blocks of block_size tokens hold the KV of every attention layer; a block has the same number in
    every layer. state_slots hold the recurrent state of every gated delta layer.
    """

    blocks: int
    block_size: int
    state_slots: int


@dataclass(frozen=True, eq=False)
class Batch:
    """One step: the new tokens of several sequences, one sequence after another.

    tokens: int32 [tokens]. Sequence s owns rows query_starts[s] : query_starts[s + 1].
    query_starts: int32 [sequences + 1]; each sequence has at least one new token.
    context_lengths: int32 [sequences], tokens already in the cache; the first new token of s has that
        position. Zero means a new sequence: its recurrent state is taken as zero, whatever the slot holds.
    block_tables: int32 [sequences, most]; entry p // block_size is the block of position p; -1 beyond the end.
    state_slots: int32 [sequences]; read and replaced by this step. Ignored by models without such layers.
    logit_rows: int32 [selected], rows of the batch whose logits are returned.
    """

    tokens: Int32Array
    query_starts: Int32Array
    context_lengths: Int32Array
    block_tables: Int32Array
    state_slots: Int32Array
    logit_rows: Int32Array

    @property
    def positions(self) -> Int32Array:
        """Position of each token in its own sequence: int32 [tokens]."""
        lengths = np.diff(self.query_starts)
        first = self.context_lengths - self.query_starts[:-1]
        return (np.arange(len(self.tokens)) + np.repeat(first, lengths)).astype(np.int32)


class Executor(Protocol):
    """A program with its weights and caches on a device. Not thread-safe: one thread drives it."""

    def run(self, batch: Batch) -> npt.NDArray[np.float32]:
        """Logits [selected, vocab] of the step; KV and recurrent state are updated in place."""

    def hidden_states(self, batch: Batch) -> npt.NDArray[np.float32]:
        """As `run`, but of the same rows what the head would be applied to: [selected, hidden_dim].

        Raises BackendError if hidden_dim is None.
        """

    @property
    def hidden_dim(self) -> int | None:
        """Values of a hidden state; None if this executor does not give them."""

    def copy_block(self, source: int, target: int) -> None:
        """Make block `target` equal to block `source`, in every attention layer."""

    def copy_state(self, source: int, target: int) -> None:
        """Make the recurrent state in slot `target` equal to that in slot `source`, in every gated delta layer."""

    def export_block(self, block: int) -> Bytes:
        """A copy of what every attention layer holds in `block`.

        The layout is the backend's own; it is the same for the same program, block_size and options. Of size 0
        if the program has no such layers.
        """

    def import_block(self, block: int, data: Bytes) -> None:
        """Put back what `export_block` gave. Raises ValueError if the size is another."""

    def export_state(self, slot: int) -> Bytes:
        """As export_block, the recurrent state in `slot`."""

    def import_state(self, slot: int, data: Bytes) -> None:
        """As import_block, the recurrent state in `slot`."""

    def phase_seconds(self) -> Mapping[str, float]:
        """Seconds spent so far by kind of node ("attention", "moe", ...); empty unless profiling."""

    @property
    def cache_bytes(self) -> int:
        """Bytes held by the KV and state pools."""


@dataclass(frozen=True)
class ExecutorOptions:
    """How to run a program.

    max_tokens: rows of the largest batch. threads: CPU threads, 0 for one a core.
    profile: time each kind of node (costs a little).
    isa: force a CPU instruction set ("portable", "avx2", "avx512", "amx", "neon"); None takes the best.
    dtype: of the activations; None lets the backend choose (float32 on CPUs, the checkpoint's on GPUs).
    precision: "fast" lets a backend round the inputs of quantized matrices to int8, each group of columns by its
        own scale, or with the matrix to bfloat16 (CPUs do, routers' twice), and keys and values to bfloat16; "exact"
        keeps them as they are.
    experts: read experts from their files as they are chosen, within this memory (backends that are a
        `StreamingBackend`); None: all stay where the device has its weights.
    """

    max_tokens: int
    threads: int = 0
    profile: bool = False
    isa: str | None = None
    dtype: Dtype | None = None
    precision: Precision = "exact"
    experts: ExpertMemory | None = None


class Backend(Protocol):
    """A way to run programs.

    name: of its own, for caches on disk hold what it alone can read.
    """

    name: str

    def unavailable(self) -> str | None:
        """None if this machine can run it, else the reason in a few words."""

    def describe(self) -> str:
        """The device in words: "Apple M3 Max", "AVX2, 2 threads"."""

    def compile(self, program: Program, cache: CacheConfig, options: ExecutorOptions) -> Executor:
        """Bind weights (without copying where the device allows) and allocate the pools."""
