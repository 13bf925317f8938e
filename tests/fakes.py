"""Fakes at the seams. `FakeEngine` stands where `EngineClient` does, and follows a script."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from mixbit.engine.client import Completion, EngineFailed, EngineState, RequestFailed, RequestRefused
from mixbit.engine.protocol import (
    Delta,
    Embed,
    ErrorCode,
    Finished,
    FinishReason,
    Generate,
    ModelDescription,
    Progress,
    Ready,
    Stats,
    TokenLogprobs,
    Usage,
)


@dataclass(frozen=True)
class Reply:
    """What the fake answers to one request.

    pieces: the texts of the deltas, one token each. embedding: what an Embed gets instead. delay: seconds before each.
    refuse: raised before anything streams. fail: raised after the pieces instead of finishing. hang: never ends after
    the pieces.
    """

    pieces: Sequence[str] = ("Hello", " world")
    reason: FinishReason = "stop"
    stop: str | None = None
    logprobs: Sequence[TokenLogprobs | Sequence[TokenLogprobs]] | None = None  # one, or some, for each piece
    delay: float = 0.0
    refuse: RequestRefused | None = None
    fail: RequestFailed | None = None
    hang: bool = False
    prompt_tokens: int | None = None  # None: as `tokenize` counts them
    cached_tokens: int = 0
    embedding: Sequence[float] = (0.6, 0.0, 0.8)


def refusal(code: ErrorCode, message: str = "refused", param: str | None = None) -> Reply:
    """A reply that refuses the request."""
    return Reply(refuse=RequestRefused(code, message, param))


def failure(code: ErrorCode, message: str = "failed", pieces: Sequence[str] = ("Hel",)) -> Reply:
    """A reply that breaks off after some text."""
    return Reply(pieces=pieces, fail=RequestFailed(code, message))


FAKE_READY = Ready(
    model=ModelDescription(model_type="fake", layers={}, experts=None, classes=()),
    context_length=4096,
    vocab_size=0x110000,
    backend="fake",
    backend_reason="using fake: a script",
    memory_reason="weights stay in the script",
    weight_bytes=1000,
    cache_bytes=1000,
    expert_bytes=0,
    block_bytes=10,
    load_seconds=0.1,
    embedding_size=3,
)


class FakeCompletion:
    """A completion that plays its reply."""

    def __init__(self, engine: FakeEngine, request: Generate | Embed, reply: Reply, prompt_tokens: int) -> None:
        self._engine, self._request, self._reply = engine, request, reply
        self.request_id = request.request_id
        self.prompt_tokens = prompt_tokens
        self._ended = False
        self._events = self._play()

    def __aiter__(self) -> AsyncIterator[Delta | Finished]:
        return self._events

    async def _play(self) -> AsyncIterator[Delta | Finished]:
        if isinstance(self._request, Embed):
            yield await self._embed()
            return
        reply, limit = self._reply, self._request.max_tokens
        pieces = list(reply.pieces if limit is None else reply.pieces[:limit])
        reason: FinishReason = reply.reason if len(pieces) == len(reply.pieces) else "length"
        for number, piece in enumerate(pieces):
            await asyncio.sleep(reply.delay)
            if self._engine.state is not EngineState.READY:
                self._end()
                raise RequestFailed("worker_died", "the engine worker died")
            told = reply.logprobs[number] if reply.logprobs and self._request.logprobs is not None else ()
            logprobs = [told] if isinstance(told, TokenLogprobs) else list(told)
            yield Delta(request_id=self.request_id, text=piece, token_count=1, logprobs=logprobs)
        if reply.hang:
            await asyncio.Event().wait()
        self._end()
        if reply.fail is not None:
            raise reply.fail
        usage = Usage(
            prompt_tokens=self.prompt_tokens, completion_tokens=len(pieces), cached_tokens=reply.cached_tokens
        )
        yield Finished(request_id=self.request_id, reason=reason, usage=usage, stop=reply.stop)

    async def _embed(self) -> Finished:
        reply = self._reply
        await asyncio.sleep(reply.delay)
        if reply.hang:
            await asyncio.Event().wait()
        self._end()
        if reply.fail is not None:
            raise reply.fail
        usage = Usage(prompt_tokens=self.prompt_tokens, completion_tokens=0, cached_tokens=0)
        values = struct.pack(f"<{len(reply.embedding)}f", *reply.embedding)
        return Finished(request_id=self.request_id, reason="stop", usage=usage, embedding=values)

    def _end(self) -> None:
        self._ended = True
        self._engine.running.pop(self.request_id, None)

    async def __aenter__(self) -> Completion:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        if not self._ended:
            self._end()
            self._engine.aborted.append(self.request_id)


@dataclass
class FakeEngine:
    """An `Engine` that answers from a script; set its fields as the test needs.

    reply: a Reply for every request, or a function of the request; embedded: for every Embed. Tokens are code points.
    `requests`, `embeds`, `running` and `aborted` record what happened.
    """

    reply: Reply | Callable[[Generate], Reply] = field(default_factory=Reply)
    embedded: Reply | Callable[[Embed], Reply] = field(default_factory=Reply)
    state: EngineState = EngineState.READY
    ready: Ready | None = FAKE_READY
    on_demand: bool = False
    progress: Progress | None = None
    stats: Stats | None = None
    restarts: int = 0
    message: str | None = None
    requests: list[Generate] = field(default_factory=list)
    embeds: list[Embed] = field(default_factory=list)
    running: dict[str, FakeCompletion] = field(default_factory=dict)
    aborted: list[str] = field(default_factory=list)

    async def start(self) -> None:
        pass

    async def wait_ready(self) -> Ready:
        if self.ready is None or self.state is not EngineState.READY:
            raise EngineFailed(self.message or "the engine is not ready")
        return self.ready

    async def generate(self, request: Generate | Embed) -> Completion:
        self._require_ready()
        if isinstance(request, Embed):
            self.embeds.append(request)
            reply = self.embedded(request) if callable(self.embedded) else self.embedded
        else:
            self.requests.append(request)
            reply = self.reply(request) if callable(self.reply) else self.reply
        if reply.refuse is not None:
            raise reply.refuse
        count = reply.prompt_tokens if reply.prompt_tokens is not None else len(request.prompt)
        completion = FakeCompletion(self, request, reply, count)
        self.running[request.request_id] = completion
        return completion

    async def tokenize(self, text: str, *, add_special_tokens: bool) -> list[int]:
        self._require_ready()
        return [ord(character) for character in text]

    async def detokenize(self, tokens: list[int]) -> str:
        self._require_ready()
        if any(not 0 <= token < 0x110000 for token in tokens):
            raise RequestRefused("invalid_value", "a token is out of range", "tokens")
        return "".join(map(chr, tokens))

    async def pieces(self, tokens: list[int]) -> list[bytes]:
        await self.detokenize(tokens)
        return [chr(token).encode() for token in tokens]

    async def close(self) -> None:
        self.state = EngineState.CLOSED

    def _require_ready(self) -> None:
        if self.state is not EngineState.READY:
            raise RequestRefused("not_ready", self.message or f"the engine is {self.state}")
