"""Tensors of a checkpoint as the converter reads them: rows that are dequantized on the way.

A source may be put together from several stored tensors (experts stored one by one) or be a part of
one (fused gate and up projections). Everything is a view of mapped files until rows are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mixbit.engine.convert.widths import Width
from mixbit.engine.convert.writer import Array
from mixbit.kernels.quantize import dequantize
from mixbit.kernels.spec import QuantizedTensor


@dataclass(frozen=True, eq=False)
class Codes:
    """The parts of a quantized matrix: weight uint32 [rows, words], scales and biases [rows, groups]."""

    weight: Array
    scales: Array
    biases: Array
    width: Width


@dataclass(frozen=True, eq=False)
class Source:
    """A tensor of the checkpoint to be written.

    module and parameter: its path within the text model; stored: the module's path in the new file.
    shape: of its values, [..., rows, in] or [n]. dtype: of the values, or of the scales if quantized.
    pieces: [rows, in] each, one after another; or `codes` instead. plus_one: values are stored around zero.
    """

    module: str
    stored: str
    parameter: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    pieces: tuple[Array, ...] = ()
    codes: Codes | None = None
    plus_one: bool = False

    @property
    def in_dim(self) -> int:
        """Values in a row."""
        return self.shape[-1]

    @property
    def rows(self) -> int:
        """Rows of all leading dimensions together."""
        return math.prod(self.shape[:-1])

    @property
    def quantizable(self) -> bool:
        """Whether it is the weight of a linear layer, an embedding or a stack of experts."""
        return self.parameter == "weight" and len(self.shape) > 1 and not self.module.endswith("conv1d")

    @property
    def width(self) -> Width | None:
        """Its width now, None if unquantized."""
        return self.codes.width if self.codes else None

    def spans(self, values: int) -> Iterator[tuple[int, int]]:
        """Ranges of rows that hold about `values` values each."""
        step = max(1, values // max(1, self.in_dim))
        for start in range(0, self.rows, step):
            yield start, min(start + step, self.rows)

    def values(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows start to stop in float32: [stop - start, in]."""
        if self.codes is not None:
            part = slice(start, stop)
            codes = self.codes
            width = codes.width
            return dequantize(
                QuantizedTensor(
                    self.stored,
                    codes.weight[part],
                    codes.scales[part],
                    codes.biases[part],
                    width.bits,
                    width.group_size,
                    "affine",
                )
            )
        values = np.concatenate([piece.astype(np.float32) for piece in self._pieces(start, stop)])
        return values + np.float32(1) if self.plus_one else values

    def dense(self, start: int, stop: int, dtype: np.dtype[Any]) -> Array:
        """Rows start to stop in `dtype`, unchanged where they have it."""
        if self.codes is None and not self.plus_one and self.dtype == dtype:
            return np.concatenate(self._pieces(start, stop))
        return self.values(start, stop).astype(dtype)

    def _pieces(self, start: int, stop: int) -> list[Array]:
        parts = []
        begin = 0
        for piece in self.pieces:
            low, high = max(start - begin, 0), min(stop - begin, len(piece))
            if low < high:
                parts.append(piece[low:high])
            begin += len(piece)
        return parts
