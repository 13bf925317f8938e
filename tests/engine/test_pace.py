"""Prefill sizes over simulated devices, and what the warm-up tells of a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from time import sleep

import pytest

from mixbit.engine.pace import Pace
from mixbit.engine.runner import warm_up
from mixbit.kernels.executor import Batch, CacheConfig

Device = Callable[[int, int], float]


def compute_bound(decodes: int, prefill: int) -> float:
    """A small dense model on a CPU: every token costs the same."""
    return 0.005 + 0.001 * decodes + 0.0007 * prefill


def experts_from_memory(decodes: int, prefill: int) -> float:
    """A mixture of experts: small chunks read nearly as many experts as large ones."""
    return 0.03 + 0.02 * min(decodes + prefill, 50) + 0.0005 * prefill


def run(pace: Pace, device: Device, decodes: int, steps: int, noise: Callable[[], float] = lambda: 1.0) -> list[int]:
    """A prompt alone, decodes alone, then both; the prefill of each step of both."""
    for _ in range(5):
        pace.note(0, 512, device(0, 512) * noise())
    for _ in range(5):
        pace.note(decodes, 0, device(decodes, 0) * noise())
    sizes = []
    for _ in range(steps):
        size = pace.limit(decodes)
        pace.note(decodes, size, device(decodes, size) * noise())
        sizes.append(size)
    return sizes


@pytest.mark.parametrize("decodes", [1, 8])
def test_steps_with_a_prefill_stay_near_the_target(decodes: int) -> None:
    sizes = run(Pace(512), compute_bound, decodes, 200)
    alone = compute_bound(decodes, 0)
    times = [compute_bound(decodes, size) / alone for size in sizes]
    assert max(times) <= 3.05
    assert sum(sizes) / len(sizes) > 0.5 * 2 * alone / 0.0007  # and what is allowed is used


def test_a_noisy_machine_does_not_stop_prefills() -> None:
    random = Random(0)
    sizes = run(Pace(512), compute_bound, 2, 1000, lambda: random.choice([1, 1, 1, 1.1, 1.3, 8]))
    quiet = run(Pace(512), compute_bound, 2, 1000)
    assert sum(sizes) > 0.4 * sum(quiet)


def test_prefill_keeps_a_share_of_its_rate_where_small_chunks_are_dear() -> None:
    sizes = run(Pace(512), experts_from_memory, 1, 200)
    seconds = sum(experts_from_memory(1, size) for size in sizes)
    alone = 512 / experts_from_memory(0, 512)
    assert sum(sizes) / seconds > 0.2 * alone
    assert max(sizes) < 512  # though not at any price


def test_a_long_context_that_makes_prefills_dear_does_not_make_them_large() -> None:
    """Attention to thousands of tokens costs each token of a chunk the same, however large the chunk."""
    pace = Pace(512)
    for size in (8, 16, 32, 64, 128, 512):
        pace.note(0, size, compute_bound(0, size))
    for _ in range(5):
        pace.note(1, 0, compute_bound(1, 0))
    context, steps = 0, []
    while context < 8000:
        size = pace.limit(1)
        seconds = compute_bound(1, size) + 1.5e-6 * size * context
        pace.note(1, size, seconds)
        context += size
        steps.append(seconds / compute_bound(1, 0))
    # Eight tokens are the least that a step takes.
    assert max(steps) < 1.5 * (1 + 8 * (0.0007 + 1.5e-6 * 8000) / compute_bound(1, 0))


def test_the_cost_of_decodes_is_measured_again() -> None:
    pace = Pace(512)
    run(pace, compute_bound, 1, 60)
    before = pace.limit(1)
    slower = [size for size in run(pace, lambda decodes, prefill: 5 * compute_bound(decodes, prefill), 1, 400) if size]
    assert slower[-1] == pytest.approx(before, rel=0.6)  # all is slower, so the ratio is what it was
    assert 0 in run(pace, compute_bound, 1, 120)


def test_the_first_decodes_run_alone() -> None:
    pace = Pace(512)
    assert pace.limit(3) == 0
    pace.note(3, 0, 0.01)
    assert 0 < pace.limit(3) < 512


@pytest.mark.parametrize("longest", [1, 7, 8, 100, 512])
def test_sizes_are_within_the_step(longest: int) -> None:
    pace = Pace(longest)
    for size in run(pace, compute_bound, 1, 100):
        assert 0 <= size <= longest


def test_small_prefills_tell_the_rate_until_a_larger_one_does() -> None:
    pace = Pace(512)
    pace.note(1, 0, experts_from_memory(1, 0))
    pace.note(0, 32, experts_from_memory(0, 32))
    early = pace.limit(1)
    assert early >= 0.25 * 32 / experts_from_memory(0, 32) * experts_from_memory(1, early)
    pace.note(0, 512, experts_from_memory(0, 512))
    pace.note(0, 16, experts_from_memory(0, 16))  # says nothing any more
    assert pace.limit(1) > early


@dataclass
class Recorder:
    """An executor that takes 1 ms for a token."""

    batches: list[Batch] = field(default_factory=list)

    def run(self, batch: Batch) -> None:
        self.batches.append(batch)
        sleep(len(batch.tokens) * 1e-3)


@pytest.mark.parametrize(("blocks", "step_tokens"), [(1, 1), (1, 512), (4, 20), (64, 512)])
def test_the_warm_up_times_what_it_runs(blocks: int, step_tokens: int) -> None:
    recorder = Recorder()
    cache = CacheConfig(blocks=blocks, block_size=8, state_slots=1)
    timed = warm_up(recorder, cache, step_tokens)  # type: ignore[arg-type]  # it runs, which is enough
    for batch in recorder.batches:
        assert len(batch.tokens) <= step_tokens
        assert batch.block_tables.max() < blocks
        assert batch.context_lengths[0] + len(batch.tokens) <= blocks * 8
    assert [(decodes, prefill) for decodes, prefill, _ in timed[:3]] == [(1, 0)] * 3
    sizes = [prefill for _, prefill, _ in timed[3:]]
    assert sizes == [size for size in (8, 16, 32, 64) if size <= min(step_tokens, blocks * 8)][: len(sizes)]
    assert all(seconds >= 0.9e-3 * max(prefill, 1) for _, prefill, seconds in timed)
