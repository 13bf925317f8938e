"""`POST /v1/chat/completions`."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
from fastapi import APIRouter, Request, Response

from mixbit.engine.client import RequestRefused
from mixbit.engine.protocol import Delta, FinishReason, Generate, TokenLogprobs
from mixbit.server.answer import Answer, Json, begun
from mixbit.server.conversation import render_prompt
from mixbit.server.errors import invalid
from mixbit.server.generation import Batch, api_error, choice_seed, require_ready, resolve_sampling, stop_strings
from mixbit.server.logprobs import chat_logprobs
from mixbit.server.output import finish_reason, output_grammar, output_parser, output_syntax
from mixbit.server.parsing.events import (
    ArgumentsDelta,
    Event,
    ReasoningDelta,
    TextDelta,
    ToolCallEnd,
    ToolCallStart,
)
from mixbit.server.parsing.machine import OutputParser
from mixbit.server.schema.chat import (
    CreateChatCompletionRequest,
    CreateChatCompletionResponse,
    CreateChatCompletionStreamResponse,
)
from mixbit.server.service import CurrentServices, Service

router = APIRouter(tags=["completions"])


@dataclass(frozen=True)
class ChatFormat:
    """Chat choices: messages and deltas. parsers: one for each choice."""

    parsers: Sequence[OutputParser]
    with_logprobs: bool
    object: str = "chat.completion"
    chunk_object: str = "chat.completion.chunk"
    prompt_param: str = "messages"
    # Log-probabilities of text that is held back, by choice.
    _held: dict[int, list[TokenLogprobs]] = field(default_factory=dict)

    def whole(self, index: int, text: str, logprobs: Sequence[TokenLogprobs], reason: FinishReason) -> Json:
        """A complete choice."""
        parser = self.parsers[index]
        return {
            "index": index,
            "message": message([*parser.feed(text), *parser.finish()]),
            "logprobs": self._logprobs(logprobs),
            "finish_reason": finish_reason(parser, reason),
        }

    def first(self, index: int) -> Json:
        """The role, which is not repeated."""
        return _chunk(index, {"role": "assistant", "content": ""})

    def piece(self, index: int, delta: Delta) -> list[Json]:
        """What more text makes known."""
        return self._chunks(index, self.parsers[index].feed(delta.text), delta.logprobs)

    def last(self, index: int, reason: FinishReason) -> list[Json]:
        """What was held back, and why it ended."""
        parser = self.parsers[index]
        chunks = self._chunks(index, parser.finish(), ())
        held = self._held.pop(index, None)
        logprobs = self._logprobs(held) if held else None
        return [*chunks, _chunk(index, {}, logprobs, finish_reason(parser, reason))]

    def _chunks(self, index: int, events: Sequence[Event], logprobs: Sequence[TokenLogprobs]) -> list[Json]:
        held = [*self._held.pop(index, ()), *logprobs]
        chunks = [_chunk(index, shown) for event in events if (shown := delta_of(event)) is not None]
        if chunks:
            chunks[0]["logprobs"] = self._logprobs(held)
        elif held:
            self._held[index] = held
        return chunks

    def _logprobs(self, tokens: Sequence[TokenLogprobs]) -> Json | None:
        return chat_logprobs(tokens) if self.with_logprobs else None


def message(events: Sequence[Event]) -> Json:
    """A whole message. A call that is not complete is left out: its source is part of the text."""
    texts: list[str] = []
    reasoning: list[str] = []
    calls: dict[int, Json] = {}
    complete: set[int] = set()
    for event in events:
        match event:
            case TextDelta(text):
                texts.append(text)
            case ReasoningDelta(text):
                reasoning.append(text)
            case ToolCallStart(index, identifier, name):
                function = {"name": name, "arguments": ""}
                calls[index] = {"id": identifier, "type": "function", "function": function}
            case ArgumentsDelta(index, text):
                calls[index]["function"]["arguments"] += text
            case ToolCallEnd(index, True):
                complete.add(index)
    shown = [calls[index] for index in sorted(complete)]
    result: Json = {"role": "assistant", "content": "".join(texts) or (None if shown else ""), "refusal": None}
    if reasoning:
        result["reasoning_content"] = "".join(reasoning)
    if shown:
        result["tool_calls"] = shown
    return result


def delta_of(event: Event) -> Json | None:
    """The delta that tells of an event; None if none does."""
    match event:
        case TextDelta(text):
            return {"content": text}
        case ReasoningDelta(text):
            return {"reasoning_content": text}
        case ToolCallStart(index, identifier, name):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": identifier, "type": "function", "function": function}]}
        case ArgumentsDelta(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
        case ToolCallEnd():
            return None


def _chunk(index: int, delta: Json, logprobs: Json | None = None, reason: str | None = None) -> Json:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


@router.post(
    "/v1/chat/completions",
    response_model=CreateChatCompletionResponse | CreateChatCompletionStreamResponse,
    responses={200: {"description": "The answer; with `stream`, server-sent events of the second form and `[DONE]`."}},
)
async def create_chat_completion(
    body: CreateChatCompletionRequest, request: Request, services: CurrentServices
) -> Response:
    """Continue a conversation."""
    service = services.of(body.model)
    refuse_unsupported(body)
    require_ready(service.engine)
    generate = await plan(body, service)
    requests = [
        msgspec.structs.replace(
            generate,
            request_id=f"{generate.request_id}-{choice}",
            sampling=msgspec.structs.replace(generate.sampling, seed=choice_seed(body.seed, choice)),
        )
        for choice in range(body.n or 1)
    ]
    prompt = str(generate.prompt)
    parsers = [output_parser(body, service.model, prompt) for _ in requests]
    form = ChatFormat(parsers, with_logprobs=bool(body.logprobs))

    async def begin() -> Response:
        try:
            batch = await Batch.start(service.engine, requests, per_prompt=len(requests))
        except RequestRefused as error:
            raise api_error(error, form.prompt_param) from None
        return await Answer(generate.request_id, service.model.name, batch, form, body).response(request)

    return await begun(service.engine, begin, stream=body.stream)


def refuse_unsupported(body: CreateChatCompletionRequest) -> None:
    """Raise a 400 for fields that are part of the API but cannot be honoured."""
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("'top_logprobs' needs 'logprobs': true.", "top_logprobs")
    if body.stream_options is not None and not body.stream:
        raise invalid("'stream_options' needs 'stream': true.", "stream_options")


async def plan(body: CreateChatCompletionRequest, service: Service) -> Generate:
    """The message to the engine for one choice, its prompt rendered. Raises ApiError."""
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    prompt = await render_prompt(body, service.model)
    syntax = output_syntax(body, service.model, prompt)
    return Generate(
        request_id=f"chatcmpl-{uuid.uuid4().hex}",
        prompt=prompt,
        add_special_tokens=False,
        sampling=resolve_sampling(body, service.model.defaults),
        max_tokens=body.max_completion_tokens or body.max_tokens,
        stop=stop_strings(body),
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
        grammar=output_grammar(body, service.model, syntax),
        shown_tokens=syntax.markers,
    )
