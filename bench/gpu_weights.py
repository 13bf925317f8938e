"""Models of real size with random weights that are made on the device: nothing is read, nothing is copied."""

from __future__ import annotations

import itertools
from typing import Any

import mlx.core as mx
import numpy as np

from mixbit.engine.fields import Fields
from mixbit.engine.models import MODELS
from mixbit.kernels.mlx.weights import DenseWeight, QuantizedWeight
from mixbit.kernels.ops import Norm, Program, ProgramBuilder
from mixbit.kernels.spec import BatchMatvecSpec, DenseTensor, Matrix, QuantizedTensor

CODER_NEXT: dict[str, Any] = {
    "model_type": "qwen3_next",
    "hidden_act": "silu",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "full_attention_interval": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "partial_rotary_factor": 0.25,
    "rope_theta": 5e6,
    "max_position_embeddings": 262144,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "intermediate_size": 5120,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}


def _empty(shape: tuple[int, ...], dtype: Any) -> Any:
    """An array of this shape that takes no memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)


class ShapesOnly:
    """Stands for engine.weights.Weights: tensors of the right shapes, 4 bits, gates 8, group 64, bfloat16."""

    def __contains__(self, name: str) -> bool:
        return True

    def matrix(self, path: str, out_dim: int, in_dim: int, experts: int | None = None) -> Matrix:
        bits = 8 if path.endswith((".gate", ".shared_expert_gate")) else 4
        lead = (out_dim,) if experts is None else (experts, out_dim)
        groups = _empty((*lead, in_dim // 64), np.float32)
        return QuantizedTensor(
            path, _empty((*lead, in_dim * bits // 32), np.uint32), groups, groups, bits, 64, "affine"
        )

    def linear(self, path: str, out_dim: int, in_dim: int, *, bias: bool = False) -> BatchMatvecSpec:
        return BatchMatvecSpec(self.matrix(path, out_dim, in_dim))

    def norm(self, path: str, dim: int, eps: float) -> Norm:
        return Norm(self.tensor(path, (dim,)), eps)

    def tensor(self, name: str, shape: tuple[int, ...]) -> DenseTensor:
        return DenseTensor(name, _empty(shape, np.float32))

    def skip(self, prefix: str) -> None:
        pass


def program(layers: int = 48) -> Program:
    """Qwen3-Coder-Next's step, with fewer layers if asked."""
    config = Fields(CODER_NEXT | {"num_hidden_layers": layers}, "bench")
    weights: Any = ShapesOnly()
    return MODELS["qwen3_next"].parse(config).build(ProgramBuilder(), weights)


def random_matrix(shape: tuple[int, ...], bits: int, group_size: int, dtype: mx.Dtype) -> QuantizedWeight:
    """[..., out, in] whose values are even within +-sqrt(3 / in)."""
    *lead, in_dim = shape
    codes = mx.random.randint(0, 1 << 16, (*lead, in_dim * bits // 32, 2), mx.uint16).view(mx.uint32).squeeze(-1)
    reach = (3 / in_dim) ** 0.5
    groups = (*lead, in_dim // group_size)
    scales, biases = mx.full(groups, 2 * reach / (2**bits - 1), dtype), mx.full(groups, -reach, dtype)
    mx.eval(codes, scales, biases)
    return QuantizedWeight(codes, scales, biases, bits, group_size)


class RandomWeights:
    """Stands for kernels.mlx.weights.Weights: takes shapes from the program and makes values on the device."""

    def __init__(self, dtype: mx.Dtype) -> None:
        self.dtype = dtype
        self._made: dict[str, Any] = {}
        self._count = itertools.count()

    def matrix(self, matrix: Matrix) -> QuantizedWeight | DenseWeight:
        if matrix.name not in self._made:
            assert isinstance(matrix, QuantizedTensor)
            shape = (*matrix.weight.shape[:-1], matrix.in_dim)
            self._made[matrix.name] = random_matrix(shape, matrix.bits, matrix.group_size, self.dtype)
        made: QuantizedWeight = self._made[matrix.name]
        return made

    def vector(self, tensor: DenseTensor, dtype: mx.Dtype | None = None) -> mx.array:
        return (1 + 0.1 * mx.random.normal(tensor.data.shape)).astype(dtype or self.dtype)
