"""A scheduler driven without a model, on a naive device that remembers what was computed where."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

from mixbit.engine.prefix_cache import Match, Node, PrefixCache
from mixbit.engine.request import Chunk, CopyBlock, CopyState, Move, Request
from mixbit.engine.scheduler import Scheduler

_NUMBERS = itertools.count(2)


def request(name: str, prompt: int, output: int) -> Request:
    """One whose prompt is like no other's."""
    return Request(name, tokens=[next(_NUMBERS)] * prompt, prompt_tokens=prompt, max_length=prompt + output)


def scheduler(
    *, blocks: int = 100, block_size: int = 4, max_running: int = 4, step_tokens: int = 16, spare: int | None = None
) -> Scheduler:
    return Scheduler(
        blocks=blocks, block_size=block_size, max_running=max_running, step_tokens=step_tokens, spare_states=spare
    )


class Twin:
    """Runs the scheduler's plans on a naive device, where what a place holds is the prefix it was made from."""

    def __init__(self, scheduler: Scheduler, limit: Callable[[int, int], int] | None = None) -> None:
        """limit: of a prefill beside decodes, as `plan` takes it."""
        self.scheduler, self.limit = scheduler, limit
        self.finished: list[Request] = []
        self.memory: dict[tuple[int, int], tuple[int, ...]] = {}  # (block, place) -> tokens up to it
        self.states: dict[int, tuple[int, ...]] = {}  # slot -> tokens it has seen
        self.computed: dict[Request, int] = {}  # the first prompt token that was ever computed for it
        self._match, scheduler.cache.match = scheduler.cache.match, self.match  # type: ignore[method-assign]

    def match(self, tokens: Sequence[int], limit: int, known: Node | None = None) -> Match:
        """The cache's answer, compared with a search through all it holds."""
        found = self._match(tokens, limit, known)
        best = usable(self.scheduler.cache, tokens, limit)
        assert found.length == best or (known is not None and best <= known.depth * self.scheduler.block_size)
        return found

    def step(self, *, fail: bool = False) -> list[Chunk]:
        plan = self.scheduler.plan(self.limit)
        self.check(plan)
        if fail:
            if len(plan) == 1:
                self.scheduler.finish(plan[0].request, faulty=True)
            else:
                self.scheduler.isolate(plan)
            return plan
        self.make(self.scheduler.moves)
        for chunk in plan:
            self.compute(chunk)
        for chunk in plan:
            before = len(list(self.scheduler.cache.nodes()))
            self.scheduler.advance(chunk)
            assert not chunk.request.embeds or len(list(self.scheduler.cache.nodes())) == before
            if chunk.request.pending == 0 and self.scheduler.append(chunk.request, token=1):
                self.scheduler.finish(chunk.request)
                self.finished.append(chunk.request)
        return plan

    def make(self, moves: list[Move]) -> None:
        for move in moves:
            match move:
                case CopyBlock(source, target):
                    for place in range(self.scheduler.block_size):
                        self.memory[target, place] = self.memory.get((source, place), ())
                case CopyState(source, target):
                    self.states[target] = self.states[source]
        moves.clear()

    def compute(self, chunk: Chunk) -> None:
        size, owner = self.scheduler.block_size, chunk.request
        end = chunk.start + chunk.count
        first = self.computed.setdefault(owner, chunk.start)
        self.computed[owner] = min(first, chunk.start)
        for position in range(end):
            where = owner.blocks[position // size], position % size
            if position >= chunk.start:
                self.memory[where] = tuple(owner.tokens[: position + 1])
        for position in range(end):
            where = owner.blocks[position // size], position % size
            assert self.memory[where] == tuple(owner.tokens[: position + 1]), "not the prefix's own keys and values"
        state = self.states.get(owner.slot, ()) if chunk.start else ()
        if self.scheduler.cache.recurrent:
            assert state == tuple(owner.tokens[: chunk.start]), "not the prefix's own state"
        self.states[owner.slot] = tuple(owner.tokens[:end])

    def check(self, plan: list[Chunk]) -> None:
        scheduler, cache = self.scheduler, self.scheduler.cache
        assert sum(chunk.count for chunk in plan) <= scheduler.step_tokens
        assert bool(plan) == (not scheduler.idle)
        assert len(scheduler.running) <= scheduler.max_running
        arrivals = [chunk.request.arrival for chunk in plan]
        assert arrivals == sorted(set(arrivals))
        in_order = [entry.arrival for entry in (*scheduler.running, *scheduler.waiting)]
        assert in_order == sorted(in_order), "a younger request runs before an older one"
        ends = {entry: entry.node for entry in scheduler.running if entry.node is not None}
        assert len(ends) == len(scheduler.running)
        owned = [block for entry, node in ends.items() for block in entry.blocks[node.depth :]]
        cached = [node.block for node in cache.nodes()]
        assert sorted(owned + cached) == sorted(scheduler.blocks.held()), "a block in two hands, or in none"
        paths = {entry: list(path_of(node)) for entry, node in ends.items()}
        for entry, path in paths.items():
            assert [node.block for node in path] == list(entry.blocks[: len(path)])
        for node in cache.nodes():
            assert node.users == sum(node in path for path in paths.values()), "a reference that nobody explains"
        assert cache.cached == sum(node.users == 0 for node in cache.nodes())
        slots = [entry.slot for entry in scheduler.running]
        tables = [entry.checkpoints for entry in scheduler.running] + [node.checkpoints for node in cache.nodes()]
        kept = [each.slot for table in tables for each in table.values()]
        assert sorted(slots + kept) == sorted(scheduler.slots.held()), "a slot in two hands, or in none"
        isolated = [entry for entry in scheduler.running if entry.computed < entry.isolate_until]
        if isolated:
            assert [chunk.request for chunk in plan] == isolated[:1]
        else:
            decoding = {entry.arrival for entry in scheduler.running if entry.pending == 1}
            assert decoding <= set(arrivals), "a request that decodes was left out of a step"
            for entry in scheduler.running:
                if (leader := entry.leader) is not None:
                    assert leader in scheduler.running, "a request that waits for one that does not run"
                    assert leader.arrival < entry.arrival
                    assert max(entry.computed, leader.computed) < entry.shared, "a request that waits for nothing"
        for chunk in plan:
            assert chunk.start == chunk.request.computed
            assert 0 < chunk.count <= chunk.request.pending
            assert (chunk.start + chunk.count - 1) // scheduler.block_size < len(chunk.request.blocks)

    def run(self, steps: int = 10_000) -> None:
        while not self.scheduler.idle:
            self.step()
            steps -= 1
            assert steps > 0, "the scheduler does not come to an end"


def path_of(node: Node | None) -> Iterator[Node]:
    """From the root down to a node."""
    assert node is not None
    if node.parent is not None:
        yield from path_of(node.parent)
        yield node


def usable(cache: PrefixCache, tokens: Sequence[int], limit: int) -> int:
    """How much of `tokens` the cache can serve, found by looking at everything in it."""
    best = 0
    for node in cache.nodes():
        held = [token for step in path_of(node) for token in step.tokens]
        common = next((i for i, (a, b) in enumerate(zip(held, tokens[:limit], strict=False)) if a != b), None)
        common = min(len(held), limit, len(tokens)) if common is None else common
        start = len(held) - len(node.tokens)
        ends = [start + place for place in node.checkpoints] if cache.recurrent else range(common + 1)
        best = max([best, *(end for end in ends if end <= common)])
    return best
