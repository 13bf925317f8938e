"""Shapes of models of real size: programs whose weights take no memory, and the batches that they are timed with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from mixbit.engine.fields import Fields
from mixbit.engine.models import MODELS
from mixbit.engine.synth_sizes import SIZES
from mixbit.kernels.executor import Batch, CacheConfig
from mixbit.kernels.ops import Norm, Program, ProgramBuilder
from mixbit.kernels.spec import BatchMatvecSpec, DenseTensor, Matrix, QuantizedTensor

GROUP_SIZE = 64


def config(layers: int = 48) -> dict[str, Any]:
    """config.json of Qwen3-Coder-Next, with fewer layers if asked."""
    return {**SIZES["qwen3-coder-next"], "num_hidden_layers": layers}


def bits_of(path: str) -> int:
    """The width of a matrix, as checkpoints of this model have it: gates 8, all else 4."""
    return 8 if path.endswith((".gate", ".shared_expert_gate")) else 4


def empty(shape: tuple[int, ...], dtype: Any) -> Any:
    """An array of this shape that takes no memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def shapes_only(path: str, shape: tuple[int, ...], bits: int) -> QuantizedTensor:
    """A quantized matrix or stack [..., out, in] that takes no memory."""
    *lead, in_dim = shape
    groups = empty((*lead, in_dim // GROUP_SIZE), ml_dtypes.bfloat16)
    codes = empty((*lead, in_dim * bits // 32), np.uint32)
    return QuantizedTensor(path, codes, groups, groups, bits, GROUP_SIZE, "affine")


class ShapesOnly:
    """Stands for engine.weights.Weights: tensors of the right shapes and names, in bfloat16."""

    def __contains__(self, name: str) -> bool:
        return True

    def matrix(self, path: str, out_dim: int, in_dim: int, experts: int | None = None) -> Matrix:
        lead = (out_dim,) if experts is None else (experts, out_dim)
        return shapes_only(path, (*lead, in_dim), bits_of(path))

    def linear(self, path: str, out_dim: int, in_dim: int, *, bias: bool = False) -> BatchMatvecSpec:
        return BatchMatvecSpec(self.matrix(path, out_dim, in_dim))

    def norm(self, path: str, dim: int, eps: float) -> Norm:
        return Norm(self.tensor(f"{path}.weight", (dim,)), eps)

    def tensor(self, name: str, shape: tuple[int, ...]) -> DenseTensor:
        return DenseTensor(name, empty(shape, np.float32))

    def skip(self, prefix: str) -> None:
        pass


def program(sizes: Mapping[str, Any]) -> Program:
    """The step of the model of this config.json."""
    weights: Any = ShapesOnly()
    return MODELS[str(sizes["model_type"])].parse(Fields(dict(sizes))).build(ProgramBuilder(), weights)


def batch(count: int, context: int, new: int, cache: CacheConfig, vocab: int) -> Batch:
    """`count` sequences with so many tokens in the cache and so many new ones; the logits of each last token."""
    each = -(-(context + new) // cache.block_size)
    rng = np.random.default_rng(context)
    return Batch(
        tokens=rng.integers(0, vocab, count * new).astype(np.int32),
        query_starts=(np.arange(count + 1) * new).astype(np.int32),
        context_lengths=np.full(count, context, np.int32),
        block_tables=np.arange(count * each, dtype=np.int32).reshape(count, each),
        state_slots=np.arange(count, dtype=np.int32),
        logit_rows=(np.arange(1, count + 1) * new - 1).astype(np.int32),
    )
