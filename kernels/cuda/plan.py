"""Launches before their kernels are compiled, and the arrays that they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mixbit.kernels.cuda.compiler import Source
from mixbit.kernels.cuda.driver import Addressed, Argument, Buffer, Device, Launch, Module, Size
from mixbit.kernels.cuda.prefill import BF16, F16, F32, Weights
from mixbit.kernels.cuda.weights import PITCH

NULL = np.uint64(0)
SCALES = {BF16: "bfloat", F16: "__half", F32: "float"}


@dataclass(frozen=True, eq=False)
class Planned:
    """A kernel of a source, with its sizes and arguments. threads: of a block."""

    source: Source
    kernel: str
    grid: Size
    threads: int
    arguments: tuple[Argument, ...]

    def launch(self, modules: Mapping[Source, Module]) -> Launch:
        """The launch, of a compiled kernel."""
        function = modules[self.source].function(self.kernel)
        return Launch(function, self.grid, (self.threads, 1, 1), self.arguments, early=True)


@dataclass(eq=False)
class Scratch:
    """Memory that layers use one after another, by name. Zeros at first."""

    device: Device
    _buffers: dict[str, Buffer] = field(default_factory=dict)
    _outgrown: list[Buffer] = field(default_factory=list)  # launches made before still use them

    def __call__(self, name: str, nbytes: int) -> Buffer:
        """At least nbytes."""
        kept = self._buffers.get(name)
        if kept is not None and kept.nbytes >= nbytes:
            return kept
        if kept is not None:
            self._outgrown.append(kept)
        made = self._buffers[name] = self.device.alloc(
            1 << max(4, (nbytes - 1).bit_length())
        )  # so that few wishes outgrow it
        made.fill(0)
        return made


def group_of(weights: Weights) -> int:
    """Columns that the kernels take at a time: a group of the quantization, or some of a dense row."""
    if weights.format.bits <= 8:
        return weights.format.group_size
    return max(size for size in (16, 32, 64) if padded(weights) % size == 0)


def padded(weights: Weights) -> int:
    """Values in a row."""
    return weights.depth if weights.format.bits <= 8 else -(-weights.depth // PITCH) * PITCH


def format_defines(name: str, weights: Weights) -> tuple[str, ...]:
    """Macros of the experts' kernels for one matrix."""
    group = group_of(weights)
    return (
        f"{name}_BITS {weights.format.bits}",
        f"{name}_GROUP {group}",
        f"{name}_GROUPS {padded(weights) // group}",
        f"{name}_SCALE {SCALES[weights.format.dtype]}",
    )


def addresses(weights: Weights) -> tuple[int, int, int]:
    """Of codes, scales and biases."""
    return weights.codes.address, address(weights.scales), address(weights.biases)


def address(place: Addressed | None) -> int:
    """0 for none."""
    return 0 if place is None else place.address


def ceil_div(count: int, by: int) -> int:
    """Pieces of `by` that hold `count`."""
    return -(-count // by)


def sources_of(planned: Sequence[Planned]) -> list[Source]:
    """What must be compiled, each once."""
    return list(dict.fromkeys(plan.source for plan in planned))
