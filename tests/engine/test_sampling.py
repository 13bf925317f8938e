"""Samplers against the plain formulas."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixbit.engine.protocol import Sampling
from mixbit.engine.sampling import NonFiniteLogitsError, Sampler, best_ids, inverse_cdf, nucleus

Floats = npt.NDArray[np.float32]


def random_logits(size: int, seed: int = 0, spread: float = 2.0) -> Floats:
    return (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32)


def softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    weights = np.exp(logits - logits.max())
    return np.asarray(weights / weights.sum())


def plain_penalties(logits: Floats, sampling: Sampling, prompt: list[int], output: list[int]) -> Floats:
    changed = logits.astype(np.float64)
    for token in {*prompt, *output}:
        penalty = sampling.repetition_penalty
        changed[token] = changed[token] / penalty if changed[token] > 0 else changed[token] * penalty
    for token, count in Counter(output).items():
        changed[token] -= sampling.presence_penalty + sampling.frequency_penalty * count
    for token, bias in sampling.logit_bias.items():
        changed[token] += bias
    return changed.astype(np.float32)


def plain_distribution(logits: Floats, sampling: Sampling) -> npt.NDArray[np.float64]:
    """Sorts everything, one filter after the other."""
    scaled = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-scaled, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    if sampling.top_p < 1:
        order = order[: 1 + np.searchsorted(np.cumsum(softmax(scaled[order])), sampling.top_p)]
    best = softmax(scaled)
    order = np.array([token for token in order if best[token] >= sampling.min_p * best.max()])
    result = np.zeros(len(logits))
    result[order] = softmax(scaled[order])
    return result


def draws(sampler: Sampler, logits: Floats, count: int) -> npt.NDArray[np.float64]:
    counts = np.bincount([sampler.choose(logits).token for _ in range(count)], minlength=len(logits))
    return np.asarray(counts / count)


SETTINGS = [
    Sampling(seed=1),
    Sampling(seed=2, temperature=0.6),
    Sampling(seed=3, top_k=5),
    Sampling(seed=4, top_p=0.7),
    Sampling(seed=5, top_p=0.0),
    Sampling(seed=6, min_p=0.1),
    Sampling(seed=7, temperature=1.7, top_k=30, top_p=0.9, min_p=0.03),
]


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
@pytest.mark.parametrize("size", [40, 5000])
def test_tokens_are_distributed_as_the_formulas_say(sampling: Sampling, size: int) -> None:
    logits = random_logits(size)
    expected = plain_distribution(logits, sampling)
    count = 1500
    found = draws(Sampler(sampling, []), logits, count)
    assert not found[expected == 0].any(), "a token that the filters exclude was drawn"
    likely = np.argsort(-expected)[:20]
    deviation = np.sqrt(expected * (1 - expected) / count)
    assert (np.abs(found - expected)[likely] <= 5 * deviation[likely] + 1e-9).all()
    # Groups of tokens too: a bias too small to see in one token adds up.
    for part in np.array_split(np.arange(size), 8):
        share = expected[part].sum()
        assert abs(found[part].sum() - share) <= 5 * math.sqrt(share * (1 - share) / count) + 1e-9


@pytest.mark.parametrize("size", [1, 63, 64, 500, 20_000])
@pytest.mark.parametrize("count", [1, 7, 64, 400])
def test_the_best_are_those_of_a_full_sort(size: int, count: int) -> None:
    values = np.round(random_logits(size, seed=size) * 4)  # rounded: many are equal
    assert best_ids(values, count).tolist() == np.argsort(-values, kind="stable")[:count].tolist()


@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
@pytest.mark.parametrize("top_p", [0.0, 0.1, 0.9, 0.9999])
def test_the_nucleus_is_that_of_a_full_sort(spread: float, top_p: float) -> None:
    logits = random_logits(10_000, spread=spread)
    logits[17] = -np.inf
    expected = plain_distribution(logits, Sampling(top_p=top_p))
    found = nucleus(logits - logits.max(), top_p)
    assert len(set(found.tolist())) == len(found)
    # Float rounding may move the border by a token in ten thousand.
    assert len(set(found.tolist()) ^ set(np.flatnonzero(expected).tolist())) <= 1
    assert expected.argmax() in found


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 1e-6, 0.25, 1.0, 3.0]), min_size=1, max_size=300).filter(any),
    st.floats(0, 1, exclude_max=True),
    st.integers(1, 40),
)
def test_inverse_cdf_never_gives_an_index_of_weight_zero(weights: list[float], draw: float, repeat: int) -> None:
    array = np.array(weights * repeat, np.float32)
    assert array[inverse_cdf(array, draw)] > 0


def test_inverse_cdf_covers_every_index_of_a_large_array_alike() -> None:
    weights = np.ones(5003, np.float32)  # not a multiple of the group
    found = [inverse_cdf(weights, (place + 0.5) / 5003) for place in range(5003)]
    assert sorted(found) == list(range(5003))


def test_temperature_zero_takes_the_first_of_the_largest() -> None:
    logits = np.array([1, 3, 3, 2], np.float32)
    sampler = Sampler(Sampling(temperature=0, top_k=1, top_p=0.5), [])
    assert [sampler.choose(logits).token for _ in range(3)] == [1, 1, 1]


def test_a_tiny_temperature_is_greedy_and_does_not_overflow() -> None:
    logits = random_logits(100) * 1e30
    assert Sampler(Sampling(temperature=1e-30), []).choose(logits).token == logits.argmax()
    assert Sampler(Sampling(temperature=1e-4), []).choose(logits).token == logits.argmax()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0, repetition_penalty=1.3),
        Sampling(temperature=0, presence_penalty=0.7),
        Sampling(temperature=0, frequency_penalty=-0.4),
        Sampling(temperature=0, logit_bias={3: 2.5, 9: -100.0}),
        Sampling(
            temperature=0, repetition_penalty=0.8, presence_penalty=1.0, frequency_penalty=0.5, logit_bias={1: 1.0}
        ),
    ],
    ids=str,
)
def test_penalties_follow_the_plain_formulas_at_every_step(sampling: Sampling) -> None:
    prompt, output = [2, 5, 5, 11], list[int]()
    sampler = Sampler(sampling, prompt, logprobs=200)
    for step in range(150):
        logits = random_logits(200, seed=step, spread=0.3)
        before = logits.copy()
        choice = sampler.choose(logits)
        expected = plain_penalties(logits, sampling, prompt, output)
        assert choice.token == expected.argmax()
        scores = np.array([value for _, value in sorted(choice.top)])
        np.testing.assert_allclose(scores, np.log(softmax(expected.astype(np.float64))), atol=1e-5)
        np.testing.assert_array_equal(logits, before)
        output.append(choice.token)


def test_logprobs_are_of_the_logits_before_temperature_and_filters() -> None:
    logits = random_logits(1000)
    expected = np.log(softmax(logits.astype(np.float64)))
    choice = Sampler(Sampling(temperature=1.5, top_k=3, seed=5), [], logprobs=4).choose(logits)
    order = np.argsort(-logits, kind="stable")[:4]
    assert choice.logprob == pytest.approx(expected[choice.token], abs=1e-5)
    assert [token for token, _ in choice.top] == order.tolist()
    assert [value for _, value in choice.top] == pytest.approx(expected[order].tolist(), abs=1e-5)
    assert Sampler(Sampling(temperature=0), [], logprobs=0).choose(logits).top == ()
    assert Sampler(Sampling(temperature=0), []).choose(logits).logprob is None


def test_the_same_seed_gives_the_same_tokens_and_another_gives_others() -> None:
    rows = [random_logits(300, seed=step, spread=0.5) for step in range(40)]

    def tokens(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(seed=seed, top_p=0.95), [])
        return [sampler.choose(row).token for row in rows]

    assert tokens(7) == tokens(7)
    assert tokens(7) != tokens(8)
    assert tokens(-1) == tokens(2**64 - 1)
    assert tokens(None) != tokens(None)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(), Sampling(logit_bias={1: 5.0})], ids=str)
def test_logits_that_are_not_finite_are_an_error(value: float, sampling: Sampling) -> None:
    logits = random_logits(50)
    logits[30] = value
    with pytest.raises(NonFiniteLogitsError, match="token 30"):
        Sampler(sampling, []).choose(logits)


def test_minus_infinity_excludes_a_token_but_not_all() -> None:
    logits = np.full(10, -np.inf, np.float32)
    logits[4] = 1
    assert Sampler(Sampling(), []).choose(logits).token == 4
    with pytest.raises(NonFiniteLogitsError):
        Sampler(Sampling(), []).choose(np.full(10, -np.inf, np.float32))
