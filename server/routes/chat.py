"""`POST /v1/chat/completions`."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from fastapi import APIRouter, Request, Response

from mixbit.engine.client import RequestRefused
from mixbit.engine.protocol import Delta, FinishReason, Generate, TokenLogprobs
from mixbit.server.answer import Answer, Json
from mixbit.server.conversation import render_prompt
from mixbit.server.errors import ApiError, invalid
from mixbit.server.generation import Batch, api_error, choice_seed, require_ready, resolve_sampling, stop_strings
from mixbit.server.logprobs import chat_logprobs
from mixbit.server.schema.chat import (
    CreateChatCompletionRequest,
    CreateChatCompletionResponse,
    CreateChatCompletionStreamResponse,
)
from mixbit.server.service import CurrentService, Service

router = APIRouter(tags=["completions"])


@dataclass(frozen=True)
class ChatFormat:
    """Chat choices: messages and deltas."""

    with_logprobs: bool
    object: str = "chat.completion"
    chunk_object: str = "chat.completion.chunk"
    prompt_param: str = "messages"

    def whole(self, index: int, text: str, logprobs: Sequence[TokenLogprobs], reason: FinishReason) -> Json:
        """A complete choice."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(logprobs),
            "finish_reason": reason,
        }

    def first(self, index: int) -> Json:
        """The role, which is not repeated."""
        return _chunk(index, {"role": "assistant", "content": ""})

    def piece(self, index: int, delta: Delta) -> Json:
        """More text."""
        return _chunk(index, {"content": delta.text}, self._logprobs(delta.logprobs))

    def last(self, index: int, reason: FinishReason) -> Json:
        """Why it ended."""
        return _chunk(index, {}, reason=reason)

    def _logprobs(self, tokens: Sequence[TokenLogprobs]) -> Json | None:
        return chat_logprobs(tokens) if self.with_logprobs else None


def _chunk(index: int, delta: Json, logprobs: Json | None = None, reason: FinishReason | None = None) -> Json:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


@router.post(
    "/v1/chat/completions",
    response_model=CreateChatCompletionResponse | CreateChatCompletionStreamResponse,
    responses={200: {"description": "The answer; with `stream`, server-sent events of the second form and `[DONE]`."}},
)
async def create_chat_completion(
    body: CreateChatCompletionRequest, request: Request, service: CurrentService
) -> Response:
    """Continue a conversation."""
    service.require_model(body.model)
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
    form = ChatFormat(with_logprobs=bool(body.logprobs))
    try:
        batch = await Batch.start(service.engine, requests, per_prompt=len(requests))
    except RequestRefused as error:
        raise api_error(error, form.prompt_param) from None
    return await Answer(generate.request_id, service.model.name, batch, form, body).response(request)


def refuse_unsupported(body: CreateChatCompletionRequest) -> None:
    """Raise a 400 for fields that are part of the API but cannot be honoured."""
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("'top_logprobs' needs 'logprobs': true.", "top_logprobs")
    if body.stream_options is not None and not body.stream:
        raise invalid("'stream_options' needs 'stream': true.", "stream_options")
    if body.response_format is not None and body.response_format.type != "text":
        raise _unsupported("response_format", f"the type {body.response_format.type!r}", "use 'text'")
    if body.tool_choice not in (None, "none", "auto"):
        kind = "'required'" if body.tool_choice == "required" else "a named function"
        raise _unsupported("tool_choice", kind, "use 'auto' or 'none'")
    for index, tool in enumerate(body.tools or ()):
        if tool.function.strict:
            raise _unsupported(f"tools[{index}].function.strict", "strict arguments", "leave it out")
    if body.tools and body.parallel_tool_calls is False:
        raise _unsupported("parallel_tool_calls", "a limit of one call", "leave it out")


def _unsupported(param: str, what: str, hint: str) -> ApiError:
    return invalid(f"'{param}': {what} is not supported by this server; {hint}.", param, "unsupported_value")


async def plan(body: CreateChatCompletionRequest, service: Service) -> Generate:
    """The message to the engine for one choice, its prompt rendered. Raises ApiError."""
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return Generate(
        request_id=f"chatcmpl-{uuid.uuid4().hex}",
        prompt=await render_prompt(body, service.model),
        add_special_tokens=False,
        sampling=resolve_sampling(body, service.model.defaults),
        max_tokens=body.max_completion_tokens or body.max_tokens,
        stop=stop_strings(body),
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
    )
