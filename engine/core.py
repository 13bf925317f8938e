"""The engine without its process: requests in, steps, messages out. One thread, that of the device, drives it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from mixbit.engine.admission import Admission, Embedding, Generation, Work
from mixbit.engine.detokenizer import Piece
from mixbit.engine.disk_restore import Restore
from mixbit.engine.disk_tier import DiskTier
from mixbit.engine.pace import Load, Pace
from mixbit.engine.pooling import NonFiniteStatesError
from mixbit.engine.protocol import (
    Delta,
    ExpertStats,
    Failed,
    Finished,
    FinishReason,
    FromWorker,
    Stats,
    TokenLogprobs,
    Usage,
)
from mixbit.engine.request import Chunk, Move, Request
from mixbit.engine.sampling import NonFiniteLogitsError
from mixbit.engine.scheduler import Scheduler
from mixbit.kernels.experts import StreamingExecutor, WeightsError

log = logging.getLogger("mixbit.engine")

Row = npt.NDArray[np.float32]
Step = Callable[[Sequence[Chunk], list[Move]], Iterable[Row]]

# A step of one request that raises is that request's fault. So many in a row, with no step between them
# that worked, is the device's: the worker gives up, and a new one may do better.
_FAILURES_IN_A_ROW = 3
_EXPORTS = 4  # entries handed to the disk between two steps
_DISK_SECONDS = 0.02  # until the thread that writes may have room again
_ARRIVAL_SECONDS = 0.02  # for what comes from the disk, while nothing runs
_BESIDE_SECONDS = 0.002  # and between steps of what does


class EngineCore:
    """Scheduler, model, samplers and detokenizers of all requests.

    step: makes the moves, computes chunks and returns for each in order those of its `rows`: logits [vocab], or
    hidden states if its request embeds. streaming: the executor, where it streams experts.
    """

    def __init__(
        self,
        step: Step,
        scheduler: Scheduler,
        admission: Admission,
        disk: DiskTier | None = None,
        pace: Pace | None = None,
        streaming: StreamingExecutor | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.admission = admission
        self._step = step
        self._disk = disk
        self._pace = pace or Pace(scheduler.step_tokens)
        self._streaming = streaming
        self._fault: str | None = None
        self._work: dict[str, Work] = {}
        self._arriving: dict[Restore, list[Work]] = {}  # wait for their prefixes from the disk
        self._failures = 0
        self._steps = 0
        self._leaks = 0

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return self.scheduler.idle and not self._arriving

    def add(self, work: Work) -> None:
        """Queue an admitted request, once what the disk has of its prompt is in memory."""
        request = work.request
        self._work[request.request_id] = work
        restore = None if self._disk is None or request.embeds else self._disk.restore(request.tokens)
        if restore is not None:
            self._arriving.setdefault(restore, []).append(work)
        else:
            self.scheduler.add(request)

    def tidy(self) -> float | None:
        """Write behind while nothing runs; the seconds until there is more to do, None if there is not."""
        if self._disk is None or not self._disk.pending:
            return None
        return 0.0 if self._disk.save(_EXPORTS) else _DISK_SECONDS

    def close(self, seconds: float) -> None:
        """Write what the disk cache still lacks, within so many seconds."""
        if self._disk is not None:
            self._disk.close(seconds)

    def abort(self, request_id: str) -> None:
        """Drop a request, wherever it is. Unknown ids are ignored."""
        if (work := self._work.get(request_id)) is not None:
            self._end(work)

    def step(self) -> list[FromWorker]:
        """Compute one step and return what it has to say. Only when not idle.

        A request whose own step raises, or whose results are not finite, fails alone. Raises what the step
        raised if steps keep failing.
        """
        self._arrive()
        if self.scheduler.idle:
            return []
        chunks = self.scheduler.plan(self._pace.limit)
        if not chunks:  # what has come from the disk holds the memory that others need
            for restore in list(self._arriving):
                restore.close()
                self._queue(restore)
            return []
        load, start = _load(chunks), time.perf_counter()
        self._steps += 1
        try:
            results = self._step(chunks, self.scheduler.moves)
        except WeightsError as error:
            log.error("a step of %d requests could not read its weights: %s", len(chunks), error)
            self._fault = str(error)
            if self._isolate(chunks):
                return []
            return [self._fail(chunks[0], f"the model's weights cannot be read: {error}")]
        except Exception as error:
            log.exception("a step of %d requests failed", len(chunks))
            return self._recover(chunks, error)
        self._failures = 0
        self._pace.note(load, time.perf_counter() - start)
        messages: list[FromWorker] = []
        rows = iter(results)
        for chunk in chunks:
            own = [next(rows) for _ in chunk.rows]
            work = self._work[chunk.request.request_id]
            self.scheduler.advance(chunk)
            if isinstance(work, Embedding):
                messages += self._pool(work, chunk, own)
                continue
            if chunk.request.scoring:
                messages += self._score(work, own[: len(own) - chunk.samples])
            if chunk.samples:
                messages += self._sample(work, own[-1])
        if self._disk is not None:
            self._disk.save(1 if load.decodes else _EXPORTS)  # what takes long is for when nobody waits
        return messages

    def stats(self) -> Stats:
        """What is held and has been done. Looks for leaks when idle."""
        scheduler = self.scheduler
        if self.idle:
            try:
                scheduler.check_idle()
            except RuntimeError:
                log.exception("something is held though nothing runs")
                self._leaks += 1
        return Stats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + sum(map(len, self._arriving.values())),
            blocks_used=scheduler.blocks_used,
            blocks_cached=scheduler.blocks_cached,
            steps=self._steps,
            preemptions=scheduler.preemptions,
            leaks=self._leaks,
            experts=total(self.expert_layers()),
            fault=self._fault,
        )

    def expert_layers(self) -> list[ExpertStats]:
        """Of each layer whose experts are streamed."""
        return [
            ExpertStats(
                hits=layer.hits,
                misses=layer.misses,
                ahead=layer.ahead,
                unused=layer.unused,
                bytes_read=layer.bytes_read,
                read_seconds=layer.read,
                wait_seconds=layer.wait,
                compute_seconds=layer.compute,
            )
            for layer in (self._streaming.expert_counts() if self._streaming is not None else ())
        ]

    def _arrive(self) -> None:
        """Take in what has come from the disk; queue the requests that have waited for it."""
        alone = self.scheduler.idle
        for restore in list(self._arriving):
            if restore.advance(_ARRIVAL_SECONDS if alone else _BESIDE_SECONDS, waiting=alone):
                self._queue(restore)
                alone = False

    def _queue(self, restore: Restore) -> None:
        for work in self._arriving.pop(restore):
            self.scheduler.add(work.request)

    def _pool(self, work: Embedding, chunk: Chunk, rows: Sequence[Row]) -> list[FromWorker]:
        """Take in the hidden states of a chunk; after the last, the embedding."""
        request = work.request
        if chunk.start == 0:  # for the first time, or again after it had to give up its memory
            work.pooling.restart()
        work.pooling.add(rows)
        if not chunk.samples:
            return []
        try:
            embedding = work.pooling.embedding()
        except NonFiniteStatesError as error:
            self._end(work, faulty=True)
            return [_failed(request, str(error))]
        self._end(work)
        usage = Usage(prompt_tokens=request.prompt_tokens, completion_tokens=0, cached_tokens=0)
        return [Finished(request_id=request.request_id, reason="stop", usage=usage, embedding=embedding)]

    def _score(self, generation: Generation, rows: Sequence[Row]) -> list[FromWorker]:
        """The log-probabilities of the prompt's next tokens, by the logits before each."""
        request, detokenizer = generation.request, generation.detokenizer
        assert request.scored is not None
        entries: list[TokenLogprobs] = []
        if request.scored == 0:
            entries.append(detokenizer.entry(request.tokens[0], 0.0))
            request.scored = 1
        for row in rows:
            token = request.tokens[request.scored]
            entries.append(detokenizer.entry(token, *generation.sampler.score(row, token)))
            request.scored += 1
        return [Delta(request_id=request.request_id, text="", token_count=0, logprobs=entries)]

    def _sample(self, generation: Generation, logits: Row) -> list[FromWorker]:
        try:
            return self._next_token(generation, logits)
        except NonFiniteLogitsError as error:
            message = str(error)
        except Exception as error:
            log.exception("a token could not be sampled")
            message = f"sampling failed: {type(error).__name__}: {error}"
        self._end(generation, faulty=True)
        return [_failed(generation.request, message)]

    def _next_token(self, generation: Generation, logits: Row) -> list[FromWorker]:
        request, detokenizer = generation.request, generation.detokenizer
        choice = generation.sampler.choose(logits)
        full = self.scheduler.append(request, choice.token)
        if choice.token in generation.eos_ids:
            return self._finish(generation, detokenizer.finish(), "stop")
        piece = detokenizer.feed(choice.token, choice.logprob, choice.top)
        if piece.stop is not None:
            return self._finish(generation, piece, "stop")
        if choice.last:
            return _deltas(request, piece) + self._finish(generation, detokenizer.finish(), "stop")
        if full:
            return _deltas(request, piece) + self._finish(generation, detokenizer.finish(), "length")
        return _deltas(request, piece)

    def _finish(self, generation: Generation, last: Piece, reason: FinishReason) -> list[FromWorker]:
        request = generation.request
        self._end(generation)
        usage = Usage(
            prompt_tokens=request.prompt_tokens,
            completion_tokens=request.output_tokens,
            cached_tokens=request.cached_tokens,
        )
        if last.stop is not None:  # even the end of the output may complete a stop string
            reason = "stop"
        finished = Finished(request_id=request.request_id, reason=reason, usage=usage, stop=last.stop)
        return [*_deltas(request, last), finished]

    def _recover(self, chunks: list[Chunk], error: Exception) -> list[FromWorker]:
        """After a step that raised."""
        if self._isolate(chunks):
            return []
        self._failures += 1
        if self._failures >= _FAILURES_IN_A_ROW:
            raise error
        return [self._fail(chunks[0], f"the model failed on this request: {type(error).__name__}: {error}")]

    def _isolate(self, chunks: list[Chunk]) -> bool:
        """Find the requests at fault by running each alone, from its start; false if there is one only."""
        if len(chunks) > 1:
            self.scheduler.isolate(chunks)
        return len(chunks) > 1

    def _fail(self, chunk: Chunk, message: str) -> Failed:
        self._end(self._work[chunk.request.request_id], faulty=True)
        return _failed(chunk.request, message)

    def _end(self, work: Work, *, faulty: bool = False) -> None:
        request = work.request
        if not self._forget_arrival(work):
            self.scheduler.finish(request, faulty=faulty)
        del self._work[request.request_id]
        self.admission.end(work)

    def _forget_arrival(self, work: Work) -> bool:
        """End the wait of a request that the scheduler does not know yet; false if it does."""
        for restore, waiting in self._arriving.items():
            if work in waiting:
                waiting.remove(work)
                if not waiting:
                    del self._arriving[restore]
                    restore.close()
                return True
        return False


def total(layers: Sequence[ExpertStats]) -> ExpertStats:
    """The sums of all fields."""
    fields = msgspec.structs.fields(ExpertStats)
    return ExpertStats(**{each.name: sum(getattr(layer, each.name) for layer in layers) for each in fields})


def _load(chunks: Sequence[Chunk]) -> Load:
    prefills = [chunk for chunk in chunks if not chunk.decodes]
    prefill = sum(chunk.count for chunk in prefills)
    attended = sum(chunk.count * (2 * chunk.start + chunk.count) // 2 for chunk in prefills)
    return Load(len(chunks) - len(prefills), prefill, attended)


def _deltas(request: Request, piece: Piece) -> list[FromWorker]:
    if not piece.text and not piece.logprobs:
        return []
    return [
        Delta(request_id=request.request_id, text=piece.text, token_count=piece.token_count, logprobs=piece.logprobs)
    ]


def _failed(request: Request, message: str) -> Failed:
    return Failed(request_id=request.request_id, code="internal_error", message=message)
