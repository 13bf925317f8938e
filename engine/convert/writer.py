"""Writes safetensors directories tensor by tensor, so that a model never has to fit in memory.

Format: github.com/huggingface/safetensors (an 8-byte length, a JSON header, the data without gaps).
Shards and their index follow the hub's convention: `model-00001-of-00002.safetensors` and
`model.safetensors.index.json`; a single file is `model.safetensors`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import numpy.typing as npt

Progress = Callable[[str, int, int], None]
Array = npt.NDArray[Any]

SHARD_BYTES = 5_000_000_000

_DTYPES: dict[np.dtype[Any], str] = {
    np.dtype(np.uint32): "U32",
    np.dtype(np.uint8): "U8",
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
}


@dataclass(frozen=True)
class TensorInfo:
    """Name, dtype and shape of a tensor to be written."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Item:
    """Tensors that are made together: a quantized matrix is three (codes, scales, biases), a dense one is one.

    chunks() yields tuples with one array for each tensor: its next values in C order. All chunks together
    are the tensors; only one chunk is in memory at a time.
    """

    tensors: tuple[TensorInfo, ...]
    chunks: Callable[[], Iterator[tuple[Array, ...]]]

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


def write_model(directory: Path, items: Sequence[Item], progress: Progress, shard_bytes: int = SHARD_BYTES) -> int:
    """Write `items` into `directory` as one or more safetensors files; returns the bytes of all tensors.

    A shard holds at most `shard_bytes`, unless one item alone is larger; items are never split.
    """
    shards = _shards(items, shard_bytes)
    total = sum(item.nbytes for item in items)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress("writing", done, total)

    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        _write_shard(directory / name, shard, advance)
        weight_map |= {tensor.name: name for item in shard for tensor in item.tensors}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return total


def _shards(items: Sequence[Item], shard_bytes: int) -> list[list[Item]]:
    shards: list[list[Item]] = [[]]
    size = 0
    for item in items:
        if shards[-1] and size + item.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.nbytes
    return shards


def _write_shard(path: Path, items: Sequence[Item], advance: Callable[[int], None]) -> None:
    # Gaps are not allowed, so the widest types come first: then every tensor is aligned to its type.
    tensors = sorted((t for item in items for t in item.tensors), key=lambda t: -t.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    position = 0
    offsets: dict[str, int] = {}
    for tensor in tensors:
        end = position + tensor.nbytes
        header[tensor.name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        offsets[tensor.name] = position
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)  # the data starts on a cache line
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for item in items:
            _write_item(file, item, [8 + len(text) + offsets[t.name] for t in item.tensors], advance)
        file.flush()
        os.fsync(file.fileno())


def _write_item(file: BinaryIO, item: Item, starts: list[int], advance: Callable[[int], None]) -> None:
    positions = list(starts)
    for chunk in item.chunks():
        for index, (tensor, array) in enumerate(zip(item.tensors, chunk, strict=True)):
            if array.dtype != tensor.dtype:
                raise AssertionError(f"{tensor.name}: a chunk of {array.dtype}, announced {tensor.dtype}")
            file.seek(positions[index])
            file.write(np.ascontiguousarray(array).view(np.uint8).data)
            positions[index] += array.nbytes
        advance(sum(array.nbytes for array in chunk))
    for tensor, start, end in zip(item.tensors, starts, positions, strict=True):
        if end - start != tensor.nbytes:
            raise AssertionError(f"{tensor.name}: wrote {end - start} bytes, announced {tensor.nbytes}")
