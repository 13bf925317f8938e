"""`POST /v1/messages` and `/v1/messages/count_tokens`: Anthropic's API over the chat endpoint's rules."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response

from mixbit.engine.client import RequestError
from mixbit.engine.protocol import Finished, Usage
from mixbit.server.answer import Json, begun, whole_answer
from mixbit.server.dialogue import Dialogue, Part, Parts, Step, chat_request, count_tokens, overflow, start
from mixbit.server.errors import ApiError, anthropic_error, invalid
from mixbit.server.generation import api_error
from mixbit.server.schema.chat import CreateChatCompletionRequest
from mixbit.server.schema.messages import (
    Block,
    CountTokensRequest,
    CreateMessageRequest,
    Message,
    MessageParam,
    MessageTokensCount,
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    ToolChoice,
    ToolResultBlock,
    ToolUseBlock,
)
from mixbit.server.service import CurrentServices
from mixbit.server.settings import HTTP
from mixbit.server.sse import EventStream, typed_event

router = APIRouter(tags=["Anthropic"])


@router.post(
    "/v1/messages",
    response_model=Message,
    responses={
        200: {
            "description": "The answer; with `stream`, server-sent events: message_start, then for each content "
            "block content_block_start, content_block_delta and content_block_stop, then message_delta, message_stop."
        }
    },
)
async def create_message(body: CreateMessageRequest, request: Request, services: CurrentServices) -> Response:
    """Continue a conversation."""
    service = services.of(body.model)
    chat = to_chat(
        body,
        max_tokens=body.max_tokens,
        stop=body.stop_sequences,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
    )

    async def begin() -> Response:
        try:
            answer = _Answer(await start(chat, service, "messages"), service.model.name)
        except ApiError as error:
            raise _told(error) from None
        if body.stream:
            return EventStream(answer.stream(), HTTP.keepalive_seconds, _error_event)
        return await whole_answer(request, answer.whole(), "messages")

    return await begun(service.engine, begin, stream=body.stream, broken=_error_event)


@router.post("/v1/messages/count_tokens")
async def count_message_tokens(body: CountTokensRequest, services: CurrentServices) -> MessageTokensCount:
    """Measure the prompt of a conversation."""
    service = services.of(body.model)
    return MessageTokensCount(input_tokens=await count_tokens(to_chat(body), service, "messages"))


def _told(error: ApiError) -> ApiError:
    """Agents that speak this API know that they must compact by these words."""
    if not overflow(error):
        return error
    return ApiError(400, f"prompt is too long: {error.detail}", param=error.param, code=error.code)


def _error_event(error: ApiError) -> bytes:
    return typed_event(anthropic_error(error))


# --- the request ---


def to_chat(body: CountTokensRequest, **fields: Any) -> CreateChatCompletionRequest:
    """The chat request that asks for the same. Raises ApiError."""
    messages: list[Json] = []
    if body.system:
        messages.append({"role": "system", "content": _text(body.system)})
    for message in body.messages:
        messages += _assistant(message) if message.role == "assistant" else _others(message)
    thinks = body.thinking is not None and body.thinking.type != "disabled"
    shape = body.output_config.format if body.output_config else None
    return chat_request(
        {
            **fields,
            "messages": messages,
            "tools": [_tool(each.model_dump()) for each in body.tools] if body.tools else None,
            **_choice(body.tool_choice),
            "chat_template_kwargs": {"enable_thinking": thinks},
            "response_format": shape
            and {"type": "json_schema", "json_schema": {"name": "output", "schema": shape.schema_, "strict": True}},
        }
    )


def _text(content: str | list[TextBlock] | None) -> Any:
    """Text, or the parts of one, as the chat endpoint takes them."""
    if content is None or isinstance(content, str):
        return content or ""
    return [{"type": "text", "text": block.text} for block in content]


def _assistant(message: MessageParam) -> list[Json]:
    if isinstance(message.content, str):
        return [{"role": "assistant", "content": message.content}]
    result: Json = {"role": "assistant", "content": "".join(_texts(message.content))}
    calls: list[Json] = []
    for block in message.content:
        match block:
            case ThinkingBlock():
                result["reasoning_content"] = result.get("reasoning_content", "") + block.thinking
            case ToolUseBlock():
                function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
                calls.append({"id": block.id, "type": "function", "function": function})
            case ToolResultBlock():
                raise invalid("'messages': results of tools belong into messages with role 'user'.", "messages")
            case TextBlock() | RedactedThinkingBlock():
                pass
    return [{**result, "tool_calls": calls} if calls else result]


def _texts(blocks: list[Block]) -> Iterator[str]:
    return (block.text for block in blocks if isinstance(block, TextBlock))


def _others(message: MessageParam) -> list[Json]:
    """A user's turn: results of tools are messages of their own, before what the user says."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    results: list[Json] = []
    texts: list[Json] = []
    for block in message.content:
        match block:
            case TextBlock():
                texts.append({"type": "text", "text": block.text})
            case ToolResultBlock():
                results.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": _text(block.content)})
            case _:
                raise invalid(f"'messages': a block of type {block.type!r} belongs to the assistant.", "messages")
    return [*results, {"role": message.role, "content": texts}] if texts or not results else results


