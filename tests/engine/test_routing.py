"""The probes of engine/routing.py show the experts that the reference routes to; loads are sums of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mixbit.engine.errors import UserError
from mixbit.engine.loader import load
from mixbit.engine.routing import chosen_after, chosen_for, expert_load, moe_layers, router_inputs
from mixbit.kernels.executor import ExecutorOptions
from mixbit.kernels.ops import Moe
from mixbit.kernels.reference.moe import route
from tests.checkpoints import write_checkpoint
from tests.kernels.builders import Tensors

OPTIONS = ExecutorOptions(max_tokens=16, threads=2)


def test_probes_show_the_chosen_experts() -> None:
    tensors = Tensors(1)
    spec = tensors.moe(96, 32, experts=24, top_k=5)
    x = tensors.values(40, 96)
    experts, _ = route(spec, x)
    wanted = np.zeros((40, 24), bool)
    np.put_along_axis(wanted, experts, True, axis=1)
    np.testing.assert_array_equal(chosen_for(spec, x, OPTIONS), wanted)


def test_in_a_model_the_probes_see_what_the_router_is_given(tmp_path: Path) -> None:
    program = load(write_checkpoint(tmp_path / "m", "qwen3_next")).program
    tokens = np.random.default_rng(0).integers(0, 384, 40).astype(np.int32)
    places = moe_layers(program)
    assert len(places) == 4
    for place in places:
        node = program.nodes[place]
        assert isinstance(node, Moe)
        inputs = router_inputs(program, place, tokens, OPTIONS)
        alone = chosen_for(node.spec, inputs, OPTIONS)
        np.testing.assert_array_equal(alone, chosen_after(program, place, tokens, OPTIONS))
        assert len(np.unique(alone, axis=0)) > 5


def test_more_experts_than_values_are_refused() -> None:
    tensors = Tensors(2)
    with pytest.raises(ValueError, match="40 experts cannot be told apart in outputs of 32 values"):
        chosen_for(tensors.moe(32, 32, experts=40), tensors.values(2, 32), OPTIONS)


def test_the_load_is_the_sum_over_tokens(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "m", "qwen3_next")
    load_of = expert_load(path, "the capital of the lighthouse", 300)
    spec = next(node.spec for node in load(path).program.nodes if isinstance(node, Moe))
    assert load_of.counts.shape == (4, spec.router.out_dim)
    assert (load_of.counts.sum(1) == load_of.tokens * spec.top_k).all()
    np.testing.assert_allclose(load_of.shares.mean(1), 1, rtol=1e-5)
    assert expert_load(path, "the capital of the lighthouse", 3).tokens == 3
    for layer, expert in load_of.dead:
        assert load_of.counts[layer, expert] == 0
    assert len(load_of.dead) == (load_of.counts == 0).sum()


def test_a_dense_model_and_an_empty_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="without experts"):
        expert_load(write_checkpoint(tmp_path / "dense", "llama"), "the", 10)
    with pytest.raises(UserError, match="no tokens"):
        expert_load(write_checkpoint(tmp_path / "m", "qwen3_next"), "", 10)
