"""The chunked form of the gated delta rule that the MLX table uses."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mixbit.kernels.mlx.gated_delta import invert_unit_lower, recur_in_chunks
from mixbit.kernels.reference.gated_delta import recur
from tests.kernels.builders import Tensors, assert_close


@pytest.mark.parametrize("length", [2, 63, 64, 65, 200])
def test_chunks_equal_the_recurrence(length: int) -> None:
    """The matrix form, also for keys that are all alike, where an inverse by series would blow up."""
    tensors = Tensors(10)
    for alike in (False, True):
        k = tensors.values(length, 2, 16)
        k = np.tile(k[:1], (length, 1, 1)) if alike else k
        k /= np.linalg.norm(k, axis=-1, keepdims=True)
        q, v = tensors.values(length, 2, 16), tensors.values(length, 2, 8)
        decay = np.ones((length, 2), np.float32) if alike else tensors.rng.uniform(0, 1, (length, 2)).astype(np.float32)
        beta = np.ones_like(decay) if alike else tensors.rng.uniform(0, 1, (length, 2)).astype(np.float32)
        memory = tensors.values(2, 8, 16)
        inputs = (np.swapaxes(part, 0, 1)[None] for part in (q, k, v, np.log(decay), beta))
        out, after = recur_in_chunks(*(mx.array(part) for part in (*inputs, memory[None])))
        expected = recur(q, k, v, decay, beta, memory)
        assert_close(np.array(out[0]).swapaxes(0, 1), expected)
        assert_close(np.array(after[0]), memory)


def test_inverse_of_unit_lower() -> None:
    lower = np.tril(Tensors(11).values(3, 16, 16), -1)
    inverse = np.array(invert_unit_lower(mx.array(lower)))
    identity = np.broadcast_to(np.eye(16, dtype=np.float32), lower.shape)
    assert_close(inverse @ (identity + lower), identity, 1e-4)
