"""A device without a GPU: memory is host memory, launches are only counted."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mixbit.kernels.cuda.driver import Launch


class FakeBuffer:
    """Host memory, poisoned at first."""

    def __init__(self, device: FakeDevice, nbytes: int) -> None:
        self.device, self.nbytes = device, nbytes
        self.bytes = np.full(max(nbytes, 16), 0xA5, np.uint8)
        self.address = int(self.bytes.ctypes.data)
        device.live += 1

    def view(self, offset: int, nbytes: int) -> FakeView:
        return FakeView(self, offset, nbytes)

    def upload(self, array: npt.NDArray[Any]) -> None:
        self.view(0, self.nbytes).upload(array)

    def download(self, array: npt.NDArray[Any]) -> None:
        self.view(0, self.nbytes).download(array)

    def fill(self, word: int = 0) -> None:
        self.bytes[:] = word


@dataclass
class FakeView:
    owner: FakeBuffer
    offset: int
    nbytes: int

    @property
    def address(self) -> int:
        return self.owner.address + self.offset

    @property
    def _bytes(self) -> npt.NDArray[np.uint8]:
        return self.owner.bytes[self.offset : self.offset + self.nbytes]

    def upload(self, array: npt.NDArray[Any]) -> None:
        source = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._bytes[: len(source)] = source

    def download(self, array: npt.NDArray[Any]) -> None:
        array.reshape(-1).view(np.uint8)[:] = self._bytes[: array.nbytes]


@dataclass
class FakeModule:
    code: bytes

    def function(self, name: str, shared: int = 0) -> tuple[bytes, str, int]:
        return self.code, name, shared


@dataclass
class FakeDevice:
    """What an executor uses of mixbit.kernels.cuda.driver.Device."""

    name: str = "a fake device"
    arch: str = "sm_90"
    multiprocessors: int = 132
    free_memory: int = 1 << 34
    live: int = 0
    launched: list[Launch] = field(default_factory=list)
    replayed: list[Sequence[Launch]] = field(default_factory=list)
    captured: int = 0

    def make_current(self) -> None: ...
    def synchronize(self) -> None: ...

    def alloc(self, nbytes: int) -> FakeBuffer:
        return FakeBuffer(self, nbytes)

    def put(self, array: npt.NDArray[Any]) -> FakeBuffer:
        buffer = self.alloc(array.nbytes)
        buffer.upload(array)
        return buffer

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        return np.zeros(shape, dtype)

    def send(self, target: Any, array: npt.NDArray[Any]) -> None:
        ctypes.memmove(target.address, array.ctypes.data, array.nbytes)

    def fetch(self, array: npt.NDArray[Any], source: Any) -> None:
        ctypes.memmove(array.ctypes.data, source.address, array.nbytes)

    def copy(self, target: Any, source: Any, nbytes: int) -> None:
        ctypes.memmove(target.address, source.address, nbytes)

    def load(self, code: bytes) -> FakeModule:
        return FakeModule(code)

    def launch(self, *launches: Launch) -> None:
        self.launched += launches

    def capture(self, launches: Sequence[Launch]) -> Sequence[Launch]:
        self.captured += 1
        return launches

    def replay(self, graph: Sequence[Launch]) -> None:
        self.replayed.append(graph)

    def milliseconds(self, run: Callable[[], None]) -> float:
        run()
        return 1.0
