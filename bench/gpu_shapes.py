"""Shapes of models of real size: programs whose weights take no memory."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from mixbit.engine.fields import Fields
from mixbit.engine.models import MODELS
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
        groups = _empty((*lead, in_dim // 64), ml_dtypes.bfloat16)
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
