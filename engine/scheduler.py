"""Which requests run in the next step, and how many of their tokens. Integers only.

Requests are served in order of arrival. Those that decode get their one token in every step; what is
left of the step's budget goes to prefills: each takes at most half of what is left when its turn comes,
so that a long prompt does not hold up a short one behind it, and what remains goes to the oldest, which
therefore always has the largest share.

A request begins with what the prefix cache has of its prompt. It holds the blocks of its whole prompt from
admission, and one more whenever its output fills the last; each block it has filled passes to the prefix
cache, where others find it. When neither free nor cached blocks are left, the youngest running request gives
up all it holds, to the cache as far as computed, and waits at the head of the queue, to go on later as if
nothing had happened.

What two prompts begin with is computed once, also when both arrive together: while an older request, the
leader, computes what a younger one needs too, that one waits, and goes on from there.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable

from mixbit.engine.prefix_cache import Match, PrefixCache
from mixbit.engine.request import Chunk, CopyBlock, CopyState, Move, Request

_SCORED_AT_ONCE = 64  # tokens of a prompt whose logits are wanted
_STATE_SPACING = 64  # tokens between states that are kept at chunk boundaries


class Scheduler:
    """Owns the queue, the running batch, and the prefix cache with all blocks and slots.

    The engine's step: `plan`, make the `moves` and run it, then for each chunk `advance`, and `append` or
    `finish`. If the step raised, `isolate` instead. Every waiting request has arrived after every running one,
    always. moves: to be made in order and removed once made, before anything else touches blocks or slots.
    spare_states: slots beyond those of running requests, for checkpoints; None for models without such state.
    """

    def __init__(
        self, *, blocks: int, block_size: int, max_running: int, step_tokens: int, spare_states: int | None = None
    ) -> None:
        if step_tokens < max_running:
            raise ValueError(f"step_tokens {step_tokens} is below max_running {max_running}")
        self.block_size = block_size
        self.step_tokens = step_tokens
        self.max_running = max_running
        self._spacing = min(_STATE_SPACING, step_tokens)
        self.cache = PrefixCache(
            blocks=blocks,
            block_size=block_size,
            slots=max_running + (spare_states or 0),
            recurrent=spare_states is not None,
        )
        self.blocks, self.slots = self.cache.blocks, self.cache.slots
        self.moves: list[Move] = []
        self.running: list[Request] = []  # oldest first
        self.waiting: deque[Request] = deque()  # oldest first
        self.preemptions = 0
        self._arrivals = 0

    @property
    def capacity(self) -> int:
        """Tokens that one request alone can keep in the cache."""
        return self.cache.blocks.size * self.block_size

    @property
    def blocks_used(self) -> int:
        """Blocks that running requests hold."""
        return self.cache.blocks.size - self.cache.available

    @property
    def blocks_cached(self) -> int:
        """Blocks that hold a prefix and that no running request holds."""
        return self.cache.cached

    @property
    def idle(self) -> bool:
        """Whether there is nothing to run."""
        return not self.running and not self.waiting

    def add(self, request: Request) -> None:
        """Queue a new request. Its max_length must be within `capacity`, or it could wait forever."""
        if not 0 < len(request.tokens) < request.max_length <= self.capacity:
            raise ValueError(
                f"{request.request_id}: {len(request.tokens)} tokens of at most {request.max_length}, "
                f"capacity {self.capacity}"
            )
        request.arrival = self._arrivals
        request.cached_tokens = request.prompt_tokens  # until the first chunk shows where computing began
        self._arrivals += 1
        self.waiting.append(request)

    def finish(self, request: Request, *, faulty: bool = False) -> None:
        """Forget a request, whether it ran, waited or had already ended; what it computed stays cached.

        Unless `faulty`: then nothing is kept of its whole prefix, but what others use too.
        """
        if request.ended:
            return
        request.ended = True
        if request.slot >= 0:
            self.running.remove(request)
            node = request.node
            self._release(request, keep=not faulty)
            if faulty and node is not None:
                self.cache.forget(node)
        else:
            self.waiting.remove(request)

    def plan(self, prefill_limit: Callable[[int, int], int] | None = None) -> list[Chunk]:
        """The chunks of the next step, oldest request first; empty only if idle. Blocks are allocated.

        prefill_limit: how many tokens of prefill may run beside so many decodes, if there are any, after so many
        tokens of context.
        """
        self._grow_running()
        self._admit()
        for request in self.running:
            if request.computed < request.isolate_until:
                return [self._chunk(request, min(self._reach(request), self.step_tokens))]
        for request in self.running:
            if request.leader is not None:
                self._follow(request)
        prefills = [request for request in self.running if request.pending > 1 and request.leader is None]
        decodes = sum(request.pending == 1 for request in self.running)
        budget = self.step_tokens - decodes
        if prefills and decodes and prefill_limit is not None:
            budget = min(budget, prefill_limit(decodes, max(request.computed for request in prefills)))
        shares: dict[int, int] = {}
        for request in prefills:
            shares[request.arrival] = min(self._reach(request), (budget + 1) // 2)
            budget -= shares[request.arrival]
        for request in prefills:
            more = min(self._reach(request) - shares[request.arrival], budget)
            shares[request.arrival] += more
            budget -= more
        counts = ((each, shares.get(each.arrival, 1)) for each in self.running if each.leader is None)
        return [self._chunk(request, count) for request, count in counts if count]

    def advance(self, chunk: Chunk) -> None:
        """Note that a chunk has been computed: full blocks pass to the cache, with the states to be kept.

        But for those of embedded texts: an index of thousands would drive out the conversations.
        """
        request, decodes = chunk.request, chunk.decodes
        request.cached_tokens = min(request.cached_tokens, chunk.start)
        request.computed = chunk.start + chunk.count
        if request.embeds:
            return
        lasting = request.computed in request.stops
        if self.cache.recurrent and (lasting or (not decodes and self._far(request))):
            self._keep_state(request, lasting=lasting)
        self._share(request)

    def append(self, request: Request, token: int) -> bool:
        """Add a sampled token; true if the request has now reached its length."""
        request.tokens.append(token)
        return len(request.tokens) >= request.max_length

    def isolate(self, chunks: list[Chunk]) -> None:
        """After a step that raised: its requests begin again from what is cached, each in steps of its own.

        Nothing is assumed of what the failed step wrote to, blocks or states. Once past the failed chunk a
        request joins the batch again. The others that run, which had no share of the step, wait with them.
        """
        for chunk in chunks:
            request = chunk.request
            request.isolate_until = max(request.isolate_until, chunk.start + chunk.count)
        while self.running:
            self._preempt_youngest(keep=False)

    def check_idle(self) -> None:
        """Raise RuntimeError if anything is held that neither runs nor is cached: a leak."""
        if not self.idle:
            raise RuntimeError(f"not idle: {len(self.running)} running, {len(self.waiting)} waiting")
        self.cache.check()

    def _chunk(self, request: Request, count: int) -> Chunk:
        return Chunk(request, request.computed, count)

    def _far(self, request: Request) -> bool:
        """Whether enough has been computed since the last state was kept: chunks may be small."""
        return request.computed - request.kept >= self._spacing

    def _reach(self, request: Request) -> int:
        """Tokens that one chunk may compute: the state is to be kept after a stop, and logits are large."""
        most = min(request.pending, _SCORED_AT_ONCE) if request.scoring else request.pending
        if not self.cache.recurrent:
            return most
        stop = next((stop for stop in request.stops if stop > request.computed), len(request.tokens))
        return min(most, stop - request.computed)

    def _blocks_missing(self, request: Request) -> int:
        return -(-len(request.tokens) // self.block_size) - len(request.blocks)

    def _grow_running(self) -> None:
        """Give each running request the blocks of its tokens, oldest first; the youngest pay if need be."""
        for request in list(self.running):
            while request.slot >= 0 and (missing := self._blocks_missing(request)) > 0:
                if missing <= self.cache.available:
                    request.blocks.extend(self.cache.take_blocks(missing))
                else:
                    self._preempt_youngest(keep=True)

    def _admit(self) -> None:
        """Start waiting requests in order while the blocks of all their tokens are free or cached.

        One block is left for each running request to grow into, so that the newcomer is not thrown out
        again at once.
        """
        while self.waiting and len(self.running) < self.max_running:
            request = self.waiting[0]
            if not self._begin(request, self.cache.match(request.tokens, request.reusable)):
                return
            self.waiting.popleft()
            self._find_leader(request)
            self.running.append(request)

    def _begin(self, request: Request, match: Match) -> bool:
        """Give a request the prefix that was found for it, and blocks for the rest; false if there are too few."""
        cache = self.cache
        protected = match.source or match.node  # until it has been copied, the source must not be evicted
        shared = cache.acquire(match.node)
        cache.acquire(protected)
        missing = self._blocks_missing(request) - len(shared)
        enough = missing + len(self.running) <= cache.available
        taken = cache.take_blocks(missing) if enough else []
        cache.release(protected)
        if not enough:
            cache.release(match.node)
            return False
        request.blocks.extend([*shared, *taken])
        if match.checkpoint is not None:
            cache.touch(match.checkpoint)
        slot = cache.take_slot(lasting=True)
        assert slot is not None, "there is a slot for each running request"
        request.slot = slot
        self._go_on(request, match)
        return True

    def _go_on(self, request: Request, match: Match) -> None:
        """Continue from a prefix whose node is acquired, with blocks and slot that the request has."""
        request.node, request.computed, request.kept = match.node, match.length, match.length
        if match.source is not None:
            self.moves.append(CopyBlock(match.source.block, request.blocks[match.node.depth]))
        if match.checkpoint is not None and match.checkpoint.slot != request.slot:
            self.moves.append(CopyState(match.checkpoint.slot, request.slot))

    def _find_leader(self, request: Request) -> None:
        """The older request that computes most of what this one lacks, if there is one."""
        size = self.block_size
        request.leader, request.shared = None, request.computed
        for other in self.running:
            if other is request:
                return
            limit = min(request.reusable, len(other.tokens))
            shared = 0
            while shared + size <= limit and (
                request.tokens[shared : shared + size] == other.tokens[shared : shared + size]
            ):
                shared += size
            if other.pending > 1 and shared > max(request.shared, other.computed) and self._leaves(other, shared):
                request.leader, request.shared = other, shared

    def _leaves(self, leader: Request, shared: int) -> bool:
        """Whether a prefill will leave behind what others can go on from before it has computed `shared` tokens."""
        if leader.embeds or not self.cache.recurrent:
            return not leader.embeds
        return self.cache.slots.size > self.max_running and (
            shared - leader.computed >= self.step_tokens + self._spacing
            or any(leader.computed < stop <= shared for stop in leader.stops)
        )

    def _follow(self, request: Request) -> None:
        """Go on from what the leader has computed; once that is all, or the leader has gone, follow no more."""
        self._catch_up(request)
        leader = request.leader
        assert leader is not None
        if leader.slot < 0:
            self._find_leader(request)
        elif max(leader.computed, request.computed) >= request.shared:
            request.leader = None

    def _catch_up(self, request: Request) -> None:
        """Exchange blocks that are still to be computed for those of the cache that by now say the same."""
        cache, before = self.cache, request.node
        assert before is not None
        match = cache.match(request.tokens, request.reusable, before)
        if match.length <= request.computed:
            return
        path = cache.acquire(match.node)
        cache.release(before)
        if match.node is not before:
            for checkpoint in list(request.checkpoints.values()):
                cache.drop(checkpoint)
        cache.blocks.give_back(request.blocks[before.depth : match.node.depth])
        request.blocks[: match.node.depth] = array("i", path)
        if match.checkpoint is not None:
            cache.touch(match.checkpoint)
        self._go_on(request, match)

    def _preempt_youngest(self, *, keep: bool) -> None:
        request = self.running.pop()
        self._release(request, keep=keep)
        request.computed, request.leader = 0, None
        self.waiting.appendleft(request)
        self.preemptions += 1

    def _share(self, request: Request) -> None:
        """Pass the blocks that are full to the cache, with the checkpoints in them."""
        node, size = request.node, self.block_size
        assert node is not None
        while (end := (node.depth + 1) * size) <= request.computed:
            inside = {place: each for place, each in request.checkpoints.items() if place <= end}
            place = node.depth
            node = self.cache.extend(node, tuple(request.tokens[end - size : end]), request.blocks[place], inside)
            request.blocks[place] = node.block
        request.node = node

    def _keep_state(self, request: Request, *, lasting: bool) -> None:
        """Take a checkpoint of the state as it is, if there is room."""
        request.kept = request.computed
        if (slot := self.cache.take_slot(lasting=lasting)) is not None:
            self.moves.append(CopyState(request.slot, slot))
            self.cache.keep(slot, request.computed, request.checkpoints, lasting=lasting)

    def _release(self, request: Request, *, keep: bool) -> None:
        """Take from a request all it holds. With `keep`, what it computed since its last full block is cached."""
        node, cache = request.node, self.cache
        assert node is not None
        start = node.depth * self.block_size
        own = list(request.blocks[node.depth :])
        keep = keep and not request.embeds
        slot: int | None = request.slot
        if keep and cache.recurrent and request.computed:
            known = request.checkpoints if request.computed > start else node.checkpoints
            place = request.computed if request.computed > start else self.block_size
            if place not in known:  # the slot becomes the checkpoint's
                cache.keep(request.slot, request.computed, request.checkpoints, lasting=True)
                slot = None
        if keep and request.computed > start:
            cache.leave(node, tuple(request.tokens[start : request.computed]), own.pop(0), request.checkpoints)
        elif keep:
            cache.adopt(node, request.checkpoints)
        for checkpoint in list(request.checkpoints.values()):
            cache.drop(checkpoint)
        cache.blocks.give_back(own)
        if slot is not None:
            cache.slots.give_back([slot])
        cache.release(node)
        request.blocks, request.node, request.slot = array("i"), None, -1
