"""Experts that do not all stay in memory: what a backend is told of them, and what it tells.

A chosen expert is read from where it lies in the checkpoint's files (`Matrix.stored`) into a slot of bounded memory,
and stays there until others are worth more. The dense part of a model is never streamed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from mixbit.kernels.ops import Moe, Program
from mixbit.kernels.spec import Matrix

if TYPE_CHECKING:
    from mixbit.kernels.executor import ExecutorOptions


Access = Literal["direct", "cached", "mapped"]
"""How experts come from their files. direct: past the page cache, into slots. cached: copied out of it, into slots.

mapped: they stay where the page cache has them; a slot has no memory, and stands for one that was brought there. It is
for where the page cache holds them all: taking mapped pages back costs the system more than the copies.
"""


class WeightsError(RuntimeError):
    """Weights could not be read during a step; the message names the file, the place, why, and what to do.

    The step's sequences are lost, what else the executor holds is not.
    """


@dataclass(frozen=True)
class ExpertMemory:
    """Where streamed experts may stay. nbytes: for slots, in the memory that the other weights are in.

    Direct access where the slots take most of the memory; where they take little of it, the page cache is a second tier
    that costs a copy, or nothing, instead of the disk's time.
    """

    nbytes: int
    access: Access = "direct"


@dataclass(frozen=True)
class ExpertCounts:
    """One streamed layer since the start. hits, misses: experts that steps asked for, in memory or not.

    ahead: misses of which something had been read before they were asked for. unused: experts of which something was
    read ahead, and not asked for. bytes_read: from the files. Seconds: read, while anything was being read for
    the layer; wait, while there was nothing to compute; compute, of experts.
    """

    hits: int
    misses: int
    ahead: int
    unused: int
    bytes_read: int
    read: float
    wait: float
    compute: float


@runtime_checkable
class StreamingBackend(Protocol):
    """A backend that can stream experts: it heeds ExecutorOptions.experts."""

    def step_bytes(self, program: Program, options: ExecutorOptions) -> int:
        """Bytes that steps of options.max_tokens take, beside weights and caches."""

    def least_expert_bytes(self, program: Program) -> int:
        """The smallest ExpertMemory.nbytes that this program runs with."""


@runtime_checkable
class MeasuresReads(Protocol):
    """A backend that can tell what the disk gives."""

    def read_rate(self, program: Program, *, access: Access, count: int) -> float:
        """Bytes per second at which `count` experts, chosen at random, are read from their files."""


@runtime_checkable
class StreamingExecutor(Protocol):
    """An executor that was compiled with ExecutorOptions.experts."""

    def expert_counts(self) -> Sequence[ExpertCounts]:
        """Of each streamed layer, in the order of the program."""

    @property
    def expert_bytes(self) -> int:
        """Bytes of all slots."""

    @property
    def expert_slots(self) -> int:
        """Experts that can be in memory at once."""


def stacks(node: Moe) -> tuple[Matrix, Matrix, Matrix]:
    """The stacked experts of a node: gate, up, down."""
    experts = node.spec.experts
    return experts.gate, experts.up, experts.down


def streamable(program: Program) -> Iterator[Moe]:
    """The nodes whose experts can be read from files, in order."""
    for node in program.nodes:
        if isinstance(node, Moe) and all(matrix.stored for matrix in stacks(node)):
            yield node


def expert_bytes(program: Program) -> int:
    """Bytes of all experts that can be streamed, as stored."""
    return sum(matrix.nbytes for node in streamable(program) for matrix in stacks(node))


def expert_parts(node: Moe, files: Mapping[Path, int]) -> list[tuple[int, int, int]]:
    """File, offset and bytes of expert 0 in each array of a node's stacks."""
    places = [(place, matrix.experts or 1) for matrix in stacks(node) for place in matrix.stored]
    return [(files[place.file], place.offset, place.nbytes // experts) for place, experts in places]
