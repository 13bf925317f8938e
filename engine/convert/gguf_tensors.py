"""GGUF tensors as MLX tensors, without loss.

Every block format here is affine in groups of 32 (ggml-common.h: block_q4_0, block_q4_1, block_q8_0):
Q4_0 is d * (q - 8), Q4_1 is d * q + m, Q8_0 is d * q with signed q. As scale * code + bias they are
(d, -8 d), (d, m) and (d, -128 d) with code = q + 128.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType as Type

from mixbit.engine.convert.errors import ConvertError
from mixbit.engine.convert.gguf_file import GgufTensor
from mixbit.engine.convert.writer import Array, Item, TensorInfo

GROUP_SIZE = 32
_CHUNK_BYTES = 16 << 20
_LARGEST_FLOAT16 = float(np.finfo(np.float16).max)

Bytes = npt.NDArray[np.uint8]
RowOrder = npt.NDArray[np.intp]

_DENSE: dict[Type, np.dtype[Any]] = {
    Type.F32: np.dtype(np.float32),
    Type.F16: np.dtype(np.float16),
    Type.BF16: np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class _Affine:
    """A block format: width of its codes, bytes in a block, and bias = `bias_factor` * d (None: stored, m)."""

    bits: int
    block_bytes: int
    bias_factor: int | None

    @property
    def code_bytes(self) -> int:
        return GROUP_SIZE * self.bits // 8


_AFFINE = {
    Type.Q4_0: _Affine(4, 18, -8),
    Type.Q4_1: _Affine(4, 20, None),
    Type.Q8_0: _Affine(8, 34, -128),
}
SUPPORTED = ", ".join(sorted(kind.name for kind in (*_AFFINE, *_DENSE)))


def bits_of(tensor: GgufTensor) -> int | None:
    """Width of the codes, or None for an unquantized tensor.

    Raises ConvertError naming the tensor and its type if the type has no lossless MLX form.
    """
    if tensor.type in _DENSE:
        return None
    if tensor.type not in _AFFINE:
        raise ConvertError(
            f"{tensor.name}: type {tensor.type.name} has no lossless MLX form (supported: {SUPPORTED}); "
            "use a GGUF of one of these types, or convert the original safetensors checkpoint"
        )
    return _AFFINE[tensor.type].bits


def as_item(tensor: GgufTensor, module: str, parameter: str, order: RowOrder | None = None) -> Item:
    """The tensor as MLX stores it: `module.parameter`, or `module.{weight,scales,biases}` if quantized.

    order: row i of the result is row order[i] of the tensor (element i of a vector), None to keep them.
    Scales and biases are float16, as in the file, or float32 where a bias of float16 would overflow.
    """

    def rows() -> Bytes:
        return tensor.data if order is None else tensor.data.reshape(len(order), -1)[order]

    if bits_of(tensor) is None:
        dtype = _DENSE[tensor.type]
        info = TensorInfo(f"{module}.{parameter}", dtype, tensor.shape)
        return Item((info,), lambda: ((chunk.view(dtype),) for chunk in _chunks(rows())))
    if parameter != "weight":
        raise ConvertError(f"{tensor.name}: a {parameter} of type {tensor.type.name}; expected F32, F16 or BF16")
    affine = _AFFINE[tensor.type]
    scale_dtype = _scale_dtype(tensor, affine)
    *outer, in_dim = tensor.shape
    groups = (*outer, in_dim // GROUP_SIZE)
    parts = (
        TensorInfo(f"{module}.weight", np.dtype(np.uint32), (*outer, in_dim * affine.bits // 32)),
        TensorInfo(f"{module}.scales", scale_dtype, groups),
        TensorInfo(f"{module}.biases", scale_dtype, groups),
    )
    return Item(parts, lambda: (_decode(chunk, affine, scale_dtype) for chunk in _chunks(rows())))


def _chunks(rows: Bytes) -> Iterator[Bytes]:
    step = max(1, _CHUNK_BYTES // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        yield np.ascontiguousarray(rows[start : start + step])


def _blocks(rows: Bytes, affine: _Affine) -> Bytes:
    return rows.reshape(len(rows), -1, affine.block_bytes)


def _halves(blocks: Bytes, index: int) -> npt.NDArray[np.float32]:
    """The index-th float16 of each block, as float32: [rows, groups]."""
    raw = np.ascontiguousarray(blocks[..., 2 * index : 2 * index + 2])
    return raw.view(np.float16)[..., 0].astype(np.float32)


def _scale_dtype(tensor: GgufTensor, affine: _Affine) -> np.dtype[Any]:
    """float16 if every bias is exact in it. A power of two times d is, short of overflow."""
    largest = 0.0
    for chunk in _chunks(tensor.data):
        blocks = _blocks(chunk, affine)
        for index in range(1 if affine.bias_factor is not None else 2):
            top = float(np.abs(_halves(blocks, index)).max(initial=0.0))
            if not np.isfinite(top):
                raise ConvertError(f"{tensor.name}: a block scale is infinite or not a number; the file is damaged")
            largest = max(largest, top)
    factor = abs(affine.bias_factor) if affine.bias_factor is not None else 1
    return np.dtype(np.float16 if largest * factor <= _LARGEST_FLOAT16 else np.float32)


def _decode(rows: Bytes, affine: _Affine, scale_dtype: np.dtype[Any]) -> tuple[Array, ...]:
    """Rows of blocks -> (codes uint32 [rows, in * bits / 32], scales, biases [rows, in / 32])."""
    blocks = _blocks(rows, affine)
    scale = _halves(blocks, 0)
    bias = _halves(blocks, 1) if affine.bias_factor is None else scale * np.float32(affine.bias_factor)
    codes = blocks[..., affine.block_bytes - affine.code_bytes :]
    if affine.bits == 4:
        # Byte j of a block holds values j and j + 16; a byte of MLX holds neighbours.
        values = np.concatenate([codes & 15, codes >> 4], axis=-1)
        packed = values[..., 0::2] | values[..., 1::2] << 4
    else:
        packed = codes ^ 0x80  # two's complement q -> q + 128
    words = np.ascontiguousarray(packed).reshape(len(rows), -1).view(np.uint32)
    return words, scale.astype(scale_dtype), bias.astype(scale_dtype)
