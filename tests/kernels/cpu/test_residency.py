"""Which experts stay in memory: the policy alone, without memory or files."""

from __future__ import annotations

import numpy as np
import pytest

from mixbit.kernels.cpu._cpu import Residency

LAYERS, EXPERTS = 6, 64


class Cache:
    """Steps that ask a Residency for experts of each layer, and count what was there."""

    def __init__(self, slots: int) -> None:
        self.residency = Residency(keys=LAYERS * EXPERTS, slots=slots)
        self.hits = self.asked = 0

    def step(self, chosen: list[list[int]], share: float = 1.0) -> float:
        """One layer after another; returns the share of hits. A layer's experts are needed together."""
        self.residency.advance()
        hits = asked = 0
        for layer, experts in enumerate(chosen):
            slots = []
            for expert in experts:
                key = layer * EXPERTS + expert
                self.residency.note(key, share)
                slot = self.residency.find(key)
                hits += slot >= 0
                if slot >= 0:
                    self.residency.pin(slot)
                else:
                    slot = self.residency.claim(key)
                assert slot >= 0
                slots.append(slot)
            for slot in slots:
                self.residency.unpin(slot)
            asked += len(experts)
        return hits / asked

    def scan(self, share: float = 0.05) -> float:
        """A prompt that needs every expert, a few at a time."""
        self.residency.advance()
        hits = 0
        for key in range(LAYERS * EXPERTS):
            self.residency.note(key, share)
            slot = self.residency.find(key)
            hits += slot >= 0
            if slot < 0:
                slot = self.residency.claim(key)
            else:
                self.residency.pin(slot)
            self.residency.unpin(slot)
        return hits / (LAYERS * EXPERTS)


def skewed(random: np.random.Generator, hot: int = 12, share: float = 0.7) -> list[list[int]]:
    """Four experts of each layer: `share` of the picks among the first `hot`, the rest anywhere else."""
    weights = np.full(EXPERTS, (1 - share) / (EXPERTS - hot))
    weights[:hot] = share / hot
    return [random.choice(EXPERTS, 4, replace=False, p=weights).tolist() for _ in range(LAYERS)]


def test_a_free_slot_is_taken_before_anything_goes() -> None:
    residency = Residency(keys=10, slots=3)
    slots = {residency.claim(key) for key in (4, 7, 9)}
    assert slots == {0, 1, 2}
    assert [residency.find(key) for key in (4, 7, 9)] != [-1, -1, -1]
    assert residency.find(5) == -1


def test_what_is_pinned_stays_and_a_claim_then_fails() -> None:
    residency = Residency(keys=10, slots=2)
    first, second = residency.claim(1), residency.claim(2)
    assert residency.claim(3) == -1
    residency.unpin(first)
    assert residency.claim(3) == first
    assert (residency.find(1), residency.find(2), residency.find(3)) == (-1, second, first)


def test_the_least_frequent_goes_first() -> None:
    residency = Residency(keys=4, slots=3)
    for key, uses in ((0, 3), (1, 1), (2, 2)):
        residency.unpin(residency.claim(key))
        for _ in range(uses):
            residency.note(key, 1.0)
    residency.unpin(residency.claim(3))
    assert residency.find(1) == -1
    assert residency.find(0) >= 0
    assert residency.find(2) >= 0


def test_use_long_ago_counts_less_than_use_now() -> None:
    residency = Residency(keys=3, slots=2)
    for key in (0, 1):
        residency.unpin(residency.claim(key))
    for _ in range(3):
        residency.note(0, 1.0)
    for _ in range(1000):
        residency.advance()
    residency.note(1, 1.0)
    residency.claim(2)
    assert residency.find(0) == -1
    assert residency.find(1) >= 0


def test_an_expert_that_left_is_remembered() -> None:
    """Two that came back often are kept before one that came once, though it came last."""
    residency = Residency(keys=3, slots=1)
    for key in (0, 1, 0, 1, 0):
        residency.note(key, 1.0)
        if residency.find(key) < 0:
            residency.unpin(residency.claim(key))
    two = Residency(keys=3, slots=2)
    for key in (0, 0, 1):
        two.note(key, 1.0)
    for key in (1, 2):
        two.unpin(two.claim(key))
    two.unpin(two.claim(0))
    assert two.find(2) == -1


def test_spoiled_slots_are_free_once_nobody_holds_them() -> None:
    residency = Residency(keys=5, slots=1)
    slot = residency.claim(1)
    residency.pin(slot)
    residency.spoil(slot)
    assert residency.find(1) == -1
    residency.unpin(slot)
    assert residency.claim(2) == -1
    residency.unpin(slot)
    assert residency.claim(2) == slot


@pytest.mark.parametrize("scans", [1, 5])
def test_a_prompt_does_not_flush_what_decoding_comes_back_for(scans: int) -> None:
    random, cache = np.random.default_rng(0), Cache(slots=100)
    for _ in range(300):
        cache.step(skewed(random))
    before = np.mean([cache.step(skewed(random)) for _ in range(50)])
    for _ in range(scans):
        cache.scan()
    after = cache.step(skewed(random))
    assert before > 0.65
    assert after > before - 0.1


def test_skewed_routing_finds_more_than_a_cache_of_the_last_used_would() -> None:
    """All hot experts fit (72 of 100 slots), and stay: least-recently-used keeps fewer of them."""
    random, cache = np.random.default_rng(1), Cache(slots=100)
    recent: dict[int, None] = {}
    ours, theirs = [], []
    for step in range(400):
        chosen = skewed(random)
        share = cache.step(chosen)
        hits = 0
        for key in (layer * EXPERTS + expert for layer, experts in enumerate(chosen) for expert in experts):
            hits += key in recent
            recent.pop(key, None)
            recent[key] = None
            if len(recent) > 100:
                del recent[next(iter(recent))]
        if step >= 200:
            ours.append(share)
            theirs.append(hits / (4 * LAYERS))
    assert np.mean(ours) > 0.68
    assert np.mean(ours) > np.mean(theirs) + 0.03


def test_a_scan_larger_than_memory_finds_its_beginning_again() -> None:
    cache = Cache(slots=LAYERS * EXPERTS // 2)
    assert cache.scan() == 0
    assert cache.scan() > 0.4
