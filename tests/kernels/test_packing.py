"""Codes, scales and biases, bit for bit as MLX stores them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mixbit.kernels.mlx.arrays import to_device
from mixbit.kernels.reference.matrix import dequantize
from mixbit.kernels.reference.packing import pack, unpack
from mixbit.kernels.reference.quantize import quantize
from mixbit.kernels.spec import BITS, GROUP_SIZES, QuantizedTensor
from tests.kernels.builders import DTYPES, Tensors


def to_host(array: mx.array) -> npt.NDArray[Any]:
    if array.dtype == mx.bfloat16:
        return np.array(array.view(mx.uint16)).view(ml_dtypes.bfloat16)
    return np.array(array)


@given(st.data(), st.sampled_from(BITS))
def test_unpack_inverts_pack(data: st.DataObject, bits: int) -> None:
    codes = data.draw(arrays(np.uint8, (2, 64), elements=st.integers(0, 2**bits - 1)))
    words = pack(codes, bits)
    assert words.dtype == np.uint32
    assert words.shape == (2, 2 * bits)
    np.testing.assert_array_equal(unpack(words, bits), codes)


@pytest.mark.parametrize("bits", BITS)
def test_codes_are_one_stream_of_bits_lowest_first(bits: int) -> None:
    codes = Tensors().rng.integers(0, 2**bits, 32, dtype=np.uint8)
    stream = sum(int(code) << (bits * place) for place, code in enumerate(codes))
    assert pack(codes, bits).tobytes() == stream.to_bytes(4 * bits, "little")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_quantize_is_mlx_quantize(bits: int, group_size: int, dtype: str) -> None:
    tensors = Tensors(seed=bits)
    weight = tensors.values(2, 16, 256) * tensors.rng.choice([1e-3, 1, 30], (2, 16, 1))
    weight[0, 0] = 0
    weight[0, 1] = 0.5
    weight[0, 2] = -0.5
    weight[0, 3] = np.abs(weight[0, 3]) + 1
    weight[0, 4] = -np.abs(weight[0, 4]) - 1
    stored = weight.astype(DTYPES[dtype])
    ours = quantize(stored, bits, group_size)
    theirs = mx.quantize(to_device(stored), group_size=group_size, bits=bits)
    for part, expected in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(part, to_host(expected))


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_dequantize_is_mlx_dequantize(bits: int, group_size: int) -> None:
    tensor = Tensors(seed=bits).quantized(3, 8, 128, bits=bits, group_size=group_size)
    words, scales, biases = (to_device(part) for part in (tensor.weight, tensor.scales, tensor.biases))
    expected = mx.dequantize(words, scales, biases, group_size=group_size, bits=bits)
    np.testing.assert_allclose(dequantize(tensor), to_host(expected), rtol=0, atol=1e-7)


def test_dequantize_selects_rows_and_experts() -> None:
    tensor = Tensors().quantized(3, 8, 64, bits=5)
    whole = dequantize(tensor)
    np.testing.assert_array_equal(dequantize(tensor, 1), whole[1])
    np.testing.assert_array_equal(dequantize(tensor, [2, 0]), whole[[2, 0]])


@pytest.mark.parametrize("bits", BITS)
def test_quantization_error_is_at_most_half_a_step(bits: int) -> None:
    weight = Tensors().values(8, 128)
    words, scales, biases = quantize(weight, bits, 32)
    tensor = QuantizedTensor("w", words, scales, biases, bits=bits, group_size=32, mode="affine")
    # Zero is made a code, so the far edge of the range can lie up to half a step beyond the last code.
    steps = np.repeat(np.abs(scales), 32, axis=-1)
    assert (np.abs(dequantize(tensor) - weight) <= 1.01 * steps).all()
