"""The prefix cache under the scheduler: what is found, what is shared, what goes first, and that nothing leaks."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixbit.engine.request import Request, prompt_stops
from tests.engine.twin import Twin, request, scheduler

END = 99  # ends a message


def prompt(name: str, tokens: list[int], output: int = 2) -> Request:
    stops = prompt_stops(tokens, {END})
    return Request(name, list(tokens), prompt_tokens=len(tokens), max_length=len(tokens) + output, stops=stops)


def cached(twin: Twin, *requests: Request) -> list[int]:
    """Run requests one after another; how many tokens each found, which the naive device confirms."""
    found = []
    for each in requests:
        twin.scheduler.add(each)
        twin.run()
        assert twin.computed[each] == each.cached_tokens, "a cached token was computed, or one computed called cached"
        found.append(each.cached_tokens)
    twin.scheduler.check_idle()
    return found


def test_the_same_an_extended_and_a_diverging_prompt() -> None:
    twin = Twin(scheduler(block_size=4))
    first = prompt("first", list(range(10, 31)))
    (nothing,) = cached(twin, first)
    said = first.tokens[:-1]  # the last token was sampled, not computed
    found = cached(
        twin,
        prompt("same", list(range(10, 31))),
        prompt("extended", [*first.tokens, 5, 6]),
        prompt("within a block", [*range(10, 25), 7, 7, 7]),
        prompt("other", [8, 8, 8]),
    )
    assert (nothing, found) == (0, [20, len(said), 15, 0])


def test_a_prompt_of_whole_blocks_computes_one_token() -> None:
    twin = Twin(scheduler(block_size=4))
    assert cached(twin, prompt("a", list(range(8)), 4), prompt("b", list(range(8)), 4)) == [0, 7]


def test_recurrent_models_go_on_from_the_deepest_checkpoint() -> None:
    twin = Twin(scheduler(block_size=4, step_tokens=64, spare=40))
    system = [*range(100, 150), END]
    question, answer = [*range(200, 245), END], 3
    first = prompt("first", [*system, *question, 7, 8, 9], answer)
    twin.scheduler.add(first)
    twin.run()
    said = len(first.tokens) - 1
    found = cached(
        twin,
        prompt("same", [*system, *question, 7, 8, 9]),  # from the end of the question
        prompt("next turn", [*first.tokens, END, *range(300, 310)]),  # from the end of the answer
        prompt("answer rewritten", [*system, *question, 7, 1, 1, 1, 1]),
        prompt("other question", [*system, *range(400, 420)]),  # from the end of the system prompt
        prompt("other system prompt", [*range(100, 120), 1, *range(400, 420)]),
    )
    assert found == [len(system + question), said, len(system + question), len(system), 0]


def test_chunk_boundaries_serve_where_a_long_message_was_edited() -> None:
    twin = Twin(scheduler(block_size=4, step_tokens=16, spare=40))
    text = list(range(1000, 1100))
    assert cached(twin, prompt("a", text), prompt("b", [*text[:50], 1, 2, 3])) == [0, 48]


def test_states_of_small_chunks_are_not_kept_closer_than_they_are_of_use() -> None:
    """Beside decodes a chunk may be a few tokens; each state is as large as hundreds of them."""
    twin = Twin(scheduler(blocks=400, block_size=4, step_tokens=16, spare=40), limit=lambda decodes, context: 2)
    twin.scheduler.add(prompt("decodes", [5, 6, 7], 200))
    twin.step()
    text = list(range(1000, 1100))
    one = prompt("a", text)
    twin.scheduler.add(one)
    while one.computed < 96:
        twin.step()
    places = [each.position for node in twin.scheduler.cache.nodes() for each in node.checkpoints.values()]
    assert sorted(place for place in places if place > 3) == [16, 32, 48, 64, 80, 96]
    assert cached(twin, prompt("b", [*text[:50], 1, 2, 3])) == [48]


def test_interleaved_conversations_keep_their_prefixes() -> None:
    twin = Twin(scheduler(blocks=200, block_size=4, spare=60))
    talks = {name: [*range(start, start + 30), END] for name, start in (("a", 100), ("b", 200), ("c", 300))}
    for turn in range(4):
        for name, tokens in talks.items():
            one = prompt(f"{name}{turn}", [*tokens, 7, 8], output=3)
            (found,) = cached(twin, one)
            assert found >= (len(tokens) - 9 if turn else 0)
            talks[name] = [*one.tokens, END, 5, 6, END]


def test_concurrent_requests_end_up_sharing_blocks() -> None:
    twin = Twin(scheduler(block_size=4, max_running=4, step_tokens=64))
    for name in "abcd":
        twin.scheduler.add(prompt(name, list(range(40)), output=8))
    while twin.scheduler.waiting or any(each.pending > 1 for each in twin.scheduler.running):
        twin.step()
    assert len({tuple(each.blocks[:10]) for each in twin.scheduler.running}) == 1
    assert len(twin.scheduler.blocks.held()) < 2 * 12
    twin.run()
    twin.scheduler.check_idle()


@pytest.mark.parametrize("spare", [None, 40])
def test_what_prompts_that_arrive_together_share_is_computed_once(spare: int | None) -> None:
    twin = Twin(scheduler(blocks=400, block_size=4, max_running=4, step_tokens=16, spare=spare))
    system = [*range(100, 179), END]
    requests = [prompt(name, [*system, number, number, number]) for number, name in enumerate("abcd")]
    for each in requests:
        twin.scheduler.add(each)
    computed = 0
    while not twin.scheduler.idle:
        computed += sum(chunk.count for chunk in twin.step())
    assert [each.cached_tokens for each in requests] == [0, 80, 80, 80]
    assert computed == 80 + 4 * (3 + 1)
    twin.scheduler.check_idle()


def test_the_same_prompt_many_times_at_once_is_computed_once_but_for_its_last_block() -> None:
    twin = Twin(scheduler(blocks=100, block_size=4, max_running=8, step_tokens=32))
    requests = [prompt(str(number), list(range(50))) for number in range(8)]
    for each in requests:
        twin.scheduler.add(each)
    twin.run()
    assert [each.cached_tokens for each in requests] == [0] + [48] * 7


@pytest.mark.parametrize("fault", [False, True])
def test_those_who_wait_go_on_when_their_leader_is_gone(fault: bool) -> None:
    twin = Twin(scheduler(blocks=100, block_size=4, max_running=8, step_tokens=16))
    requests = [prompt(str(number), list(range(50))) for number in range(3)]
    for each in requests:
        twin.scheduler.add(each)
    twin.step()
    twin.scheduler.finish(requests[0], faulty=fault)
    twin.run()
    assert [each.cached_tokens for each in requests[1:]] == ([0, 48] if fault else [16, 48])
    twin.scheduler.check_idle()


def test_a_prompt_that_shares_little_with_a_long_one_waits_for_that_alone() -> None:
    twin = Twin(scheduler(blocks=200, block_size=4, step_tokens=16))
    long, short = prompt("long", list(range(300))), prompt("short", [*range(8), 7, 7], 1)
    twin.scheduler.add(long)
    twin.scheduler.add(short)
    twin.step()
    assert twin.step()[-1].request is short
    assert twin.finished == [short]
    assert short.cached_tokens == 8


def test_the_least_recently_used_prefix_goes_first_and_use_refreshes() -> None:
    twin = Twin(scheduler(blocks=8, block_size=4))
    a, b, c = ([start] * 11 for start in (1, 2, 3))
    assert cached(twin, prompt("a", a, 1), prompt("b", b, 1)) == [0, 0]
    assert cached(twin, prompt("a again", a, 1)) == [10]
    assert cached(twin, prompt("c", c, 1)) == [0]  # b must make room
    assert cached(twin, prompt("a still", a, 1)) == [10]
    assert twin.scheduler.cache.evictions > 0
    assert cached(twin, prompt("b anew", b, 1))[0] < 10


def test_checkpoints_at_chunk_boundaries_go_before_the_others() -> None:
    twin = Twin(scheduler(blocks=200, block_size=4, step_tokens=16, max_running=1, spare=2))
    system = [*range(100, 140), END]
    cached(twin, prompt("a", [*system, *range(500, 600)], 1))
    assert cached(twin, prompt("b", [*system, 1, 2, 3])) == [len(system)]


def test_without_spare_slots_a_recurrent_model_computes_all_or_uses_what_is_idle() -> None:
    twin = Twin(scheduler(block_size=4, max_running=1, spare=0))
    a, b = [*range(10, 30)], [*range(50, 70)]
    first = prompt("a", a)
    assert cached(twin, first) == [0]
    assert cached(twin, prompt("on", [*first.tokens, 5])) == [21]
    assert cached(twin, prompt("b", b), prompt("a again", a)) == [0, 0]


def test_a_fault_leaves_nothing_of_its_prompt() -> None:
    twin = Twin(scheduler(block_size=4, step_tokens=8, spare=9))
    twin.scheduler.add(prompt("bad", list(range(30))))
    twin.step()
    twin.step(fail=True)
    twin.scheduler.check_idle()
    assert not twin.scheduler.blocks.held()
    assert cached(twin, prompt("again", list(range(30)))) == [0]


def test_an_aborted_prefill_is_not_lost() -> None:
    twin = Twin(scheduler(block_size=4, step_tokens=8, spare=9))
    one = prompt("a", list(range(30)))
    twin.scheduler.add(one)
    twin.step()
    twin.step()
    twin.scheduler.finish(one)
    assert cached(twin, prompt("again", list(range(30)))) == [16]


def test_a_double_release_is_noticed() -> None:
    twin = Twin(scheduler())
    cached(twin, request("a", 9, 2))
    (node,) = list(twin.scheduler.cache.root.children.values())
    twin.scheduler.cache.release(node)
    with pytest.raises(RuntimeError, match="the cache leaks"):
        twin.scheduler.check_idle()


@pytest.mark.parametrize(
    ("tokens", "stops"),
    [
        ([1], ()),
        ([1, 2, END], ()),
        ([1, END, 2], (2,)),
        ([1] * 40, (39,)),
        ([1] * 40 + [END] + [2] * 31, (41,)),
        ([1] * 40 + [END] + [2] * 33, (41, 73)),
        ([1, END, 2, END, 3, END, 4], (2, 6)),
        ([1, END] + [2] * 130 + [END, 3, END, 4], (2, 133, 135)),
    ],
)
def test_stops_of_a_prompt(tokens: list[int], stops: tuple[int, ...]) -> None:
    assert prompt_stops(tokens, {END}) == stops


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from([None, 0, 1, 3, 12]),
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(12, 60),
    st.integers(0, 14),
)
def test_random_conversations_aborts_faults_and_evictions(
    seed: int, spare: int | None, max_running: int, block_size: int, blocks: int, extra_tokens: int
) -> None:
    """Prompts continue, repeat or part from earlier ones; the twin checks every step and every lookup."""
    rng = random.Random(seed)
    twin = Twin(
        scheduler(
            blocks=blocks,
            block_size=block_size,
            max_running=max_running,
            step_tokens=max_running + extra_tokens,
            spare=spare,
        ),
        limit=rng.choice([None, lambda decodes, context: rng.randint(0, 3)]),
    )
    past: list[list[int]] = [[1, 2, 3]]
    added: list[Request] = []
    for number in range(25):
        event = rng.random()
        if event < 0.45:
            base = rng.choice(past)
            tokens = [*base[: rng.randint(0, len(base))], *(rng.choice([1, 2, END]) for _ in range(rng.randint(1, 9)))]
            one = prompt(str(number), tokens, rng.randint(1, 8))
            if one.max_length <= twin.scheduler.capacity:
                one.stops = tuple(sorted({rng.randint(1, len(tokens)) for _ in range(2)}))
                if rng.random() < 0.2:
                    one.embeds, one.stops, one.max_length = True, (), len(tokens) + 1
                added.append(one)
                twin.scheduler.add(one)
        elif event < 0.55 and added:
            twin.scheduler.finish(rng.choice(added))
        elif event < 0.62:
            if not twin.scheduler.idle:
                twin.step(fail=True)
        else:
            for _ in range(rng.randint(1, 6)):
                if not twin.scheduler.idle:
                    twin.step()
        past += [each.tokens for each in twin.finished[-3:]]
    twin.run()
    for each in twin.finished:
        assert each.cached_tokens == min(twin.computed[each], each.prompt_tokens)
        assert not (each.embeds and each.cached_tokens)
    twin.scheduler.check_idle()
