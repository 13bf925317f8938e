"""NumPy arrays on an MLX device."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
import numpy.typing as npt

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
