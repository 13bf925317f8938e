"""Weights as they lie in a checkpoint, and how a matrix is applied.

A `QuantizedTensor` is what MLX stores: packed codes, scales and biases. A `DenseTensor` is an
unquantized one. Both may be stacked: one leading dimension of experts. `BatchMatvecSpec` applies one
matrix to an input that it shares with the other specs of its batch, whatever their widths.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

BITS = (1, 2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
FLOAT_DTYPES: tuple[np.dtype[Any], ...] = (
    np.dtype(np.float32),
    np.dtype(np.float16),
    np.dtype(ml_dtypes.bfloat16),
)

Mode = Literal["affine"]


class SpecError(ValueError):
    """A tensor whose parts contradict each other; the message names it and says which."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise SpecError(message)


def _check_stored(name: str, stored: tuple[StoredArray, ...], arrays: tuple[npt.NDArray[Any], ...]) -> None:
    sizes = [array.nbytes for array in arrays]
    _require(
        not stored or [each.nbytes for each in stored] == sizes,
        f"{name}: arrays of {sizes} bytes, stored in {[each.nbytes for each in stored]}",
    )


@dataclass(frozen=True)
class StoredArray:
    """Where an array lies on disk: `nbytes` bytes from `offset` on, as they are in memory."""

    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True, eq=False)
class DenseTensor:
    """An unquantized tensor: data [..., out, in] or [n], float32, float16 or bfloat16.

    stored: where data lies on disk; empty if it is in memory alone.
    """

    name: str
    data: npt.NDArray[Any]
    stored: tuple[StoredArray, ...] = ()

    def __post_init__(self) -> None:
        _check_stored(self.name, self.stored, (self.data,))
        _require(
            self.data.dtype in FLOAT_DTYPES,
            f"{self.name}: dtype {self.data.dtype} is not one of float32, float16, bfloat16",
        )

    @property
    def out_dim(self) -> int:
        """Rows of the matrix."""
        return int(self.data.shape[-2])

    @property
    def in_dim(self) -> int:
        """Columns of the matrix: the length of the input it is applied to."""
        return int(self.data.shape[-1])

    @property
    def experts(self) -> int | None:
        """Length of the leading dimension of a stack, or None for a single matrix."""
        return int(self.data.shape[0]) if self.data.ndim == 3 else None

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return int(self.data.nbytes)


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """An affine-quantized matrix or stack of matrices: w = scale * code + bias, per group of columns.

    weight: uint32 [..., out, in * bits / 32]; each row is one little-endian, LSB-first bit stream.
    scales, biases: [..., out, in / group_size], float32, float16 or bfloat16.
    `bits` and `group_size` are required: no width is ever assumed.
    stored: where weight, scales and biases lie on disk, in this order; empty if they are in memory alone.
    """

    name: str
    weight: npt.NDArray[np.uint32]
    scales: npt.NDArray[Any]
    biases: npt.NDArray[Any]
    bits: int
    group_size: int
    mode: Mode
    stored: tuple[StoredArray, ...] = ()

    def __post_init__(self) -> None:
        name, weight, scales = self.name, self.weight, self.scales
        _require(self.mode == "affine", f"{name}: mode {self.mode!r} has no kernel; supported: affine")
        _require(self.bits in BITS, f"{name}: {self.bits} bits is not one of {BITS}")
        _require(self.group_size in GROUP_SIZES, f"{name}: group size {self.group_size} is not one of {GROUP_SIZES}")
        _require(weight.dtype == np.uint32, f"{name}.weight: dtype {weight.dtype}, expected uint32")
        _require(weight.ndim in (2, 3), f"{name}.weight: shape {weight.shape}, expected 2 or 3 dimensions")
        _require(scales.dtype in FLOAT_DTYPES, f"{name}.scales: dtype {scales.dtype} is not a float type")
        _require(
            self.biases.dtype == scales.dtype,
            f"{name}: dtype of scales {scales.dtype} and biases {self.biases.dtype} differ",
        )
        expected = (*weight.shape[:-1], self.in_dim // self.group_size)
        _require(
            weight.shape[-1] * 32 == self.in_dim * self.bits and self.in_dim % self.group_size == 0,
            f"{name}.weight: shape {weight.shape} does not hold rows of {self.bits}-bit groups of {self.group_size}",
        )
        for part, array in (("scales", scales), ("biases", self.biases)):
            _require(
                array.shape == expected,
                f"{name}.{part}: shape {array.shape}, but weight {weight.shape} at {self.bits} bits, "
                f"group {self.group_size} needs {expected}",
            )
        _check_stored(name, self.stored, (weight, scales, self.biases))

    @property
    def out_dim(self) -> int:
        """Rows of the matrix."""
        return int(self.weight.shape[-2])

    @property
    def in_dim(self) -> int:
        """Columns of the matrix, in values: packed words * 32 / bits."""
        return int(self.weight.shape[-1]) * 32 // self.bits

    @property
    def experts(self) -> int | None:
        """Length of the leading dimension of a stack, or None for a single matrix."""
        return int(self.weight.shape[0]) if self.weight.ndim == 3 else None

    @property
    def nbytes(self) -> int:
        """Bytes as stored: codes, scales and biases."""
        return int(self.weight.nbytes + self.scales.nbytes + self.biases.nbytes)


Matrix = QuantizedTensor | DenseTensor


@dataclass(frozen=True, eq=False)
class BatchMatvecSpec:
    """One matrix applied to an input that every spec of the batch shares: y = W x (+ bias).

    bias is the additive vector [out] of a linear layer, not the `biases` of the quantization.
    """

    matrix: Matrix
    bias: DenseTensor | None = None

    def __post_init__(self) -> None:
        matrix = self.matrix
        _require(matrix.experts is None, f"{matrix.name}: a stack of experts cannot be applied as one matrix")
        if self.bias is not None:
            _require(
                self.bias.data.shape == (matrix.out_dim,),
                f"{self.bias.name}: shape {self.bias.data.shape}, expected ({matrix.out_dim},)",
            )

    @property
    def out_dim(self) -> int:
        """Length of the output."""
        return self.matrix.out_dim

    @property
    def in_dim(self) -> int:
        """Length of the shared input."""
        return self.matrix.in_dim

    @property
    def bits(self) -> int | None:
        """Width of the codes, or None for an unquantized matrix."""
        return self.matrix.bits if isinstance(self.matrix, QuantizedTensor) else None
