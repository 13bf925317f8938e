"""Experts in slots on the device: what tokens choose is read from its file when it is not there.

The slots are the first tier; the operating system's page cache, in what main memory is free, the second; the disk the
third. Each layer has slots of its own, and gives up the expert that was not chosen for the longest time.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mixbit.kernels.executor import BackendError
from mixbit.kernels.experts import ExpertCounts, ExpertMemory, WeightsError, stacks, streamable
from mixbit.kernels.mlx.arrays import to_device
from mixbit.kernels.mlx.feed_forward import FeedForward
from mixbit.kernels.mlx.weights import DenseWeight, QuantizedWeight, Weight
from mixbit.kernels.ops import Moe, Program
from mixbit.kernels.spec import Matrix, QuantizedTensor, StoredArray

_WIDEST = 4  # bytes of a scale or a dense value on the device


def least_bytes(program: Program) -> int:
    """One slot in each layer."""
    return sum(_slot_bytes(node, _WIDEST) for node in streamable(program))


def _slot_bytes(node: Moe, width: int) -> int:
    """One expert on the device, values of `width` bytes."""
    return sum(_matrix_bytes(matrix, width) for matrix in stacks(node))


def _matrix_bytes(matrix: Matrix, width: int) -> int:
    if isinstance(matrix, QuantizedTensor):
        codes, scales = matrix.weight, matrix.scales
        return int(codes[0].nbytes + 2 * width * scales[0].size)
    return int(width * matrix.data[0].size)


class ExpertSlots:
    """The experts of one node; stands for its `FeedForward` where experts are gathered."""

    def __init__(self, node: Moe, count: int, dtype: mx.Dtype) -> None:
        """count: slots. dtype: of activations, scales and dense values."""
        self.count, self._dtype = count, dtype
        self._experts = int(node.spec.experts.gate.experts or 1)
        self._matrices = [_Slots(matrix, count, dtype) for matrix in stacks(node)]
        self._places: OrderedDict[int, int] = OrderedDict()  # slot by expert, the latest chosen last
        self._hits = self._misses = self._bytes = 0
        self._read = self._compute = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of the slots."""
        return sum(matrix.nbytes for matrix in self._matrices)

    def counts(self) -> ExpertCounts:
        """Since the start. Nothing is computed beside a read here: the wait is the read."""
        return ExpertCounts(self._hits, self._misses, 0, 0, self._bytes, self._read, self._read, self._compute)

    def gather(self, x: mx.array, experts: mx.array) -> mx.array:
        """x [rows, dim] through experts [rows, k] -> [rows, k, dim]. Raises WeightsError."""
        rows, k = experts.shape
        chosen = np.array(experts).reshape(-1)
        wanted = sorted({int(e) for e in chosen}, key=lambda e: e not in self._places)  # those that are here, first
        self._hits += sum(e in self._places for e in wanted)
        out = mx.zeros((rows * k, x.shape[1]), x.dtype)
        for first in range(0, len(wanted), self.count):
            some = wanted[first : first + self.count]
            self._bring(some)
            start = time.perf_counter()
            places = np.zeros(self._experts, np.uint32)
            places[some] = [self._places[e] for e in some]
            index = mx.array(places[chosen].reshape(rows, k))
            forward = FeedForward(*(matrix.weight for matrix in self._matrices))
            if len(some) == len(wanted):
                out = forward.gather(x, index).reshape(rows * k, -1)
            else:
                pairs = np.flatnonzero(np.isin(chosen, some))
                part = forward.gather(x[mx.array(pairs // k)], index.reshape(-1, 1)[mx.array(pairs)])
                out[mx.array(pairs)] = part.reshape(len(pairs), -1)
            mx.eval(out)  # nothing may wait for slots that the next expert is put into
            self._compute += time.perf_counter() - start
        return out.reshape(rows, k, -1)

    def _bring(self, wanted: list[int]) -> None:
        """Have them in slots."""
        for expert in wanted:
            if expert in self._places:
                self._places.move_to_end(expert)
        missing = [expert for expert in wanted if expert not in self._places]
        for expert in missing:
            start = time.perf_counter()
            parts = [matrix.read(expert) for matrix in self._matrices]
            if len(self._places) < self.count:
                place = len(self._places)
            else:  # the oldest is not among the wanted: there are at least as many slots
                _, place = self._places.popitem(last=False)
            for matrix, arrays in zip(self._matrices, parts, strict=True):
                matrix.put(place, arrays)
                self._bytes += sum(array.nbytes for array in arrays)
            self._places[expert] = place
            self._misses += 1
            self._read += time.perf_counter() - start


class _Slots:
    """One stack: arrays [slots, ...] on the device, and where each expert lies in files."""

    def __init__(self, matrix: Matrix, count: int, dtype: mx.Dtype) -> None:
        self._matrix, self._dtype = matrix, dtype
        if isinstance(matrix, QuantizedTensor):
            self._sources, kinds = [matrix.weight, matrix.scales, matrix.biases], [mx.uint32, dtype, dtype]
        else:
            self._sources, kinds = [matrix.data], [dtype]
        self._arrays = [mx.zeros((count, *s.shape[1:]), kind) for s, kind in zip(self._sources, kinds, strict=True)]
        mx.eval(*self._arrays)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._arrays)

    @property
    def weight(self) -> Weight:
        """The slots as a stack of experts."""
        if isinstance(self._matrix, QuantizedTensor):
            codes, scales, biases = self._arrays
            return QuantizedWeight(codes, scales, biases, self._matrix.bits, self._matrix.group_size)
        return DenseWeight(self._arrays[0])

    def read(self, expert: int) -> list[npt.NDArray[np.generic]]:
        """The expert's arrays, as stored."""
        stored = self._matrix.stored
        return [_read(place, array, expert) for place, array in zip(stored, self._sources, strict=True)]

    def put(self, place: int, arrays: list[npt.NDArray[np.generic]]) -> None:
        for i, array in enumerate(arrays):
            self._arrays[i][place] = to_device(array).astype(self._arrays[i].dtype)
        mx.eval(*self._arrays)


def _read(place: StoredArray, like: npt.NDArray[np.generic], expert: int) -> npt.NDArray[np.generic]:
    each = place.nbytes // len(like)
    offset = place.offset + expert * each
    try:
        with place.file.open("rb") as file:
            data = os.pread(file.fileno(), each, offset)
    except OSError as error:
        raise _unreadable(place.file, offset, error.strerror or str(error)) from error
    if len(data) != each:
        raise _unreadable(place.file, offset, f"{len(data)} bytes where {each} should be")
    return np.frombuffer(data, like.dtype).reshape(like.shape[1:])


def _unreadable(file: Path, offset: int, why: str) -> WeightsError:
    return WeightsError(f"{file}: weights at byte {offset} cannot be read: {why}; check the disk, or download it again")


def make_slots(program: Program, memory: ExpertMemory, dtype: mx.Dtype) -> Mapping[Moe, ExpertSlots]:
    """As many slots in each layer as fit in memory.host bytes. Raises BackendError if that is not one in each."""
    nodes = list(streamable(program))
    if mx.cuda.is_available() and any(getattr(m, "bits", 0) == 1 for node in nodes for m in stacks(node)):
        raise BackendError("MLX's CUDA build has no 1-bit codes, so experts of 1 bit cannot be streamed: use the CPU")
    each = sum(_slot_bytes(node, dtype.size) for node in nodes)
    count = memory.host // each if each else 0
    if count < 1:
        raise BackendError(f"{memory.host} bytes of memory for experts; one in each layer takes {each}: give more")
    return {node: ExpertSlots(node, min(count, int(node.spec.experts.gate.experts or 1)), dtype) for node in nodes}
