"""Mixture of experts."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mixbit.kernels.ops import MoeSpec
from mixbit.kernels.reference.activations import sigmoid, softmax
from mixbit.kernels.reference.matrix import Float32Array, apply
from mixbit.kernels.reference.mlp import mlp


def route(spec: MoeSpec, x: Float32Array) -> tuple[npt.NDArray[np.intp], Float32Array]:
    """(experts, weights), both [rows, top_k], best first; equal logits: the lower expert first."""
    logits = apply(spec.router, x)
    experts = np.argsort(-logits, axis=-1, kind="stable")[:, : spec.top_k]
    weights = np.take_along_axis(softmax(logits), experts, axis=-1)
    if spec.normalize:
        weights /= weights.sum(axis=-1, keepdims=True)
    return experts, weights


def moe(spec: MoeSpec, x: Float32Array) -> Float32Array:
    """Weighted sum of the chosen experts of each row of x [rows, dim], plus the shared expert."""
    experts, weights = route(spec, x)
    out = np.zeros((len(x), spec.experts.down.out_dim), np.float32)
    for expert in np.unique(experts):
        rows, ranks = np.nonzero(experts == expert)
        out[rows] += weights[rows, ranks][:, None] * mlp(spec.experts, x[rows], int(expert))
    if spec.shared is not None:
        shared = mlp(spec.shared, x)
        out += shared if spec.shared_gate is None else sigmoid(apply(spec.shared_gate, x)) * shared
    return out
