"""SwiGLU feed-forward."""

from __future__ import annotations

from mixbit.kernels.ops import MlpSpec
from mixbit.kernels.reference.activations import silu
from mixbit.kernels.reference.matrix import Float32Array, apply


def mlp(spec: MlpSpec, x: Float32Array, expert: int | None = None) -> Float32Array:
    """down(silu(gate(x)) * up(x)) of x [rows, dim], with one expert of the stacks where given."""
    return apply(spec.down, silu(apply(spec.gate, x, expert)) * apply(spec.up, x, expert), expert)
