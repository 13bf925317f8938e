"""Between a route and the engine: sampling values, the choices of one request, and their errors."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from mixbit.engine.client import Completion, Engine, EngineState, RequestError
from mixbit.engine.protocol import Delta, Finished, Generate, Sampling
from mixbit.server.errors import ApiError
from mixbit.server.observe import Record, current_record
from mixbit.server.presets import SamplingDefaults
from mixbit.server.schema.common import CompletionUsage, PromptTokensDetails, SamplingFields

_STATUS = {
    "context_length_exceeded": 400,
    "invalid_value": 400,
    "queue_full": 429,
    "insufficient_memory": 503,
    "worker_died": 503,
    "not_ready": 503,
    "timeout": 504,
}
_RETRY = {"queue_full": "1", "insufficient_memory": "5", "worker_died": "2", "not_ready": "2"}


def api_error(error: RequestError, prompt_param: str) -> ApiError:
    """What the client is told. The engine says `prompt`; the request may call it `messages`."""
    param = prompt_param if error.param == "prompt" or error.code == "context_length_exceeded" else error.param
    headers = {"retry-after": _RETRY[error.code]} if error.code in _RETRY else None
    return ApiError(_STATUS.get(error.code, 500), error.message, param=param, code=error.code, headers=headers)


def require_ready(engine: Engine) -> None:
    """Raise a 503 with Retry-After unless the engine takes requests."""
    loading = engine.state in {EngineState.STARTING, EngineState.LOADING}
    if engine.state is EngineState.READY or (engine.on_demand and (loading or engine.state is EngineState.UNLOADED)):
        return
    text = "The model is being loaded." if loading else engine.message or f"The engine is {engine.state}."
    code = "model_loading" if loading else f"engine_{engine.state}"
    raise ApiError(503, text, code=code, headers={"retry-after": "2"})


def resolve_sampling(body: SamplingFields, defaults: SamplingDefaults) -> Sampling:
    """The request's values, else the model's defaults, else neutral ones."""

    def pick(asked: float | None, default: float | None, neutral: float) -> float:
        return next(value for value in (asked, default, neutral) if value is not None)

    top_k = body.top_k if body.top_k is not None else defaults.top_k
    return Sampling(
        temperature=pick(body.temperature, defaults.temperature, 1.0),
        top_p=pick(body.top_p, defaults.top_p, 1.0),
        top_k=max(top_k or 0, 0),
        min_p=pick(body.min_p, defaults.min_p, 0.0),
        repetition_penalty=pick(body.repetition_penalty, defaults.repetition_penalty, 1.0),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias={int(token): bias for token, bias in (body.logit_bias or {}).items()},
    )


def stop_strings(body: SamplingFields) -> list[str]:
    """`stop` as a list without repeats."""
    stop = body.stop
    return list(dict.fromkeys([stop] if isinstance(stop, str) else stop or []))


def choice_seed(seed: int | None, choice: int) -> int | None:
    """A seed for one of n choices: the request's own for the first, others drawn from it. 63 bits."""
    if seed is None or choice == 0:
        return None if seed is None else seed & (2**63 - 1)
    digest = hashlib.blake2b(f"{seed}:{choice}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & (2**63 - 1)


@dataclass(frozen=True)
class Batch:
    """The running choices of one request, `per_prompt` for each prompt in order."""

    completions: Sequence[Completion]
    per_prompt: int
    record: Record = field(default_factory=Record)

    @classmethod
    async def start(cls, engine: Engine, requests: Iterable[Generate], per_prompt: int) -> Batch:
        """Submit all; wait until each is accepted. Raises RequestRefused and then leaves none running."""
        requests, record = list(requests), current_record()
        record.begin(re.sub(r"-\d{1,4}$", "", requests[0].request_id))  # without the number of the choice
        tasks = [asyncio.ensure_future(engine.generate(request)) for request in requests]
        try:
            completions = await asyncio.gather(*tasks)
            record.accepted([each.prompt_tokens for each in completions[::per_prompt]], per_prompt)
            return cls(completions, per_prompt, record)
        except BaseException as error:
            if isinstance(error, RequestError):
                record.end("timeout" if error.code == "timeout" else "refused")
            for task in tasks:
                task.cancel()
            for done in await asyncio.gather(*tasks, return_exceptions=True):
                if not isinstance(done, BaseException):
                    await done.aclose()
            raise

    async def events(self) -> AsyncGenerator[tuple[int, Delta | Finished], None]:
        """(choice, event) as they come, to the end of all. Raises RequestFailed of the first that fails.
        Closing it aborts what still runs."""
        record = self.record
        try:
            async with aclosing(self._one() if len(self.completions) == 1 else self._merged()) as events:
                async for choice, event in events:
                    record.note(choice, event)
                    yield choice, event
            record.end("completed")
        except RequestError as error:
            record.end("timeout" if error.code == "timeout" else "failed")
            raise
        except Exception:
            record.end("failed")
            raise
        finally:
            await self.aclose()

    async def _one(self) -> AsyncGenerator[tuple[int, Delta | Finished], None]:
        async for event in self.completions[0]:
            yield 0, event

    async def _merged(self) -> AsyncGenerator[tuple[int, Delta | Finished], None]:
        # Of one place, so that a slow reader is felt by the completions, which join what waits.
        queue: asyncio.Queue[tuple[int, Delta | Finished] | BaseException | None] = asyncio.Queue(maxsize=1)

        async def pump(index: int, completion: Completion) -> None:
            try:
                async for event in completion:
                    await queue.put((index, event))
                await queue.put(None)
            except Exception as error:
                await queue.put(error)

        tasks = [asyncio.ensure_future(pump(*pair)) for pair in enumerate(self.completions)]
        try:
            running = len(tasks)
            while running:
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    running -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def aclose(self) -> None:
        """Abort what still runs."""
        for completion in self.completions:
            await completion.aclose()

    def usage(self, finished: dict[int, Finished]) -> CompletionUsage:
        """Each prompt once, all completions."""
        firsts = [finished[index].usage for index in range(0, len(self.completions), self.per_prompt)]
        prompt = sum(each.prompt_tokens for each in firsts)
        completion = sum(each.usage.completion_tokens for each in finished.values())
        return CompletionUsage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(each.cached_tokens for each in firsts)),
        )
