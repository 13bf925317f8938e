"""Reads the GGUF container: metadata and tensor views, every length checked against the file.

The format is described at github.com/ggml-org/ggml/blob/master/docs/gguf.md. Names and sizes of the
types come from the `gguf` package; its own reader is not used because it makes two array objects a
string (seconds for a vocabulary) and trusts the lengths it reads.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from mixbit.engine.convert.errors import ConvertError

_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
_VERSIONS = (2, 3)
_MAX_DIMS = 4


@dataclass(frozen=True, eq=False)
class GgufTensor:
    """One tensor: shape in NumPy order (rows first), `data` the raw blocks as uint8 [rows, bytes per row]."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    data: npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class GgufFile:
    """A parsed file. `metadata` values are int, float, bool, str or lists of them."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


class _Cursor:
    """Reads forward through the header; running out of the file is a ConvertError."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def fail(self, what: str) -> ConvertError:
        return ConvertError(f"{self.path}: {what}, at byte {self.at} of {len(self.data)}")

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise self.fail(f"the file ends where {count} more bytes are announced (truncated download?)")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        raw = self.take(self.number("Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.fail(f"a string is not UTF-8: {raw[:40]!r}") from None

    def value_type(self) -> GGUFValueType:
        number = self.number("I")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise self.fail(f"unknown metadata type {number}") from None

    def value(self, kind: GGUFValueType) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        return self.text() if kind == GGUFValueType.STRING else self.array()

    def array(self) -> list[Any]:
        kind, count = self.value_type(), self.number("Q")
        if kind in _SCALARS:
            code = _SCALARS[kind]
            raw = self.take(count * struct.calcsize("<" + code))
            return list(struct.unpack(f"<{count}{code}", raw))
        # Each element takes 8 bytes at least: an absurd count fails here and not after filling the memory.
        if count * 8 > len(self.data) - self.at:
            raise self.fail(f"an array of {count} elements does not fit in the file (truncated download?)")
        read: Callable[[], Any] = self.text if kind == GGUFValueType.STRING else self.array
        return [read() for _ in range(count)]


def read_gguf(path: Path) -> GgufFile:
    """Parse the header of `path` and map its tensors without reading them.

    Raises ConvertError if the file is not GGUF version 2 or 3 in little-endian order, is truncated, or if a
    tensor lies outside of it.
    """
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise ConvertError(f"{path}: the file is empty") from None
    except OSError as error:
        raise ConvertError(f"{path}: {error.strerror}") from None
    cursor = _Cursor(path, data)
    if data[:4] != b"GGUF":
        raise ConvertError(f"{path}: not a GGUF file (it starts with {data[:4]!r}, expected b'GGUF')")
    cursor.at = 4
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise cursor.fail(f"GGUF version {version} (supported: 2 and 3, little-endian)")
    tensor_count, value_count = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.value_type())
    return GgufFile(path, metadata, _read_tensors(cursor, tensor_count, metadata))


def _read_tensors(cursor: _Cursor, count: int, metadata: Mapping[str, Any]) -> dict[str, GgufTensor]:
    infos = [_read_info(cursor) for _ in range(count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise cursor.fail(f"general.alignment is {alignment!r}, expected a power of two")
    start = -(-cursor.at // alignment) * alignment
    whole = np.frombuffer(cursor.data, np.uint8)
    tensors: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in infos:
        block, size = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise ConvertError(f"{cursor.path}: {name}: rows of {shape[-1]} values in {kind.name} blocks of {block}")
        if name in tensors:
            raise ConvertError(f"{cursor.path}: {name}: two tensors of this name")
        rows, row_bytes = math.prod(shape[:-1]), shape[-1] // block * size
        begin, end = start + offset, start + offset + rows * row_bytes
        if end > len(whole):
            raise ConvertError(
                f"{cursor.path}: {name}: data at bytes {begin} to {end}, but the file has {len(whole)} "
                "(truncated download?)"
            )
        tensors[name] = GgufTensor(name, shape, kind, whole[begin:end].reshape(rows, row_bytes))
    return tensors


def _read_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
    name, dims = cursor.text(), cursor.number("I")
    if not 1 <= dims <= _MAX_DIMS:
        raise cursor.fail(f"{name}: {dims} dimensions")
    shape = tuple(reversed([cursor.number("Q") for _ in range(dims)]))
    number, offset = cursor.number("I"), cursor.number("Q")
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise cursor.fail(f"{name}: unknown tensor type {number}") from None
    return name, shape, kind, offset
