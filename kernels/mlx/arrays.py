"""NumPy arrays on an MLX device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mixbit.kernels.executor import Bytes
from mixbit.kernels.ops import Columns

DTYPES: dict[str, mx.Dtype] = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}

Values = dict[int, mx.array]
"""Activations of a step: [rows, dim] by the index of the program's value."""


def to_device(array: npt.NDArray[Any]) -> mx.array:
    """A copy of `array` on the current device; bfloat16 (ml_dtypes) keeps its bits."""
    if array.dtype == ml_dtypes.bfloat16:
        return mx.array(array.view(np.uint16)).view(mx.bfloat16)
    return mx.array(array)


def heads_of(columns: Columns, values: Values, count: int, width: int) -> mx.array:
    """[rows, count, width]: `width` values for each of `count` heads, without a copy."""
    x = values[columns.value.index]
    return mx.as_strided(x, (x.shape[0], count, width), (x.shape[1], columns.stride, 1), columns.offset)


def to_bytes(arrays: Sequence[mx.array]) -> Bytes:
    """The bytes of the arrays, one after another."""
    parts = [np.array(array.reshape(-1).view(mx.uint8)) for array in arrays]
    return np.concatenate([np.zeros(0, np.uint8), *parts])


def from_bytes(data: Bytes, like: Sequence[mx.array]) -> Iterator[mx.array]:
    """Arrays of the shapes and dtypes of `like`, from what `to_bytes` gave. Raises ValueError if the size differs."""
    size = sum(array.nbytes for array in like)
    if data.nbytes != size:
        raise ValueError(f"{data.nbytes} bytes, expected {size}")
    parts = []
    for array in like:
        part, data = data[: array.nbytes], data[array.nbytes :]
        parts.append(mx.array(part).view(array.dtype).reshape(array.shape))
    return iter(parts)
