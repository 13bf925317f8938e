"""Opening .safetensors files: what is mapped, and every way in which a file can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixbit.engine.errors import CheckpointError
from mixbit.engine.safetensors import MAX_HEADER_BYTES, open_safetensors
from tests.checkpoints import Array, write_safetensors


def write_raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str, shape: list[Any], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def test_reads_what_was_written(file: Path) -> None:
    tensors: dict[str, Array] = {
        "byte": np.arange(3, dtype=np.uint8),  # leaves the ones that follow unaligned
        "words": np.arange(8, dtype=np.uint32).reshape(2, 4),
        "bf16": np.arange(6).astype(ml_dtypes.bfloat16).reshape(3, 2),
        "f32": np.linspace(0, 1, 5, dtype=np.float32),
        "empty": np.zeros((0, 4), np.float16),
    }
    write_safetensors(file, tensors)
    opened = open_safetensors(file)
    assert list(opened) == list(tensors)
    for name, value in tensors.items():
        array = opened[name].array()
        assert array.dtype == value.dtype
        assert array.shape == value.shape
        assert array.tobytes() == value.tobytes()
        assert opened[name].nbytes == value.nbytes


def test_arrays_are_read_only_views_of_the_file(file: Path) -> None:
    write_safetensors(file, {"a": np.zeros(4, np.float32)})
    array = open_safetensors(file)["a"].array()
    assert not array.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    with file.open("r+b") as writer:  # a view sees what is written to the file; a copy would not
        writer.seek(-4, 2)
        writer.write(np.float32(7).tobytes())
    assert array[3] == 7


def test_unused_dtypes_are_refused_only_when_read(file: Path) -> None:
    write_raw(file, {"wide": entry("F64", [2], 0, 16), "a": entry("U8", [1], 16, 17)}, bytes(17))
    opened = open_safetensors(file)
    assert opened["a"].array().tolist() == [0]
    with pytest.raises(CheckpointError, match=r"wide in model\.safetensors has dtype F64; supported: F32, F16, BF16"):
        opened["wide"].array()


def test_metadata_is_not_a_tensor(file: Path) -> None:
    write_raw(file, {"__metadata__": {"format": "mlx"}})
    assert open_safetensors(file) == {}


A = entry("F32", [2], 0, 8)

BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "0 bytes, too short"),
    "header length over the limit": (
        lambda p: write_raw(p, {"a": A}, bytes(8), length=MAX_HEADER_BYTES + 1),
        f"header length {MAX_HEADER_BYTES + 1} is over the limit of {MAX_HEADER_BYTES}",
    ),
    "header longer than the file": (lambda p: write_raw(p, {}, length=4000), "header of 4000 bytes does not fit"),
    "header cut": (lambda p: write_raw(p, b'{"a": {"dtype"'), "not valid JSON"),
    "header not UTF-8": (lambda p: write_raw(p, b'{"\xff": 1}'), "not valid JSON"),
    "header nested too deeply": (lambda p: write_raw(p, b"[" * 200_000), "not valid JSON"),
    "header not an object": (lambda p: write_raw(p, [1]), "not a JSON object"),
    "duplicate tensor": (
        lambda p: write_raw(p, f'{{"a": {json.dumps(A)}, "a": {json.dumps(A)}}}'.encode(), bytes(8)),
        "'a' appears twice",
    ),
    "entry without offsets": (
        lambda p: write_raw(p, {"a": {"dtype": "F32", "shape": [2]}}),
        "tensor a: expected dtype",
    ),
    "entry not an object": (lambda p: write_raw(p, {"a": 5}), "tensor a: expected dtype, shape and data_offsets"),
    "unknown dtype": (lambda p: write_raw(p, {"a": entry("F31", [2], 0, 8)}, bytes(8)), "unknown dtype 'F31'"),
    "dtype not a string": (lambda p: write_raw(p, {"a": entry([], [2], 0, 8)}, bytes(8)), "unknown dtype []"),  # type: ignore[arg-type]
    "negative size": (lambda p: write_raw(p, {"a": entry("F32", [-2], 0, 8)}, bytes(8)), "shape [-2] is not a list"),
    "fractional size": (lambda p: write_raw(p, {"a": entry("F32", [2.0], 0, 8)}, bytes(8)), "shape [2.0] is not a"),
    "boolean size": (lambda p: write_raw(p, {"a": entry("F32", [True], 0, 4)}, bytes(4)), "shape [True] is not a"),
    "negative offset": (lambda p: write_raw(p, {"a": entry("F32", [2], -8, 0)}, bytes(8)), "are not two offsets"),
    "offsets against shape": (
        lambda p: write_raw(p, {"a": entry("F32", [3], 0, 8)}, bytes(8)),
        "tensor a: data_offsets [0, 8] span 8 bytes, but F32 [3] takes 12",
    ),
    "end before start": (lambda p: write_raw(p, {"a": entry("F32", [0], 8, 0)}, bytes(8)), "span -8 bytes"),
    "size that overflows 64 bits": (
        lambda p: write_raw(p, {"a": entry("F32", [2**40, 2**40], 0, 0)}),
        "span 0 bytes, but F32",
    ),
    "truncated data": (
        lambda p: write_raw(p, {"a": A, "b": entry("F32", [4], 8, 24)}, bytes(20)),
        "tensor b ends at byte",
    ),
    "overlap": (
        lambda p: write_raw(p, {"a": A, "b": entry("F32", [2], 4, 12)}, bytes(12)),
        "overlaps the tensor before it",
    ),
    "hole": (lambda p: write_raw(p, {"a": A, "b": entry("F32", [2], 12, 20)}, bytes(20)), "leaves a hole before it"),
    "bytes after the last tensor": (lambda p: write_raw(p, {"a": A}, bytes(9)), "the tensors end at byte"),
}


@pytest.mark.parametrize("fault", BAD_FILES)
def test_bad_file_is_refused(file: Path, fault: str) -> None:
    write, message = BAD_FILES[fault]
    write(file)
    with pytest.raises(CheckpointError) as caught:
        open_safetensors(file)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)


def test_truncated_file_names_both_sizes(file: Path) -> None:
    write_safetensors(file, {"a": np.zeros(100, np.float32)})
    whole = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=rf"tensor a ends at byte {whole}, but the file has {whole - 10} bytes"):
        open_safetensors(file)


def test_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        open_safetensors(tmp_path / "absent.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        open_safetensors(tmp_path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 400), value=st.integers(0, 255), cut=st.integers(0, 400))
def test_a_damaged_file_never_reaches_beyond_itself(file: Path, position: int, value: int, cut: int) -> None:
    """One byte changed and the end cut off: refused with a message, or every tensor can be read in full."""
    write_safetensors(file, {"a": np.ones((3, 5), np.float32), "b": np.ones(7, np.uint32), "c": np.ones(2, np.uint8)})
    data = bytearray(file.read_bytes())
    data[position % len(data)] = value
    file.write_bytes(data[: len(data) - cut % 3])
    try:
        opened = open_safetensors(file)
    except CheckpointError:
        return
    for tensor in opened.values():
        if tensor.dtype in {"F32", "U32", "U8"}:
            assert tensor.array().nbytes == tensor.nbytes
