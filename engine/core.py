"""The engine without its process: requests in, steps, messages out. One thread, that of the device, drives it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from mixbit.engine.admission import Admission, Generation
from mixbit.engine.detokenizer import Piece
from mixbit.engine.disk_restore import Restore
from mixbit.engine.disk_tier import DiskTier
from mixbit.engine.pace import Pace
from mixbit.engine.protocol import Delta, Failed, Finished, FinishReason, FromWorker, Stats, TokenLogprobs, Usage
from mixbit.engine.request import Chunk, Move, Request
from mixbit.engine.sampling import NonFiniteLogitsError
from mixbit.engine.scheduler import Scheduler

log = logging.getLogger("mixbit.engine")

Step = Callable[[Sequence[Chunk], list[Move]], npt.NDArray[np.float32]]

# A step of one request that raises is that request's fault. So many in a row, with no step between them
# that worked, is the device's: the worker gives up, and a new one may do better.
_FAILURES_IN_A_ROW = 3
_EXPORTS = 4  # entries handed to the disk between two steps
_DISK_SECONDS = 0.02  # until the thread that writes may have room again
_ARRIVAL_SECONDS = 0.02  # for what comes from the disk, while nothing runs
_BESIDE_SECONDS = 0.002  # and between steps of what does


class EngineCore:
    """Scheduler, model, samplers and detokenizers of all requests.

    step: makes the moves, computes chunks and returns logits [rows, vocab], for each chunk in order those of its
    `rows`.
    """

    def __init__(
        self,
        step: Step,
        scheduler: Scheduler,
        admission: Admission,
        disk: DiskTier | None = None,
        pace: Pace | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.admission = admission
        self._step = step
        self._disk = disk
        self._pace = pace or Pace(scheduler.step_tokens)
        self._generations: dict[str, Generation] = {}
        self._arriving: dict[Restore, list[Generation]] = {}  # wait for their prefixes from the disk
        self._failures = 0
        self._steps = 0
        self._leaks = 0

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return self.scheduler.idle and not self._arriving

    def add(self, generation: Generation) -> None:
        """Queue an admitted request, once what the disk has of its prompt is in memory."""
        self._generations[generation.request.request_id] = generation
        if self._disk is not None and (restore := self._disk.restore(generation.request.tokens)) is not None:
            self._arriving.setdefault(restore, []).append(generation)
        else:
            self.scheduler.add(generation.request)

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
        if (generation := self._generations.get(request_id)) is not None:
            self._end(generation)

    def step(self) -> list[FromWorker]:
        """Compute one step and return what it has to say. Only when not idle.

        A request whose own step raises, or whose logits are not finite, fails alone. Raises what the step
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
        start = time.perf_counter()
        self._steps += 1
        try:
            logits = self._step(chunks, self.scheduler.moves)
        except Exception as error:
            log.exception("a step of %d requests failed", len(chunks))
            return self._recover(chunks, error)
        self._failures = 0
        decodes = sum(chunk.count == 1 and chunk.samples for chunk in chunks)
        self._pace.note(decodes, sum(chunk.count for chunk in chunks) - decodes, time.perf_counter() - start)
        messages: list[FromWorker] = []
        rows = iter(logits)
        for chunk in chunks:
            samples, wanted = chunk.samples, chunk.rows
            generation = self._generations[chunk.request.request_id]
            self.scheduler.advance(chunk)
            if chunk.request.scoring:
                messages += self._score(generation, [next(rows) for _ in wanted[: len(wanted) - samples]])
            if samples:
                messages += self._sample(generation, next(rows))
        if self._disk is not None:
            self._disk.save(1 if decodes else _EXPORTS)  # what takes long is for when nobody waits
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
        )

    def _arrive(self) -> None:
        """Take in what has come from the disk; queue the requests that have waited for it."""
        alone = self.scheduler.idle
        for restore in list(self._arriving):
            if restore.advance(_ARRIVAL_SECONDS if alone else _BESIDE_SECONDS, waiting=alone):
                self._queue(restore)
                alone = False

    def _queue(self, restore: Restore) -> None:
        for generation in self._arriving.pop(restore):
            self.scheduler.add(generation.request)

    def _score(self, generation: Generation, rows: Sequence[npt.NDArray[np.float32]]) -> list[FromWorker]:
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

    def _sample(self, generation: Generation, logits: npt.NDArray[np.float32]) -> list[FromWorker]:
        try:
            return self._next_token(generation, logits)
        except NonFiniteLogitsError as error:
            message = str(error)
        except Exception as error:
            log.exception("a token could not be sampled")
            message = f"sampling failed: {type(error).__name__}: {error}"
        self._end(generation, faulty=True)
        return [_failed(generation.request, message)]

    def _next_token(self, generation: Generation, logits: npt.NDArray[np.float32]) -> list[FromWorker]:
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
        """After a step that raised: find the request at fault by running each alone, from its start."""
        if len(chunks) > 1:
            self.scheduler.isolate(chunks)
            return []
        self._failures += 1
        if self._failures >= _FAILURES_IN_A_ROW:
            raise error
        request = chunks[0].request
        self._end(self._generations[request.request_id], faulty=True)
        return [_failed(request, f"the model failed on this request: {type(error).__name__}: {error}")]

    def _end(self, generation: Generation, *, faulty: bool = False) -> None:
        request = generation.request
        if not self._forget_arrival(generation):
            self.scheduler.finish(request, faulty=faulty)
        del self._generations[request.request_id]
        self.admission.end(generation)

    def _forget_arrival(self, generation: Generation) -> bool:
        """End the wait of a request that the scheduler does not know yet; false if it does."""
        for restore, waiting in self._arriving.items():
            if generation in waiting:
                waiting.remove(generation)
                if not waiting:
                    del self._arriving[restore]
                    restore.close()
                return True
        return False


def _deltas(request: Request, piece: Piece) -> list[FromWorker]:
    if not piece.text and not piece.logprobs:
        return []
    return [
        Delta(request_id=request.request_id, text=piece.text, token_count=piece.token_count, logprobs=piece.logprobs)
    ]


def _failed(request: Request, message: str) -> Failed:
    return Failed(request_id=request.request_id, code="internal_error", message=message)
