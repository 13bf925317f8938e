"""Which requests run in the next step, and how many of their tokens. Integers only.

Requests are served in order of arrival. Those that decode get their one token in every step; what is
left of the step's budget goes to prefills: each takes at most half of what is left when its turn comes,
so that a long prompt does not hold up a short one behind it, and what remains goes to the oldest, which
therefore always has the largest share.

A request holds the blocks of its whole prompt from admission, and one more whenever its output fills
the last. When none is free, the youngest running request gives up all it holds and waits at the head of
the queue, to be computed again later: its text goes on as if nothing had happened.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable

from mixbit.engine.blocks import BlockPool
from mixbit.engine.request import Chunk, Request


class Scheduler:
    """Owns the queue, the running batch, and all blocks and slots.

    The engine's step: `plan`, run it, then for each chunk `advance`, and `append` or `finish`. If the step
    raised, `isolate` instead. Every waiting request has arrived after every running one, always.
    """

    def __init__(self, *, blocks: int, block_size: int, max_running: int, step_tokens: int) -> None:
        if step_tokens < max_running:
            raise ValueError(f"step_tokens {step_tokens} is below max_running {max_running}")
        self.block_size = block_size
        self.step_tokens = step_tokens
        self.max_running = max_running
        self.blocks = BlockPool(blocks)
        self.slots = BlockPool(max_running)
        self.running: list[Request] = []  # oldest first
        self.waiting: deque[Request] = deque()  # oldest first
        self.preemptions = 0
        self._arrivals = 0

    @property
    def capacity(self) -> int:
        """Tokens that one request alone can keep in the cache."""
        return self.blocks.size * self.block_size

    @property
    def blocks_used(self) -> int:
        """Blocks that running requests hold."""
        return self.blocks.size - self.blocks.free

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
        self._arrivals += 1
        self.waiting.append(request)

    def finish(self, request: Request) -> None:
        """Forget a request, whether it ran, waited or had already ended, and free what it holds."""
        if request.ended:
            return
        request.ended = True
        if request.slot >= 0:
            self.running.remove(request)
            self._release(request)
        else:
            self.waiting.remove(request)

    def plan(self, prefill_limit: Callable[[int], int] | None = None) -> list[Chunk]:
        """The chunks of the next step, oldest request first; empty only if idle. Blocks are allocated.

        prefill_limit: how many tokens of prefill may run beside so many decodes, if there are any.
        """
        self._grow_running()
        self._admit()
        for request in self.running:
            if request.computed < request.isolate_until:
                return [self._chunk(request, min(request.pending, self.step_tokens))]
        decodes = sum(request.pending == 1 for request in self.running)
        budget = self.step_tokens - decodes
        if decodes and prefill_limit is not None:
            budget = min(budget, prefill_limit(decodes))
        prefills = [request for request in self.running if request.pending > 1]
        shares: dict[int, int] = {}
        for request in prefills:
            shares[request.arrival] = min(request.pending, (budget + 1) // 2)
            budget -= shares[request.arrival]
        for request in prefills:
            more = min(request.pending - shares[request.arrival], budget)
            shares[request.arrival] += more
            budget -= more
        counts = ((request, shares.get(request.arrival, 1)) for request in self.running)
        return [self._chunk(request, count) for request, count in counts if count]

    def advance(self, chunk: Chunk) -> None:
        """Note that a chunk has been computed."""
        chunk.request.computed = chunk.start + chunk.count

    def append(self, request: Request, token: int) -> bool:
        """Add a sampled token; true if the request has now reached its length."""
        request.tokens.append(token)
        return len(request.tokens) >= request.max_length

    def isolate(self, chunks: list[Chunk]) -> None:
        """After a step that raised: compute its requests again from the start, each in steps of its own.

        Nothing is assumed of the state the failed step left behind. Once past the failed chunk a request
        joins the batch again. The others that run, which had no share of the step, wait with them.
        """
        for chunk in chunks:
            request = chunk.request
            request.isolate_until = max(request.isolate_until, chunk.start + chunk.count)
        while self.running:
            self._preempt_youngest()

    def check_idle(self) -> None:
        """Raise RuntimeError if anything is held though nothing runs: a leak."""
        if not self.idle or self.blocks.held() or self.slots.held():
            raise RuntimeError(
                f"not idle: {len(self.running)} running, {len(self.waiting)} waiting, "
                f"blocks {sorted(self.blocks.held())}, slots {sorted(self.slots.held())} held"
            )

    def _chunk(self, request: Request, count: int) -> Chunk:
        return Chunk(request, request.computed, count)

    def _blocks_missing(self, request: Request) -> int:
        return -(-len(request.tokens) // self.block_size) - len(request.blocks)

    def _grow_running(self) -> None:
        """Give each running request the blocks of its tokens, oldest first; the youngest pay if need be."""
        for request in list(self.running):
            while request.slot >= 0 and (missing := self._blocks_missing(request)) > 0:
                if missing <= self.blocks.free:
                    request.blocks.extend(self.blocks.take(missing))
                else:
                    self._preempt_youngest()

    def _admit(self) -> None:
        """Start waiting requests in order while a slot and the blocks of all their tokens are free.

        One block is left for each running request to grow into, so that the newcomer is not thrown out
        again at once.
        """
        while self.waiting and self.slots.free:
            request = self.waiting[0]
            missing = self._blocks_missing(request)
            if missing + len(self.running) > self.blocks.free:
                return
            self.waiting.popleft()
            request.blocks.extend(self.blocks.take(missing))
            (request.slot,) = self.slots.take(1)
            self.running.append(request)

    def _preempt_youngest(self) -> None:
        request = self.running.pop()
        self._release(request)
        request.computed = 0
        self.waiting.appendleft(request)
        self.preemptions += 1

    def _release(self, request: Request) -> None:
        self.blocks.give_back(request.blocks)
        request.blocks = array("i")
        self.slots.give_back((request.slot,))
        request.slot = -1
