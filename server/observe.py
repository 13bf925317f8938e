"""What each request came to: measured on its way, counted and logged when it has ended. Never what was said."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal, Protocol
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mixbit.engine.protocol import Delta, Finished, Usage

log = logging.getLogger("mixbit.server")

_POLLED = ("/metrics", "/health")  # asked for every second or so, by machines and by the page

Outcome = Literal["completed", "cancelled", "failed", "timeout", "refused"]


class Meter(Protocol):
    """Where measurements go."""

    def first_token(self, seconds: float) -> None:
        """Time from the request to its first token."""

    def next_tokens(self, seconds: float, count: int) -> None:
        """Time between one delta of a choice and the next, which has `count` tokens."""

    def generated(self, count: int) -> None:
        """Tokens that have arrived; `request` tells of those that came with no delta."""

    def response(self, route: str, status: int) -> None:
        """An answer to any request."""

    def request(self, record: Record) -> None:
        """A request for text that has ended."""


class _NoMeter:
    def first_token(self, seconds: float) -> None: ...

    def next_tokens(self, seconds: float, count: int) -> None: ...

    def generated(self, count: int) -> None: ...

    def response(self, route: str, status: int) -> None: ...

    def request(self, record: Record) -> None: ...


@dataclass
class Record:
    """One HTTP request. Times in seconds since `started`, tokens as in the answer's usage.

    Of choices that did not finish, the tokens that have arrived count.
    """

    meter: Meter = field(default_factory=_NoMeter)
    started: float = field(default_factory=time.perf_counter)
    id: str | None = None  # of a request for text, once it has reached the engine
    outcome: Outcome | None = None
    first: float | None = None
    last: float = 0.0
    _prompts: Sequence[int] = ()  # tokens of each prompt
    _per_prompt: int = 1
    _usages: dict[int, Usage] = field(default_factory=dict)  # of finished choices
    _counts: dict[int, int] = field(default_factory=dict)  # tokens of choices so far
    _times: dict[int, float] = field(default_factory=dict)  # when each choice was last heard of

    def begin(self, request_id: str, outcome: Outcome | None = None) -> None:
        """A request for text goes to the engine."""
        self.id, self.outcome = request_id, outcome

    def accepted(self, prompts: Sequence[int], per_prompt: int) -> None:
        """The engine has taken prompts of so many tokens, with `per_prompt` choices each."""
        self._prompts, self._per_prompt = prompts, per_prompt

    def note(self, choice: int, event: Delta | Finished) -> None:
        """Something has arrived."""
        if isinstance(event, Finished):
            self._usages[choice] = event.usage
            return
        now = time.perf_counter() - self.started
        if self.first is None:
            self.first = now
            self.meter.first_token(now)
        if (before := self._times.get(choice)) is not None and event.token_count:
            self.meter.next_tokens(now - before, event.token_count)
        self._times[choice] = self.last = now
        self._counts[choice] = self._counts.get(choice, 0) + event.token_count
        self.meter.generated(event.token_count)

    def end(self, outcome: Outcome) -> None:
        """How it ended; the first call counts."""
        self.outcome = self.outcome or outcome

    @property
    def prompt_tokens(self) -> int:
        """Each prompt once."""
        return sum(self._prompts)

    @property
    def cached_tokens(self) -> int:
        """Of the prompts, as far as their first choices finished."""
        return sum(usage.cached_tokens for choice, usage in self._usages.items() if choice % self._per_prompt == 0)

    @property
    def completion_tokens(self) -> int:
        """Of all choices."""
        finished = {choice: usage.completion_tokens for choice, usage in self._usages.items()}
        return sum({**self._counts, **finished}.values())

    @property
    def silent_tokens(self) -> int:
        """Of the completion: those that no delta brought, such as the last of a text."""
        return self.completion_tokens - sum(self._counts.values())

    @property
    def rate(self) -> float | None:
        """Tokens per second after the first, of all choices together."""
        if self.first is None or self.last <= self.first:
            return None
        return (self.completion_tokens - 1) / (self.last - self.first)


_current: ContextVar[Record] = ContextVar("record")


def current_record() -> Record:
    """The record of the request that is being answered, or one that nobody reads."""
    return _current.get(None) or Record()


class Observer:
    """The outermost layer of the application."""

    def __init__(self, app: ASGIApp, meter: Meter) -> None:
        self._app, self._meter = app, meter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; count it and log one line when it has ended."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record, status = Record(self._meter), 500

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        token = _current.set(record)
        try:
            await self._app(scope, receive, watch)
        finally:
            _current.reset(token)
            route = getattr(scope.get("route"), "path", None)
            self._meter.response(route or "none", status)
            if record.id is not None:
                record.end("failed" if status >= 500 else "cancelled")
                self._meter.request(record)
            level = logging.DEBUG if route in _POLLED and status < 400 else logging.INFO
            if log.isEnabledFor(level):
                _log(level, record, scope["method"], quote(scope["path"])[:200], status)


def _log(level: int, record: Record, method: str, path: str, status: int) -> None:
    seconds = time.perf_counter() - record.started
    fields: dict[str, object] = {"method": method, "path": path, "status": status, "seconds": round(seconds, 3)}
    line = f"{method} {path} {status} {seconds:.3f}s"
    if record.id is not None:
        rate = None if record.rate is None else round(record.rate, 1)
        fields |= {
            "id": record.id,
            "outcome": record.outcome,
            "prompt_tokens": record.prompt_tokens,
            "cached_tokens": record.cached_tokens,
            "completion_tokens": record.completion_tokens,
            "ttft": None if record.first is None else round(record.first, 3),
            "tokens_per_second": rate,
        }
        line += (
            f" {record.id} {record.outcome}, tokens: prompt {record.prompt_tokens}, cached {record.cached_tokens}, "
            f"output {record.completion_tokens}"
        )
        line += "" if record.first is None else f", first after {record.first:.3f}s"
        line += "" if rate is None else f", {rate} tok/s"
    log.log(level, "%s", line, extra={"fields": fields})
