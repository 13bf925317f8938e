"""Reads .safetensors files: memory-mapped, and checked in full before any tensor is handed out.

Format: 8 bytes little-endian length, a JSON header {name: {dtype, shape, data_offsets}}, then the
tensors' bytes without holes (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from mixbit.engine.errors import CheckpointError
from mixbit.kernels.spec import StoredArray

MAX_HEADER_BYTES = 100_000_000

# Bits per value of every dtype the format knows; those without a NumPy type can be listed but not read.
_DTYPE_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
_NUMPY_DTYPES: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype("<u4"),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
}


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """One tensor of a file: nothing of it is read before `array`. start and end: bytes from the file's begin."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    buffer: mmap.mmap

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.end - self.start

    @property
    def place(self) -> StoredArray:
        """Where its bytes lie."""
        return StoredArray(self.file, self.start, self.nbytes)

    def array(self) -> npt.NDArray[Any]:
        """A read-only view into the mapped file, without copying; it may be unaligned for its dtype.

        Raises CheckpointError for a dtype that no model here uses.
        """
        dtype = _NUMPY_DTYPES.get(self.dtype)
        if dtype is None:
            raise CheckpointError(
                f"{self.name} in {self.file.name} has dtype {self.dtype}; supported: {', '.join(_NUMPY_DTYPES)}"
            )
        return np.ndarray(self.shape, dtype=dtype, buffer=self.buffer, offset=self.start)


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by name, in the order of their bytes.

    Raises CheckpointError if the file is truncated, or its header contradicts the file or itself.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if size < 8:
                raise CheckpointError(f"{path}: {size} bytes, too short for a safetensors file; download it again")
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    length = int.from_bytes(buffer[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: header length {length} is over the limit of {MAX_HEADER_BYTES}: "
            "not a safetensors file, or corrupt"
        )
    if 8 + length > size:
        raise CheckpointError(
            f"{path}: header of {length} bytes does not fit the file of {size} bytes: truncated or corrupt; "
            "download it again"
        )
    tensors = [
        _parse_entry(path, name, entry, 8 + length, buffer)
        for name, entry in _parse_header(path, buffer[8 : 8 + length]).items()
        if name != "__metadata__"
    ]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    _check_layout(path, tensors, 8 + length, size)
    return {tensor.name: tensor for tensor in tensors}


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{path}: {twice!r} appears twice in the header")
        return found

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not valid JSON ({error}): corrupt file") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object: corrupt file")
    return header


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _parse_entry(path: Path, name: str, entry: Any, data_start: int, buffer: mmap.mmap) -> StoredTensor:
    where = f"{path}: tensor {name}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(f"{where}: expected dtype, shape and data_offsets, found {entry!r}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        raise CheckpointError(f"{where}: unknown dtype {dtype!r}; the format has {', '.join(_DTYPE_BITS)}")
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise CheckpointError(f"{where}: shape {shape!r} is not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise CheckpointError(f"{where}: data_offsets {offsets!r} are not two offsets")
    start, end = offsets
    bits = math.prod(shape) * _DTYPE_BITS[dtype]
    if (end - start) * 8 != bits:
        raise CheckpointError(
            f"{where}: data_offsets {offsets} span {end - start} bytes, but {dtype} {shape} takes {bits / 8:.0f}"
        )
    return StoredTensor(name, path, dtype, tuple(shape), data_start + start, data_start + end, buffer)


def _check_layout(path: Path, tensors: list[StoredTensor], data_start: int, size: int) -> None:
    """The tensors, in order of offset, must tile the rest of the file exactly."""
    position = data_start
    for tensor in tensors:
        if tensor.end > size:
            raise CheckpointError(
                f"{path}: tensor {tensor.name} ends at byte {tensor.end}, but the file has {size} bytes: "
                "truncated; download it again"
            )
        if tensor.start != position:
            what = "overlaps the tensor before it" if tensor.start < position else "leaves a hole before it"
            raise CheckpointError(
                f"{path}: tensor {tensor.name} starts at byte {tensor.start}, expected {position}: it {what}"
            )
        position = tensor.end
    if position != size:
        raise CheckpointError(f"{path}: the tensors end at byte {position}, but the file has {size} bytes")
