"""Mlp and Moe: every width, routing with ties, one token and many."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mixbit.kernels.ops import MlpSpec, MoeSpec
from mixbit.kernels.reference.mlp import mlp
from mixbit.kernels.reference.moe import moe, route
from mixbit.kernels.spec import BITS, DenseTensor
from tests.kernels.builders import FloatArray, Tensors, all_rows, assert_close, program_of
from tests.kernels.conftest import Candidate

WIDTHS = (None, *BITS)


def run_moe(candidate: Candidate, spec: MoeSpec, x: FloatArray) -> FloatArray:
    return candidate.compile(program_of(x, lambda b, value: b.moe(value, spec))).run(all_rows(range(len(x))))


@pytest.mark.parametrize("bits", WIDTHS)
def test_mlp(candidate: Candidate, bits: int | None) -> None:
    tensors = Tensors(seed=1)
    spec = tensors.mlp(64, 96, bits=bits)
    for rows in (1, 3, 33):
        x = tensors.values(rows, 64)
        got = candidate.compile(program_of(x, lambda b, value: b.mlp(value, spec))).run(all_rows(range(rows)))
        assert_close(got, mlp(spec, x))


def test_mlp_of_mixed_widths(candidate: Candidate) -> None:
    tensors = Tensors(seed=2)
    spec = MlpSpec(
        tensors.quantized(96, 128, bits=2, group_size=64, dtype="bfloat16"),
        tensors.quantized(96, 128, bits=6, group_size=128, dtype="float16"),
        tensors.dense(128, 96, dtype="bfloat16"),
    )
    x = tensors.values(5, 128)
    got = candidate.compile(program_of(x, lambda b, value: b.mlp(value, spec))).run(all_rows(range(5)))
    assert_close(got, mlp(spec, x))


@pytest.mark.parametrize("bits", WIDTHS)
def test_experts_at_every_width(candidate: Candidate, bits: int | None) -> None:
    tensors = Tensors(seed=3)
    spec = tensors.moe(bits=bits)
    for rows in (1, 2, 7, 50):
        x = tensors.values(rows, 64)
        assert_close(run_moe(candidate, spec, x), moe(spec, x))


@pytest.mark.parametrize("router_bits", WIDTHS)
def test_router_at_every_width(candidate: Candidate, router_bits: int | None) -> None:
    tensors = Tensors(seed=4)
    spec = tensors.moe(experts=12, router_bits=router_bits)
    x = tensors.values(20, 64)
    assert_close(run_moe(candidate, spec, x), moe(spec, x))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shared", ["none", "plain", "gated"])
def test_forms(candidate: Candidate, normalize: bool, shared: str) -> None:
    tensors = Tensors(seed=5)
    spec = tensors.moe(normalize=normalize, shared=shared != "none", shared_gate=shared == "gated")
    x = tensors.values(9, 64)
    assert_close(run_moe(candidate, spec, x), moe(spec, x))


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_number_of_experts_chosen(candidate: Candidate, top_k: int) -> None:
    tensors = Tensors(seed=6)
    spec = tensors.moe(top_k=top_k)
    x = tensors.values(30, 64)
    assert_close(run_moe(candidate, spec, x), moe(spec, x))


def test_experts_of_mixed_widths(candidate: Candidate) -> None:
    """2-bit gate, 3-bit up, 4-bit down, of different group sizes and dtypes; 8-bit router, dense shared gate."""
    tensors = Tensors(seed=7)
    spec = MoeSpec(
        router=tensors.quantized(10, 128, bits=8, group_size=64, dtype="bfloat16"),
        experts=MlpSpec(
            tensors.quantized(10, 64, 128, bits=2, group_size=128),
            tensors.quantized(10, 64, 128, bits=3, group_size=32, dtype="float16"),
            tensors.quantized(10, 128, 64, bits=4, group_size=64, dtype="bfloat16"),
        ),
        top_k=4,
        normalize=True,
        shared=tensors.mlp(128, 64, bits=5),
        shared_gate=tensors.dense(1, 128, dtype="bfloat16"),
    )
    for rows in (1, 40):
        x = tensors.values(rows, 128)
        assert_close(run_moe(candidate, spec, x), moe(spec, x))


def with_router(spec: MoeSpec, router: FloatArray) -> MoeSpec:
    return replace(spec, router=DenseTensor("router", router))


def test_all_tokens_on_one_expert(candidate: Candidate) -> None:
    tensors = Tensors(seed=8)
    router = np.zeros((8, 64), np.float32)
    router[5] = 1
    spec = with_router(tensors.moe(top_k=1, shared=False), router)
    x = np.abs(tensors.values(40, 64))
    assert (route(spec, x)[0] == 5).all()
    assert_close(run_moe(candidate, spec, x), mlp(spec.experts, x, 5))


@pytest.mark.parametrize("rows", [1, 30])
def test_ties_go_to_the_lower_expert(any_candidate: Candidate, rows: int) -> None:
    """Every logit is equal in the first case; in the second, a tie straddles the last place."""
    tensors = Tensors(seed=9)
    experts = 100  # many, so that a sort that is not stable would show
    x = np.abs(tensors.values(rows, 64))
    equal = with_router(tensors.moe(experts=experts, shared=False), np.zeros((experts, 64), np.float32))
    lowest = np.mean([mlp(equal.experts, x, expert) for expert in (0, 1, 2)], axis=0)
    assert_close(run_moe(any_candidate, equal, x), lowest)

    router = np.zeros((experts, 64), np.float32)
    router[60] = 1
    straddling = with_router(equal, router)
    chosen, weights = route(straddling, x)
    assert (chosen == [60, 0, 1]).all()
    parts = [weights[:, [place]] * mlp(equal.experts, x, expert) for place, expert in enumerate((60, 0, 1))]
    assert_close(run_moe(any_candidate, straddling, x), np.sum(parts, axis=0))


def test_routing_formula() -> None:
    """Softmax over all experts first; renormalised to one only if asked."""
    tensors = Tensors(seed=10)
    spec = tensors.moe(router_bits=None, normalize=False)
    x = tensors.values(3, 64)
    logits = (x @ spec.router.data.T).astype(np.float64)  # type: ignore[union-attr]
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    best = np.sort(shares, axis=1)[:, ::-1][:, :3].astype(np.float32)
    assert_close(route(spec, x)[1], best)
    assert_close(route(replace(spec, normalize=True), x)[1], best / best.sum(axis=1, keepdims=True))


def test_large_router_logits_do_not_overflow(candidate: Candidate) -> None:
    tensors = Tensors(seed=11)
    spec = with_router(tensors.moe(), tensors.values(8, 64, scale=50))
    x = tensors.values(6, 64)
    assert_close(run_moe(candidate, spec, x), moe(spec, x))
