"""Answers of both completion endpoints, whole or streamed. An endpoint says how a choice looks: `Format`."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from mixbit.engine.client import Engine, EngineState, RequestError
from mixbit.engine.protocol import Delta, Finished, FinishReason, TokenLogprobs
from mixbit.server.errors import ApiError
from mixbit.server.generation import Batch, api_error
from mixbit.server.schema.common import SamplingFields
from mixbit.server.settings import HTTP
from mixbit.server.sse import DONE, Disconnected, EventStream, error_events, event, while_connected
from mixbit.server.version import VERSION

Json = dict[str, Any]


async def begun(
    engine: Engine,
    begin: Callable[[], Coroutine[Any, Any, Response]],
    *,
    stream: bool | None,
    broken: Callable[[ApiError], bytes] = error_events,
) -> Response:
    """The answer of `begin`. Where a stream's model has to be loaded first, the stream begins at once and is kept
    alive; a refusal is then an event, as `broken` makes it."""
    if not stream or engine.state is EngineState.READY:
        return await begin()

    async def events() -> AsyncGenerator[bytes, None]:
        try:
            answer = await begin()
        except ApiError as error:
            yield broken(error)
            return
        assert isinstance(answer, EventStream)
        async with aclosing(answer.events):
            async for data in answer.events:
                yield data

    return EventStream(events(), HTTP.keepalive_seconds, broken)


async def whole_answer(request: Request, work: Coroutine[Any, Any, Json], prompt_param: str) -> Response:
    """The JSON that `work` makes; it is cancelled if the client hangs up. Raises ApiError for a RequestError."""
    try:
        result = await while_connected(request.receive, work)
    except Disconnected:
        return Response(status_code=499)  # nobody reads it
    except RequestError as error:
        raise api_error(error, prompt_param) from None
    return Response(msgspec.json.encode(result), media_type="application/json")


class Format(Protocol):
    """How choices look."""

    @property
    def object(self) -> str:
        """`object` of a whole answer."""

    @property
    def chunk_object(self) -> str:
        """`object` of an event."""

    @property
    def prompt_param(self) -> str:
        """What the request calls its prompt."""

    def whole(self, index: int, text: str, logprobs: Sequence[TokenLogprobs], reason: FinishReason) -> Json:
        """A complete choice."""

    def first(self, index: int) -> Json | None:
        """What a streamed choice begins with."""

    def piece(self, index: int, delta: Delta) -> list[Json]:
        """Parts of a streamed choice; none while it cannot be known yet what the text is."""

    def last(self, index: int, reason: FinishReason) -> list[Json]:
        """What a streamed choice ends with."""


@dataclass(frozen=True)
class Answer:
    """One request under way: started, its prompts within the limits."""

    id: str
    model: str
    batch: Batch
    format: Format
    body: SamplingFields

    async def response(self, request: Request) -> Response:
        """The HTTP answer, as the request asked for it."""
        if self.body.stream:
            return EventStream(self._stream(), HTTP.keepalive_seconds)
        return await whole_answer(request, self._collect(), self.format.prompt_param)

    def _head(self, kind: str) -> Json:
        return {
            "id": self.id,
            "object": kind,
            "created": int(time.time()),
            "model": self.model,
            "system_fingerprint": f"mixbit-{VERSION}",
        }

    async def _collect(self) -> Json:
        head = self._head(self.format.object)
        count = len(self.batch.completions)
        texts: list[list[str]] = [[] for _ in range(count)]
        logprobs: list[list[TokenLogprobs]] = [[] for _ in range(count)]
        finished: dict[int, Finished] = {}
        async with aclosing(self.batch.events()) as events:
            async for index, item in events:
                if isinstance(item, Finished):
                    finished[index] = item
                else:
                    texts[index].append(item.text)
                    logprobs[index].extend(item.logprobs)
        choices = [
            self.format.whole(index, "".join(texts[index]), logprobs[index], finished[index].reason)
            for index in range(count)
        ]
        return {**head, "choices": choices, "usage": self.batch.usage(finished).model_dump()}

    async def _stream(self) -> AsyncGenerator[bytes, None]:
        head = self._head(self.format.chunk_object)
        options = self.body.stream_options
        with_usage = options is not None and bool(options.include_usage)
        tail = {"usage": None} if with_usage else {}

        def chunk(choice: Json) -> bytes:
            return event({**head, "choices": [choice], **tail})

        finished: dict[int, Finished] = {}
        try:
            async with aclosing(self.batch.events()) as events:
                for index in range(len(self.batch.completions)):
                    if (first := self.format.first(index)) is not None:
                        yield chunk(first)
                async for index, item in events:
                    if isinstance(item, Finished):
                        finished[index] = item
                        parts = self.format.last(index, item.reason)
                    else:
                        parts = self.format.piece(index, item) if item.text or item.logprobs else []
                    for part in parts:
                        yield chunk(part)
        except RequestError as error:
            yield error_events(api_error(error, self.format.prompt_param))
            return
        except ApiError as error:
            yield error_events(error)
            return
        if with_usage:
            yield event({**head, "choices": [], "usage": self.batch.usage(finished).model_dump()})
        yield DONE
