"""The fast mode (int8 activations) beside the exact one, on tiny random models of every family.

Random weights magnify rounding: their logits are sums of many values without structure. So these tolerances are
wider than what trained models show (bench/quality.py).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from mixbit.engine.loader import load
from mixbit.engine.routing import chosen_for, moe_layers, router_inputs
from mixbit.kernels.executor import Batch, CacheConfig, ExecutorOptions, Precision
from mixbit.kernels.ops import Moe, Program
from mixbit.kernels.registry import choose
from tests.checkpoints import CONFIGS, write_checkpoint

TOKENS = np.random.default_rng(5).integers(3, 384, 96).astype(np.int32)
# Of the logits: root mean square of the difference over that of the exact ones. A gated delta net carries what it
# rounded from token to token.
TOLERANCE = {"llama": 0.06, "qwen2": 0.06, "qwen3": 0.06, "qwen3_next": 0.12, "qwen3_5": 0.12}
WITH_EXPERTS = {"qwen3_moe": 0.12, "qwen3_next": 0.12, "qwen3_5_moe": 0.12}


def test_every_family_is_held_to_a_tolerance() -> None:
    assert TOLERANCE.keys() | WITH_EXPERTS.keys() == CONFIGS.keys()


def options(precision: Precision) -> ExecutorOptions:
    return ExecutorOptions(max_tokens=96, threads=2, precision=precision)


def logits(program: Program, precision: Precision, sizes: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Of every token of one sequence, fed in pieces of these sizes."""
    executor = choose("cpu").backend.compile(program, CacheConfig(6, 16, 1), options(precision))
    parts, start = [], 0
    for size in sizes:
        batch = Batch(
            tokens=TOKENS[start : start + size],
            query_starts=np.array([0, size], np.int32),
            context_lengths=np.array([start], np.int32),
            block_tables=np.arange(6, dtype=np.int32)[None],
            state_slots=np.zeros(1, np.int32),
            logit_rows=np.arange(size, dtype=np.int32),
        )
        parts.append(executor.run(batch).copy())
        start += size
    return np.concatenate(parts)


@pytest.mark.parametrize("sizes", [(96,), (64, *[1] * 32)], ids=["prefill", "decode"])
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("model_type", TOLERANCE)
def test_dense_families(model_type: str, bits: int, sizes: tuple[int, ...], tmp_path: Path) -> None:
    config = {"mlp_only_layers": [0, 1, 2, 3]} if model_type == "qwen3_next" else {}
    program = load(write_checkpoint(tmp_path / "m", model_type, bits=bits, config=config)).program
    exact, fast = logits(program, "exact", sizes), logits(program, "fast", sizes)
    error = np.sqrt(((fast - exact) ** 2).mean() / (exact**2).mean())
    assert 0 < error < TOLERANCE[model_type]


@pytest.mark.parametrize("model_type", WITH_EXPERTS)
def test_families_with_experts(model_type: str, tmp_path: Path) -> None:
    """Where a router's scores are all but equal, rounding in earlier layers changes the expert, and with it the
    logits: most rows are close, as in the dense families, and few differ."""
    program = load(write_checkpoint(tmp_path / "m", model_type)).program
    exact, fast = logits(program, "exact", (96,)), logits(program, "fast", (96,))
    errors = np.sqrt(((fast - exact) ** 2).mean(1) / (exact**2).mean())
    assert 0 < np.median(errors) < WITH_EXPERTS[model_type]


@pytest.mark.parametrize("model_type", WITH_EXPERTS)
def test_routers_choose_the_same_experts(model_type: str, tmp_path: Path) -> None:
    """Given the same inputs: every token of every layer."""
    program = load(write_checkpoint(tmp_path / "m", model_type)).program
    for place in moe_layers(program):
        node = program.nodes[place]
        assert isinstance(node, Moe)
        inputs = router_inputs(program, place, TOKENS, options("exact"))
        exact, fast = (chosen_for(node.spec, inputs, options(each)) for each in ("exact", "fast"))
        np.testing.assert_array_equal(fast, exact)