def _tool(tool: Json) -> Json:
    function = {"name": tool["name"], "description": tool["description"], "parameters": tool["input_schema"]}
    return {"type": "function", "function": {**function, "strict": tool["strict"]}}


def _choice(choice: ToolChoice | None) -> Json:
    if choice is None:
        return {}
    if choice.type == "tool":
        if choice.name is None:
            raise invalid("'tool_choice' of type 'tool' needs a 'name'.", "tool_choice.name")
        named = {"type": "function", "function": {"name": choice.name}}
        return {"tool_choice": named, "parallel_tool_calls": False if choice.disable_parallel_tool_use else None}
    return {
        "tool_choice": {"any": "required"}.get(choice.type, choice.type),
        "parallel_tool_calls": False if choice.disable_parallel_tool_use else None,
    }


# --- the answer ---


@dataclass(frozen=True)
class _Answer:
    """One answer under way."""

    dialogue: Dialogue
    model: str

    async def whole(self) -> Json:
        """The message. Raises RequestFailed."""
        parts, finished = await self.dialogue.whole()
        content = [_block(part) for part in parts.parts if part.complete]
        return self._message(content, finished.usage) | _ending(finished, parts.calls)

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The message as events."""
        usage = Usage(prompt_tokens=self.dialogue.prompt_tokens, completion_tokens=0, cached_tokens=0)
        yield typed_event({"type": "message_start", "message": self._message([], usage)})
        yield typed_event({"type": "ping"})
        parts = Parts()
        try:
            async with aclosing(self.dialogue.events()) as events:
                async for item in events:
                    for step in parts.end() if isinstance(item, Finished) else parts.feed(item):
                        yield typed_event(_step_event(step))
                    if isinstance(item, Finished):
                        ending = {"delta": _ending(item, parts.calls), "usage": _usage(item.usage)}
                        yield typed_event({"type": "message_delta", **ending})
        except RequestError as error:
            yield _error_event(api_error(error, "messages"))
            return
        yield typed_event({"type": "message_stop"})

    def _message(self, content: list[Json], usage: Usage) -> Json:
        return {
            "id": f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(usage),
        }


def _usage(usage: Usage) -> Json:
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
    }


def _ending(finished: Finished, calls: bool) -> Json:
    if finished.reason == "length":
        reason = "max_tokens"
    elif calls:
        reason = "tool_use"
    else:
        reason = "end_turn" if finished.stop is None else "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": finished.stop if reason == "stop_sequence" else None}


def _block(part: Part, *, empty: bool = False) -> Json:
    """A part as a content block; `empty`: as it is when it begins."""
    text = "" if empty else part.text
    if part.kind == "thinking":
        return {"type": "thinking", "thinking": text, "signature": ""}
    if part.call is None:
        return {"type": "text", "text": text}
    return {
        "type": "tool_use",
        "id": part.call.id,
        "name": part.call.name,
        "input": {} if empty else json.loads(text or "{}"),
    }


_DELTAS = {
    "thinking": ("thinking_delta", "thinking"),
    "text": ("text_delta", "text"),
    "tool": ("input_json_delta", "partial_json"),
}


def _step_event(step: Step) -> Json:
    if step.what == "open":
        block = _block(step.part, empty=True)
        return {"type": "content_block_start", "index": step.part.index, "content_block": block}
    if step.what == "close":
        return {"type": "content_block_stop", "index": step.part.index}
    kind, key = _DELTAS[step.part.kind]
    return {"type": "content_block_delta", "index": step.part.index, "delta": {"type": kind, key: step.delta}}
