"""Experts in slots on the device: what tokens choose is read from its file when it is not there.

The slots are the first tier; the operating system's page cache, in what main memory is free, the second; the disk the
third. Each layer has slots of its own, and gives up the expert that was not chosen for the longest time.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
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
_FEWEST = 2  # slots of a layer: MLX's CUDA build does not gather from a stack of one
_READERS = 8  # reads under way at once: what keeps a fast disk busy
_AT_ONCE = 16  # experts that are read before they are put in their slots: some tens of megabytes of main memory

Array = npt.NDArray[np.generic]


def least_bytes(program: Program) -> int:
    """The fewest slots, in each layer."""
    return _FEWEST * sum(_slot_bytes(node, _WIDEST) for node in streamable(program))


def _slot_bytes(node: Moe, width: int) -> int:
    """One expert on the device, values of `width` bytes."""
    return sum(_matrix_bytes(matrix, width) for matrix in stacks(node))


def _matrix_bytes(matrix: Matrix, width: int) -> int:
    if isinstance(matrix, QuantizedTensor):
        codes, scales = matrix.weight, matrix.scales
        return int(codes[0].nbytes + 2 * width * scales[0].size)
    return int(width * matrix.data[0].size)


class _Staging:
    """Main memory that experts are read into, the same for all layers, and the threads that read."""

    def __init__(self) -> None:
        self.readers = ThreadPoolExecutor(_READERS, thread_name_prefix="experts")
        self._buffers: dict[tuple[object, ...], Array] = {}

    def buffer(self, number: int, like: Array, count: int) -> Array:
        """Of `count` experts, for the array `number` of a layer, stacked as `like` is."""
        key = (number, like.shape[1:], like.dtype)
        if key not in self._buffers:
            self._buffers[key] = np.empty((_AT_ONCE, *like.shape[1:]), like.dtype)
        return self._buffers[key][:count]


class ExpertSlots:
    """The experts of one node; stands for its `FeedForward` where experts are gathered."""

    def __init__(self, node: Moe, count: int, dtype: mx.Dtype, staging: _Staging) -> None:
        """count: slots. dtype: of activations, scales and dense values."""
        self.count, self._staging = count, staging
        self._experts = int(node.spec.experts.gate.experts or 1)
        self._matrices = [_Slots(matrix, count, dtype) for matrix in stacks(node)]
        self._places: OrderedDict[int, int] = OrderedDict()  # slot by expert, the latest chosen last
        self._empty = list(range(count))
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
            del forward  # or they would be copied then
            self._compute += time.perf_counter() - start
        return out.reshape(rows, k, -1)

    def _bring(self, wanted: list[int]) -> None:
        """Have them in slots."""
        for expert in wanted:
            if expert in self._places:
                self._places.move_to_end(expert)
        missing = [expert for expert in wanted if expert not in self._places]
        for first in range(0, len(missing), _AT_ONCE):
            start = time.perf_counter()
            some = missing[first : first + _AT_ONCE]
            buffers = [
                [self._staging.buffer(3 * number + i, array, len(some)) for i, array in enumerate(matrix.sources)]
                for number, matrix in enumerate(self._matrices)
            ]
            reads = [
                self._staging.readers.submit(_read, place, expert, target)
                for matrix, arrays in zip(self._matrices, buffers, strict=True)
                for place, expert, target in matrix.reads(some, arrays)
            ]
            wait(reads)  # of one that failed too: what is read next goes to the same memory
            self._bytes += sum([read.result() for read in reads])
            places = [self._free_place() for _ in some]
            for matrix, arrays in zip(self._matrices, buffers, strict=True):
                matrix.put(places, arrays)
            self._places.update(zip(some, places, strict=True))
            self._misses += len(some)
            self._read += time.perf_counter() - start

    def _free_place(self) -> int:
        """An empty slot, or that of the oldest, which is not among the wanted: there are at least as many slots."""
        return self._empty.pop() if self._empty else self._places.popitem(last=False)[1]


class _Slots:
    """One stack: arrays [slots, ...] on the device, and where each expert lies in files."""

    def __init__(self, matrix: Matrix, count: int, dtype: mx.Dtype) -> None:
        self._matrix, self._dtype = matrix, dtype
        if isinstance(matrix, QuantizedTensor):
            self.sources, kinds = [matrix.weight, matrix.scales, matrix.biases], [mx.uint32, dtype, dtype]
        else:
            self.sources, kinds = [matrix.data], [dtype]
        self._arrays = [mx.zeros((count, *s.shape[1:]), kind) for s, kind in zip(self.sources, kinds, strict=True)]
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

    def reads(self, experts: Sequence[int], buffers: Sequence[Array]) -> Iterator[tuple[StoredArray, int, Array]]:
        """What is to be read whence, and whither."""
        for place, buffer in zip(self._matrix.stored, buffers, strict=True):
            yield from ((place, expert, target) for expert, target in zip(experts, buffer, strict=True))

    def put(self, places: Sequence[int], arrays: Sequence[Array]) -> None:
        """Copy experts into their slots, one by one: MLX scatters at a fifth of a copy's speed."""
        for i, array in enumerate(arrays):
            for place, one in zip(places, array, strict=True):
                self._arrays[i][place] = to_device(one).astype(self._arrays[i].dtype)
        mx.eval(*self._arrays)


def _read(place: StoredArray, expert: int, target: Array) -> int:
    """Fill `target` with an expert's part of a stored stack; the bytes read. Raises WeightsError."""
    offset, room = place.offset + expert * target.nbytes, target.reshape(-1).view(np.uint8).data
    done = 0
    try:
        with place.file.open("rb", buffering=0) as file:
            while done < len(room) and (got := os.preadv(file.fileno(), [room[done:]], offset + done)):
                done += got
    except OSError as error:
        raise _unreadable(place.file, offset, error.strerror or str(error)) from error
    if done != len(room):
        raise _unreadable(place.file, offset, f"{done} bytes where {len(room)} should be")
    return done


def _unreadable(file: Path, offset: int, why: str) -> WeightsError:
    return WeightsError(f"{file}: weights at byte {offset} cannot be read: {why}; check the disk, or download it again")


def make_slots(program: Program, memory: ExpertMemory, dtype: mx.Dtype) -> Mapping[Moe, ExpertSlots]:
    """As many slots in each layer as fit in memory.nbytes. Raises BackendError if those are too few."""
    nodes = list(streamable(program))
    if mx.cuda.is_available() and any(getattr(m, "bits", 0) == 1 for node in nodes for m in stacks(node)):
        raise BackendError("MLX's CUDA build has no 1-bit codes, so experts of 1 bit cannot be streamed: use the CPU")
    each = sum(_slot_bytes(node, dtype.size) for node in nodes)
    count = memory.nbytes // each if each else 0
    if count < _FEWEST:
        raise BackendError(
            f"{memory.nbytes} bytes of memory for experts; {_FEWEST} in each layer take {_FEWEST * each}: give more"
        )
    staging = _Staging()
    return {
        node: ExpertSlots(node, min(count, int(node.spec.experts.gate.experts or 1)), dtype, staging) for node in nodes
    }
