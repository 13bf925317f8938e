"""A chat answer under way, for the endpoints that are not OpenAI's chat completions.

They translate their request into one of /v1/chat/completions, whose rules then hold, and the events of its answer
into their own. An answer consists of parts: thinking, text and tool calls, one after another.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import ValidationError

from mixbit.engine.client import RequestRefused
from mixbit.engine.protocol import Finished
from mixbit.server.errors import ApiError, invalid
from mixbit.server.generation import Batch, api_error, require_ready
from mixbit.server.output import output_parser
from mixbit.server.parsing.events import (
    ArgumentsDelta,
    Event,
    ReasoningDelta,
    TextDelta,
    ToolCallEnd,
    ToolCallStart,
)
from mixbit.server.parsing.machine import OutputParser
from mixbit.server.routes.chat import plan, refuse_unsupported
from mixbit.server.schema.chat import CreateChatCompletionRequest
from mixbit.server.service import Service


@dataclass(frozen=True)
class Dialogue:
    """One running answer; its prompt is within the limits."""

    batch: Batch
    parser: OutputParser

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return self.batch.completions[0].prompt_tokens

    async def events(self) -> AsyncGenerator[Event | Finished, None]:
        """What is written, and Finished. Raises RequestFailed. Closing it aborts the request."""
        async with aclosing(self.batch.events()) as events:
            async for _, item in events:
                for each in self.parser.finish() if isinstance(item, Finished) else self.parser.feed(item.text):
                    yield each
                if isinstance(item, Finished):
                    yield item

    async def whole(self) -> tuple[Parts, Finished]:
        """All that is written. Raises RequestFailed."""
        parts = Parts()
        async with aclosing(self.events()) as events:
            async for item in events:
                if isinstance(item, Finished):
                    return parts, item
                parts.feed(item)
        raise AssertionError("an answer ends with Finished, or with RequestFailed")


def chat_request(fields: dict[str, Any]) -> CreateChatCompletionRequest:
    """A chat request of what another endpoint was sent. Raises a 400 if it breaks the chat endpoint's bounds."""
    try:
        return CreateChatCompletionRequest.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))[:200]
        raise invalid(f"The request cannot be honoured: {place}: {first['msg']}.", None) from None


async def start(body: CreateChatCompletionRequest, service: Service, prompt_param: str) -> Dialogue:
    """Begin an answer. Raises ApiError."""
    refuse_unsupported(body)
    require_ready(service.engine)
    generate = await plan(body, service)
    try:
        batch = await Batch.start(service.engine, [generate], per_prompt=1)
    except RequestRefused as error:
        raise api_error(error, prompt_param) from None
    return Dialogue(batch, output_parser(body, service.model, str(generate.prompt)))


async def count_tokens(body: CreateChatCompletionRequest, service: Service, prompt_param: str) -> int:
    """Tokens of the prompt that `start` would begin from. Raises ApiError."""
    refuse_unsupported(body)
    require_ready(service.engine)
    prompt = (await plan(body, service)).prompt
    if not isinstance(prompt, str):
        return len(prompt)
    try:
        return len(await service.engine.tokenize(prompt, add_special_tokens=False))
    except RequestRefused as error:
        raise api_error(error, prompt_param) from None


# --- parts ---


@dataclass
class Part:
    """A stretch of one kind. text: so far; the JSON of the arguments in a call."""

    index: int
    kind: Literal["thinking", "text", "tool"]
    call: ToolCallStart | None = None
    text: str = ""
    complete: bool = True  # false: a call that broke off


@dataclass(frozen=True)
class Step:
    """What happened to a part: "open", "grow" by `delta`, or "close"."""

    what: Literal["open", "grow", "close"]
    part: Part
    delta: str = ""


@dataclass
class Parts:
    """Puts events together. Feed it all of them, then `end` it."""

    parts: list[Part] = field(default_factory=list)
    _open: Part | None = None

    @property
    def calls(self) -> bool:
        """Whether a tool is called."""
        return any(part.kind == "tool" and part.complete for part in self.parts)

    def feed(self, event: Event) -> list[Step]:
        """The steps that an event makes."""
        match event:
            case ReasoningDelta(text):
                return self._grow("thinking", text)
            case TextDelta(text):
                return self._grow("text", text)
            case ToolCallStart():
                return [*self.end(), *self._begin(Part(len(self.parts), "tool", event))]
            case ArgumentsDelta(_, text):
                return self._grow("tool", text)
            case ToolCallEnd(_, complete):
                if self._open is not None:
                    self._open.complete = complete
                return self.end()

    def end(self) -> list[Step]:
        """Close what is open."""
        part, self._open = self._open, None
        return [] if part is None else [Step("close", part)]

    def _begin(self, part: Part) -> list[Step]:
        self.parts.append(part)
        self._open = part
        return [Step("open", part)]

    def _grow(self, kind: Literal["thinking", "text", "tool"], text: str) -> list[Step]:
        if not text:
            return []
        steps: list[Step] = []
        if self._open is None or self._open.kind != kind:
            steps = [*self.end(), *self._begin(Part(len(self.parts), kind))]
        assert self._open is not None
        self._open.text += text
        return [*steps, Step("grow", self._open, text)]


def overflow(error: ApiError) -> bool:
    """Whether the prompt is too long."""
    return error.code == "context_length_exceeded"
