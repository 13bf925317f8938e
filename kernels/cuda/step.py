"""A batch as the kernels read it: one block of int32, uploaded before a step."""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mixbit.kernels.cuda.driver import Device
from mixbit.kernels.executor import Batch

_HEADER = 4  # the first is the width of the tables
_TABLES = 1 << 16  # entries that there is room for at first


class Place(NamedTuple):
    """Part of memory that its owner keeps."""

    address: int


class StepData:
    """Where the arrays of steps of at most `rows` rows lie: `struct Step` of columns.cuh, and the rows of logits."""

    def __init__(self, device: Device, rows: int) -> None:
        self._device, self._rows = device, rows
        self._allocate(_TABLES)

    def _allocate(self, entries: int) -> None:
        self._entries = entries
        size = _HEADER + 7 * (self._rows + 1) + entries
        self._host = self._device.pinned((size,), np.dtype(np.int32))
        self._memory = self._device.alloc(4 * size)

    def _at(self, index: int) -> int:
        return _HEADER + index * (self._rows + 1)

    def upload(self, batch: Batch) -> bool:
        """Enqueue the copy of a batch. True if the arrays have moved, so that no earlier launch may be used."""
        entries = batch.block_tables.size
        moved = entries > self._entries
        if moved:
            self._device.synchronize()
            self._allocate(1 << (entries - 1).bit_length())
        host, width = self._host, batch.block_tables.shape[1]
        sequences = np.repeat(np.arange(len(batch.context_lengths), dtype=np.int32), np.diff(batch.query_starts))
        parts = (
            batch.tokens,
            batch.positions,
            sequences,
            batch.query_starts,
            batch.context_lengths,
            batch.state_slots,
            batch.logit_rows,
        )
        host[0] = width
        for i, part in enumerate(parts):
            host[self._at(i) : self._at(i) + len(part)] = part
        tables = self._at(len(parts))
        host[tables : tables + entries] = batch.block_tables.reshape(-1)
        self._device.send(self._memory, host[: tables + entries])
        return moved

    def _address(self, index: int) -> int:
        return self._memory.address + 4 * self._at(index)

    @property
    def step(self) -> np.void:
        """`struct Step`."""
        arrays = [self._address(i) for i in range(6)]
        return as_struct("<8Q", *arrays, self._address(7), self._memory.address)

    def at(self, index: int) -> Place:
        """The array `index` of `struct Step`; 6: rows of logits."""
        return Place(self._address(index))

    @property
    def tables(self) -> Place:
        """Block tables [sequences, width]."""
        return Place(self._address(7))

    @property
    def width(self) -> Place:
        """Entries in a row of the tables."""
        return Place(self._memory.address)

    @property
    def tokens(self) -> np.uint64:
        """Tokens [rows]."""
        return np.uint64(self._address(0))

    @property
    def logit_rows(self) -> np.uint64:
        """Rows whose logits are wanted."""
        return np.uint64(self._address(6))


def as_struct(form: str, *values: float) -> np.void:
    """A structure as a kernel's argument; `form` as in the module struct."""
    packed: npt.NDArray[np.void] = np.frombuffer(struct.pack(form, *values), f"V{struct.calcsize(form)}")
    result: np.void = packed[0]
    return result
