"""Tensors that contradict themselves are refused, by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mixbit.kernels.spec import BITS, BatchMatvecSpec, DenseTensor, QuantizedTensor, SpecError
from tests.kernels.builders import Tensors

GOOD = replace(Tensors().quantized(8, 64, bits=4), name="layers.3.mlp.gate")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mode": "mxfp4"}, "mxfp4"),
        ({"bits": 7}, "7 bits"),
        ({"group_size": 16}, "group size 16"),
        ({"weight": GOOD.weight.astype(np.int32)}, "int32"),
        ({"weight": GOOD.weight[0]}, "2 or 3 dimensions"),
        ({"scales": GOOD.scales.astype(np.float64)}, "float64"),
        ({"biases": GOOD.biases.astype(np.float16)}, "float16"),
        ({"bits": 8}, "8 bits"),
        ({"bits": 3}, "3-bit"),
        ({"group_size": 64}, "group 64"),
        ({"scales": GOOD.scales[:, :1]}, "(8, 1)"),
        ({"biases": GOOD.biases[:4]}, "(4, 2)"),
    ],
)
def test_contradiction_names_tensor_and_claim(change: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError) as caught:
        replace(GOOD, **change)
    assert "layers.3.mlp.gate" in str(caught.value)
    assert says in str(caught.value)


def test_dense_dtype_is_checked() -> None:
    with pytest.raises(SpecError, match=r"model\.norm: dtype int64"):
        DenseTensor("model.norm", np.arange(3))


def test_spec_refuses_a_stack_and_a_bias_of_another_size() -> None:
    tensors = Tensors()
    stack = tensors.quantized(2, 8, 64, bits=4)
    with pytest.raises(SpecError, match=f"{stack.name}: a stack"):
        BatchMatvecSpec(stack)
    bias = tensors.dense(9)
    with pytest.raises(SpecError, match=bias.name):
        BatchMatvecSpec(GOOD, bias)


@pytest.mark.parametrize("bits", BITS)
def test_sizes_follow_from_width(bits: int) -> None:
    tensor = Tensors().quantized(5, 8, 192, bits=bits, group_size=64, dtype="bfloat16")
    assert (tensor.experts, tensor.out_dim, tensor.in_dim) == (5, 8, 192)
    assert tensor.nbytes == 5 * 8 * (192 * bits // 8 + 2 * 2 * 3)
    assert BatchMatvecSpec(Tensors().quantized(8, 64, bits=bits)).bits == bits


def test_dense_sizes() -> None:
    matrix = Tensors().dense(7, 48, dtype="float16")
    assert (matrix.experts, matrix.out_dim, matrix.in_dim, matrix.nbytes) == (None, 7, 48, 7 * 48 * 2)
    assert BatchMatvecSpec(matrix).bits is None
    assert isinstance(GOOD, QuantizedTensor)
