"""KV and state pools on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mixbit.kernels.cuda.driver import Buffer, Device
from mixbit.kernels.executor import Bytes


@dataclass(frozen=True, eq=False)
class Pool:
    """`count` pieces of memory of one size, one after another."""

    buffer: Buffer
    each: int

    @classmethod
    def zeros(cls, device: Device, count: int, each: int) -> Pool:
        """count pieces of `each` bytes."""
        buffer = device.alloc(-(-count * each // 4) * 4)
        buffer.fill(0)
        return cls(buffer, each)


@dataclass(frozen=True, eq=False)
class Pools:
    """Pools whose pieces of one number belong together: a KV block in all layers, or a sequence's state."""

    device: Device
    pools: Sequence[Pool]

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return sum(pool.buffer.nbytes for pool in self.pools)

    def copy(self, source: int, target: int) -> None:
        """Make piece `target` equal to piece `source`."""
        for pool in self.pools:
            to, start = (pool.buffer.view(number * pool.each, pool.each) for number in (target, source))
            self.device.copy(to, start, pool.each)

    def export(self, number: int) -> Bytes:
        """The bytes of a piece: pool after pool."""
        out = np.empty(sum(pool.each for pool in self.pools), np.uint8)
        start = 0
        for pool in self.pools:
            pool.buffer.view(number * pool.each, pool.each).download(out[start : start + pool.each])
            start += pool.each
        return out

    def restore(self, number: int, data: Bytes) -> None:
        """Put back what `export` gave. Raises ValueError if the size is another."""
        size = sum(pool.each for pool in self.pools)
        if data.nbytes != size:
            raise ValueError(f"{data.nbytes} bytes, expected {size}")
        start = 0
        for pool in self.pools:
            pool.buffer.view(number * pool.each, pool.each).upload(data[start : start + pool.each])
            start += pool.each
