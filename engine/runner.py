"""Turns the scheduler's chunks into the arrays of one step."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from mixbit.engine.pace import Load
from mixbit.engine.request import Chunk, CopyBlock, CopyState, Move, Request
from mixbit.kernels.executor import Batch, CacheConfig, Executor

_WARM_TOKENS = 16
_FEW_TOKENS = (3, 5, 9)  # of small prefills, the last also after a context so _FAR that attention shows
_FAR = 2048
_TIMED_SECONDS = 0.4


class Runner:
    """Runs chunks on an executor."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor

    def run(self, chunks: Sequence[Chunk], moves: list[Move]) -> Iterable[npt.NDArray[np.float32]]:
        """Of each chunk in order its rows: logits [vocab], or hidden states [hidden] if its request embeds.

        `moves` are made before.
        """
        self.make(moves)
        embeds = [chunk for chunk in chunks if chunk.request.embeds]
        if not embeds:
            return self.executor.run(batch_of(chunks))
        others = [chunk for chunk in chunks if not chunk.request.embeds]
        logits = iter(self.executor.run(batch_of(others)) if others else ())
        states = iter(self.executor.hidden_states(batch_of(embeds)))
        return [next(states if chunk.request.embeds else logits) for chunk in chunks for _ in chunk.rows]

    def make(self, moves: list[Move]) -> None:
        """Make the moves in order, and remove each once it is made."""
        while moves:
            match moves[0]:
                case CopyBlock(source, target):
                    self.executor.copy_block(source, target)
                case CopyState(source, target):
                    self.executor.copy_state(source, target)
            del moves[0]


def batch_of(chunks: Sequence[Chunk]) -> Batch:
    """The arrays of a step. Every chunk's request has its blocks and slot."""
    counts = [chunk.count for chunk in chunks]
    tokens: list[int] = []
    tables = np.full((len(chunks), max(len(chunk.request.blocks) for chunk in chunks)), -1, np.int32)
    for row, chunk in enumerate(chunks):
        tokens += chunk.request.tokens[chunk.start : chunk.start + chunk.count]
        blocks = np.frombuffer(chunk.request.blocks, np.int32)
        tables[row, : len(blocks)] = blocks
    starts = np.zeros(len(chunks) + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    rows = [start - chunk.start + place for chunk, start in zip(chunks, starts, strict=False) for place in chunk.rows]
    return Batch(
        tokens=np.array(tokens, np.int32),
        query_starts=starts,
        context_lengths=np.array([chunk.start for chunk in chunks], np.int32),
        block_tables=tables,
        state_slots=np.array([chunk.request.slot for chunk in chunks], np.int32),
        logit_rows=np.array(rows, np.int32),
    )


def warm_up(executor: Executor, cache: CacheConfig, step_tokens: int, context: int) -> list[tuple[Load, float]]:
    """Run prefills and decodes, so that the first request does not pay for compilation and first touch.

    context: tokens of the longest sequence. Returns the seconds of what was run after that, as `Pace.note` takes
    it: little on slow devices.
    """
    capacity = min(context, cache.blocks * cache.block_size)
    longest = min(step_tokens, capacity)
    request = Request("warm-up", tokens=[], prompt_tokens=1, max_length=capacity + 1)
    request.blocks.extend(range(-(-capacity // cache.block_size)))
    request.slot = 0

    def seconds(start: int, count: int) -> float:
        request.tokens = [place % _WARM_TOKENS for place in range(start + count)]
        before = time.perf_counter()
        executor.run(batch_of([Chunk(request, start, count)]))
        return time.perf_counter() - before

    size = min(longest, _WARM_TOKENS)
    seconds(0, size)
    seconds(size - 1, 1)
    timed = [(Load(1), seconds(size - 1, 1)) for _ in range(3)]
    end = time.perf_counter() + _TIMED_SECONDS
    small, far = ((0, count) for count in _FEW_TOKENS), (_FAR, _FEW_TOKENS[-1])
    for start, count in (*small, far, *((0, 16 << n) for n in range(20))):
        if count > longest or start + count > capacity:
            continue
        if time.perf_counter() + 4 * timed[-1][1] > end:
            break
        least = min(seconds(start, count) for _ in range(2))  # the first may touch memory, either may be disturbed
        timed.append((Load(0, count, count * (2 * start + count) // 2), least))
    return timed
