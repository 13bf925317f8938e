"""The scheduler, driven without a model: a step is a list of chunks."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixbit.engine.request import Request
from tests.engine.twin import Twin, request, scheduler


def test_a_request_runs_in_chunks_then_one_token_a_step() -> None:
    twin = Twin(scheduler(step_tokens=16))
    twin.scheduler.add(request("a", prompt=40, output=3))
    plans = []
    while not twin.scheduler.idle:
        plans.append([(chunk.start, chunk.count, chunk.samples) for chunk in twin.step()])
    assert plans == [[(0, 16, False)], [(16, 16, False)], [(32, 8, False)], [(40, 1, False)], [(41, 1, False)]]
    twin.scheduler.check_idle()


def test_decodes_come_first_and_prefills_share_the_rest() -> None:
    twin = Twin(scheduler(step_tokens=16))
    twin.scheduler.add(request("decoding", prompt=2, output=50))
    twin.step()
    for name, prompt in (("long", 100), ("short", 3), ("third", 100)):
        twin.scheduler.add(request(name, prompt=prompt, output=5))
    shares = {chunk.request.request_id: chunk.count for chunk in twin.step()}
    assert shares == {"decoding": 1, "long": 10, "short": 3, "third": 2}


def test_a_short_prompt_overtakes_a_long_one() -> None:
    twin = Twin(scheduler(step_tokens=16))
    for name, prompt in (("long", 300), ("short", 6)):
        twin.scheduler.add(request(name, prompt=prompt, output=1))
    for _ in range(2):
        twin.step()
    assert [entry.request_id for entry in twin.finished] == ["short"]


def test_the_youngest_is_preempted_and_resumed_without_a_trace() -> None:
    twin = Twin(scheduler(blocks=8, block_size=2, max_running=2))
    old, young = request("old", prompt=6, output=10), request("young", prompt=6, output=10)
    twin.scheduler.add(old)
    twin.scheduler.add(young)
    twin.run()
    assert twin.scheduler.preemptions > 0
    assert twin.finished == [old, young]
    assert [len(entry.tokens) for entry in (old, young)] == [16, 16]
    twin.scheduler.check_idle()


def test_isolated_requests_run_alone_until_past_the_failed_chunk() -> None:
    twin = Twin(scheduler(step_tokens=16))
    twin.scheduler.add(request("a", prompt=3, output=9))
    twin.scheduler.add(request("b", prompt=20, output=9))
    twin.step()
    failed = {chunk.request.request_id: chunk.start + chunk.count for chunk in twin.step(fail=True)}
    assert failed == {"a": 4, "b": 20}
    alone = []
    while len(plan := twin.step()) == 1:
        alone.append((plan[0].request.request_id, plan[0].start, plan[0].count))
    assert alone == [("a", 0, 4), ("b", 12, 8)], "what was computed before the failed step is there still"
    twin.run()
    assert {entry.request_id: entry.output_tokens for entry in twin.finished} == {"a": 9, "b": 9}


def test_a_request_that_can_never_fit_is_an_error() -> None:
    plan = scheduler(blocks=3, block_size=4)
    assert plan.capacity == 12
    with pytest.raises(ValueError, match="capacity 12"):
        plan.add(request("a", prompt=10, output=3))


def test_finishing_twice_and_finishing_a_waiting_request_frees_once() -> None:
    twin = Twin(scheduler(max_running=1, step_tokens=4))
    first, second = request("first", 8, 8), request("second", 8, 8)
    twin.scheduler.add(first)
    twin.scheduler.add(second)
    twin.step()
    for entry in (second, first, first):
        twin.scheduler.finish(entry)
    twin.scheduler.check_idle()


def test_a_leak_is_noticed() -> None:
    plan = scheduler()
    plan.blocks.take(1)
    with pytest.raises(RuntimeError, match=r"blocks \[0\] are held by nobody"):
        plan.check_idle()


def test_nobody_waits_for_ever_while_others_keep_arriving() -> None:
    """Short prompts that come in every step hold up a long one by no more than their half of the steps."""
    twin = Twin(scheduler(blocks=400, max_running=4, step_tokens=16))
    long = request("long", prompt=400, output=2)
    twin.scheduler.add(long)
    steps = 0
    while long not in twin.finished:
        for _ in range(3):
            twin.scheduler.add(request("short", prompt=5, output=2))
        twin.step()
        steps += 1
        assert steps <= 400 / ((16 - 3) / 2) + 2
    waiting = request("waiting", prompt=400, output=2)
    twin.scheduler.add(waiting)
    ahead = len(twin.scheduler.waiting)
    while waiting not in twin.finished:
        twin.scheduler.add(request("later", prompt=5, output=2))
        twin.step()
        steps += 1
        assert steps < 10 * ahead + 300


REQUESTS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20)), min_size=1, max_size=12)
EVENTS = st.lists(st.sampled_from(["step", "add", "abort", "fail"]), max_size=60)


@settings(max_examples=120, deadline=None)
@given(REQUESTS, EVENTS, st.integers(1, 5), st.integers(0, 12), st.integers(13, 60), st.integers(1, 5), st.randoms())
def test_every_request_ends_with_the_right_length_whatever_happens(
    shapes: list[tuple[int, int]],
    events: list[str],
    max_running: int,
    extra_tokens: int,
    blocks: int,
    block_size: int,
    random: object,
) -> None:
    twin = Twin(
        scheduler(
            blocks=blocks,
            block_size=block_size,
            max_running=max_running,
            step_tokens=max_running + extra_tokens,
        )
    )
    queue = [request(str(number), *shape) for number, shape in enumerate(shapes)]
    queue = [entry for entry in queue if entry.max_length <= twin.scheduler.capacity]
    added: list[Request] = []
    gone: set[Request] = set()
    for event in events:
        if event == "add" and queue:
            added.append(queue.pop(0))
            twin.scheduler.add(added[-1])
        elif event == "abort" and added:
            entry = random.choice(added)  # type: ignore[attr-defined]
            if not entry.ended:
                gone.add(entry)
            twin.scheduler.finish(entry)
        elif event in ("step", "fail"):
            plan = twin.step(fail=event == "fail" and not twin.scheduler.idle)
            if event == "fail" and len(plan) == 1:
                gone.add(plan[0].request)
    for entry in queue:
        added.append(entry)
        twin.scheduler.add(entry)
    twin.run()
    assert {entry for entry in added if entry not in gone} == set(twin.finished)
    assert all(len(entry.tokens) == entry.max_length for entry in twin.finished)
    twin.scheduler.check_idle()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=2, max_size=8))
def test_an_older_prefill_never_has_the_smaller_share_of_a_step(prompts: list[int]) -> None:
    twin = Twin(scheduler(max_running=8, step_tokens=20))
    for number, prompt in enumerate(prompts):
        twin.scheduler.add(request(str(number), prompt, output=2))
    while not twin.scheduler.idle:
        pending = {entry: entry.pending for entry in (*twin.scheduler.running, *twin.scheduler.waiting)}
        plan = [chunk for chunk in twin.step() if pending[chunk.request] > 1]
        for older, younger in pairwise(plan):
            assert older.count >= younger.count or older.count == pending[older.request]
