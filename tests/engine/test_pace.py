"""Prefill sizes over simulated devices, and what the warm-up tells of a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from time import sleep

import pytest

from mixbit.engine.pace import Load, Pace
from mixbit.engine.runner import warm_up
from mixbit.kernels.executor import Batch, CacheConfig

Device = Callable[[Load], float]


def compute_bound(load: Load) -> float:
    """A small dense model on a CPU: every token costs the same, and so does every key that it attends to."""
    return 0.005 + 0.001 * load.decodes + 0.0007 * load.prefill + 6e-7 * load.attended


def experts_from_memory(load: Load) -> float:
    """A mixture of experts: small chunks read nearly as many experts as large ones."""
    return 0.03 + 0.02 * min(load.decodes + load.prefill, 50) + 0.0005 * load.prefill


def part(prefill: int, context: int = 0, decodes: int = 0) -> Load:
    """A prefill after so many tokens of its prompt, beside decodes."""
    return Load(decodes, prefill, prefill * (2 * context + prefill) // 2)


def prepared(device: Device, decodes: int, noise: Callable[[], float] = lambda: 1.0) -> Pace:
    """After a warm-up, and decodes alone."""
    pace = Pace(512)
    warm = [Load(1)] * 3 + [part(3), part(5), part(9), part(9, 2048), part(16), part(32), part(64)]
    for load in warm + [Load(decodes)] * 5:
        pace.note(load, device(load) * noise())
    return pace


def run(
    pace: Pace,
    device: Device,
    decodes: int,
    prompt: int,
    noise: Callable[[], float] = lambda: 1.0,
    start: int = 0,
) -> list[tuple[int, float]]:
    """A prompt beside decodes: the size of each prefill, and the seconds of its step."""
    steps = []
    while start < prompt:
        load = part(pace.limit(decodes, start), start, decodes)
        steps.append((load.prefill, device(load)))
        pace.note(load, device(load) * noise())
        start += load.prefill
    return steps


@pytest.mark.parametrize("decodes", [1, 8])
def test_steps_with_a_prefill_stay_near_the_target_and_use_what_is_allowed(decodes: int) -> None:
    steps = run(prepared(compute_bound, decodes), compute_bound, decodes, 8000)
    alone = compute_bound(Load(decodes))
    assert max(seconds for _, seconds in steps) <= 2.55 * alone
    beside = [seconds for size, seconds in steps if size]
    assert sum(beside) / len(beside) > 1.9 * alone


def test_a_prompt_that_begins_far_in_its_context_is_slow_from_its_first_step() -> None:
    """What the cache has of a prompt is attended to as well; another prompt then begins at its beginning."""
    pace, alone = prepared(compute_bound, 1), compute_bound(Load(1))
    for start in (0, 7000, 0):
        steps = run(pace, compute_bound, 1, start + 800, start=start)
        assert max(seconds for _, seconds in steps) <= 2.7 * alone
        assert max(seconds for _, seconds in steps[:3]) > 1.5 * alone


def test_a_machine_without_a_warm_up_learns() -> None:
    steps = run(Pace(512), compute_bound, 1, 8000)
    alone = compute_bound(Load(1))
    assert steps[0][0] == 0, "the first decodes run alone"
    late = [seconds for _, seconds in steps[len(steps) // 4 :]]
    assert max(late) <= 2.8 * alone
    assert sum(late) / len(late) > 1.7 * alone


def test_a_noisy_machine_does_not_stop_prefills() -> None:
    random = Random(0)

    def noise() -> float:
        return random.choice([1, 1, 1, 1.1, 1.3, 8])

    noisy = run(prepared(compute_bound, 2, noise), compute_bound, 2, 6000, noise)
    quiet = run(prepared(compute_bound, 2), compute_bound, 2, 6000)
    assert sum(seconds for _, seconds in noisy) < 1.5 * sum(seconds for _, seconds in quiet)
    sorted_ = sorted(seconds for _, seconds in noisy)
    assert sorted_[len(sorted_) * 9 // 10] < 3.5 * compute_bound(Load(2))


def test_prefill_keeps_a_share_of_its_rate_where_small_chunks_are_dear() -> None:
    pace = prepared(experts_from_memory, 1)
    for _ in range(5):
        pace.note(part(512), experts_from_memory(part(512)))
    steps = run(pace, experts_from_memory, 1, 20_000)
    rate = sum(size for size, _ in steps) / sum(seconds for _, seconds in steps)
    assert rate > 0.2 * 512 / experts_from_memory(part(512))
    assert max(size for size, _ in steps) < 512  # though not at any price


def test_a_long_context_that_makes_prefills_dear_does_not_make_them_large() -> None:
    """The share is one of the rate that a prefill alone would have after the same context."""
    pace = prepared(compute_bound, 1)
    for _ in range(5):
        pace.note(part(512), compute_bound(part(512)))
    sizes = [size for size, _ in run(pace, compute_bound, 1, 16_000, start=12_000)]
    assert max(sizes) <= 2


def test_the_cost_of_decodes_is_measured_again() -> None:
    pace = prepared(compute_bound, 1)
    before = pace.limit(1, 0)
    slower = run(pace, lambda load: 5 * compute_bound(load), 1, 3000)
    assert slower[-1][0] == pytest.approx(pace.limit(1, 3000), rel=0.6)  # all is slower, so the ratio is what it was
    assert pace.limit(1, 0) == pytest.approx(before, rel=0.6)
    assert [size for size, _ in slower].count(0) > 3


@pytest.mark.parametrize("longest", [1, 7, 8, 100, 512])
def test_sizes_are_within_the_step(longest: int) -> None:
    pace = Pace(longest)
    for size, _ in run(pace, compute_bound, 1, 500):
        assert 0 <= size <= longest


def test_small_prefills_tell_the_rate_until_a_larger_one_does() -> None:
    pace = Pace(512)
    pace.note(Load(1), experts_from_memory(Load(1)))
    pace.note(part(32), experts_from_memory(part(32)))
    early = pace.limit(1, 0)
    assert early >= 0.25 * 32 / experts_from_memory(part(32)) * experts_from_memory(part(early, decodes=1)) * 0.8
    pace.note(part(512), experts_from_memory(part(512)))
    pace.note(part(16), experts_from_memory(part(16)))  # says nothing any more
    assert pace.limit(1, 0) > early


@dataclass
class Recorder:
    """An executor that takes 1 ms for a token, and one for a thousand keys."""

    batches: list[Batch] = field(default_factory=list)

    def run(self, batch: Batch) -> None:
        self.batches.append(batch)
        keys = len(batch.tokens) * (int(batch.context_lengths[0]) + len(batch.tokens) / 2)
        sleep(len(batch.tokens) * 1e-3 + keys * 1e-6)


@pytest.mark.parametrize(
    ("blocks", "step_tokens", "context"), [(1, 1, 8), (1, 512, 8), (4, 20, 32), (64, 512, 512), (600, 512, 4096)]
)
def test_the_warm_up_times_what_it_runs(blocks: int, step_tokens: int, context: int) -> None:
    recorder = Recorder()
    cache = CacheConfig(blocks=blocks, block_size=8, state_slots=1)
    timed = warm_up(recorder, cache, step_tokens, context)  # type: ignore[arg-type]  # it runs, which is enough
    for batch in recorder.batches:
        assert len(batch.tokens) <= step_tokens
        assert batch.block_tables.max() < blocks
        assert batch.context_lengths[0] + len(batch.tokens) <= min(blocks * 8, context)
    assert [load for load, _ in timed[:3]] == [Load(1)] * 3
    sizes = [load.prefill for load, _ in timed[3:] if load.attended <= load.prefill**2]
    assert sizes == [size for size in (3, 5, 9, 16, 32, 64, 128) if size <= min(step_tokens, blocks * 8)][: len(sizes)]
    assert any(load.attended > 1000 * load.prefill for load, _ in timed) == (context == 4096)
    for load, seconds in timed:
        assert seconds >= 0.9e-3 * (load.prefill + load.decodes) + 0.9e-6 * load.attended


def test_a_prompt_that_was_quicker_than_its_attention_seemed_to_cost() -> None:
    pace = Pace(64)
    for _ in range(2):
        pace.note(Load(1), 0.01)
    pace.note(Load(1, 4), 0.012)
    pace.note(Load(1, 4, 4 * 1000), 10.0)  # a bad moment: keys look dear
    pace.note(Load(0, 8, 8 * 2000), 0.01)
    assert pace.limit(1, 0) >= 1
