"""`POST /v1/responses`: OpenAI's Responses API, stateless, over the chat endpoint's rules."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from fastapi import Response as HttpResponse

from mixbit.engine.client import RequestError
from mixbit.engine.protocol import Finished, Usage
from mixbit.server.answer import Json, begun, whole_answer
from mixbit.server.dialogue import Dialogue, Part, Parts, Step, start
from mixbit.server.errors import ApiError, error_object
from mixbit.server.generation import api_error
from mixbit.server.responses import functions, to_chat
from mixbit.server.schema.responses import CreateResponseRequest, Response, WebSearchTool
from mixbit.server.service import CurrentServices
from mixbit.server.settings import HTTP
from mixbit.server.sse import EventStream, typed_event

router = APIRouter(tags=["completions"])


@router.post(
    "/v1/responses",
    response_model=Response,
    responses={
        200: {
            "description": "The answer; with `stream`, server-sent events: response.created, response.in_progress, "
            "then for each item response.output_item.added, its deltas and response.output_item.done, and last "
            "response.completed, response.incomplete or response.failed."
        }
    },
)
async def create_response(body: CreateResponseRequest, request: Request, services: CurrentServices) -> HttpResponse:
    """Continue a conversation, all of which is in the request."""
    service = services.of(body.model)
    chat = to_chat(body)

    async def begin() -> HttpResponse:
        answer = _Answer(body, service.model.name, await start(chat, service, "input"))
        if body.stream:
            return EventStream(answer.stream(), HTTP.keepalive_seconds, _error_event)
        return await whole_answer(request, answer.whole(), "input")

    return await begun(service.engine, begin, stream=body.stream, broken=_error_event)


def _error_event(error: ApiError) -> bytes:
    told = error_object(error)["error"]
    return typed_event(
        {"type": "error", "sequence_number": 0, **{name: told[name] for name in ("code", "message", "param")}}
    )


@dataclass
class _Answer:
    """One answer under way."""

    body: CreateResponseRequest
    model: str
    dialogue: Dialogue
    id: str = field(default_factory=lambda: f"resp_{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    parts: Parts = field(default_factory=Parts)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    async def whole(self) -> Json:
        """The response. Raises RequestFailed."""
        self.parts, finished = await self.dialogue.whole()
        return self._ended(finished)

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The response as events."""
        yield self._event("response.created", response=self._response("in_progress"))
        yield self._event("response.in_progress", response=self._response("in_progress"))
        try:
            async with aclosing(self.dialogue.events()) as events:
                async for item in events:
                    cut = isinstance(item, Finished) and _cut(item)
                    for step in self.parts.end() if isinstance(item, Finished) else self.parts.feed(item):
                        for each in self._step(step, cut=cut):
                            yield each
                    if isinstance(item, Finished):
                        last = self._ended(item)
                        yield self._event(f"response.{last['status']}", response=last)
        except RequestError as error:
            told = api_error(error, "input")
            fault = {"code": "server_error", "message": str(told.detail)}
            yield self._event("response.failed", response=self._response("failed", error=fault))

    def _event(self, kind: str, **fields: Any) -> bytes:
        return typed_event({"type": kind, "sequence_number": next(self.numbers), **fields})

    def _step(self, step: Step, *, cut: bool) -> Iterator[bytes]:
        """The events of one step. cut: the answer ended for its length."""
        part = step.part
        place = {"item_id": self._item_id(part), "output_index": part.index}
        inside = {**place, "content_index": 0}
        if step.what == "open":
            item = self._item(part, "in_progress", empty=True)
            yield self._event("response.output_item.added", output_index=part.index, item=item)
            if part.kind == "text":
                yield self._event("response.content_part.added", **inside, part=_text_part(""))
        elif step.what == "grow":
            if part.kind == "tool":
                yield self._event("response.function_call_arguments.delta", **place, delta=step.delta)
            elif part.kind == "text":
                yield self._event("response.output_text.delta", **inside, delta=step.delta, logprobs=[])
            else:
                yield self._event("response.reasoning_text.delta", **inside, delta=step.delta)
        else:
            if part.kind == "tool":
                yield self._event("response.function_call_arguments.done", **place, arguments=part.text)
            elif part.kind == "text":
                yield self._event("response.output_text.done", **inside, text=part.text, logprobs=[])
                yield self._event("response.content_part.done", **inside, part=_text_part(part.text))
            else:
                yield self._event("response.reasoning_text.done", **inside, text=part.text)
            whole = part.complete and not cut
            item = self._item(part, "completed" if whole else "incomplete")
            yield self._event("response.output_item.done", output_index=part.index, item=item)

    def _item_id(self, part: Part) -> str:
        kind = {"text": "msg", "tool": "fc", "thinking": "rs"}[part.kind]
        return f"{kind}_{self.id[5:]}_{part.index}"

    def _item(self, part: Part, status: str, *, empty: bool = False) -> Json:
        """A part as an item of the output; `empty`: as it is when it begins."""
        head = {"id": self._item_id(part), "status": status}
        if part.call is not None:
            arguments = "" if empty else part.text
            return {
                **head,
                "type": "function_call",
                "call_id": part.call.id,
                **self._called(part.call.name),
                "arguments": arguments,
            }
        if part.kind == "thinking":
            content = [] if empty else [{"type": "reasoning_text", "text": part.text}]
            return {**head, "type": "reasoning", "summary": [], "content": content}
        content = [] if empty else [_text_part(part.text)]
        return {**head, "type": "message", "role": "assistant", "content": content}

    def _called(self, name: str) -> Json:
        """The function that the model knows by `name`, as the client does."""
        for known, namespace, tool in functions(self.body):
            if known == name and namespace is not None:
                return {"name": tool.name, "namespace": namespace}
        return {"name": name}

    def _ended(self, finished: Finished) -> Json:
        cut = _cut(finished)
        last = len(self.parts.parts) - 1
        output = [
            self._item(part, "incomplete" if not part.complete or (cut and part.index == last) else "completed")
            for part in self.parts.parts
            if part.complete or cut
        ]
        return self._response(
            "incomplete" if cut else "completed",
            output=output,
            usage=_usage(finished.usage),
            incomplete_details={"reason": "max_output_tokens"} if cut else None,
        )

    def _response(self, status: str, **fields: Any) -> Json:
        body = self.body
        tools = body.tools or ()
        chosen = body.tool_choice
        form = body.text.format if body.text else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "model": self.model,
            "output": [],
            "usage": None,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": False,
            "temperature": body.temperature,
            "text": {"format": form.model_dump(by_alias=True, exclude_none=True) if form else {"type": "text"}},
            "tool_choice": "auto" if chosen is None else chosen if isinstance(chosen, str) else chosen.model_dump(),
            "tools": [tool.model_dump() for tool in tools if not isinstance(tool, WebSearchTool)],
            "top_p": body.top_p,
            "truncation": "disabled",
            "background": False,
            **fields,
        }


def _cut(finished: Finished) -> bool:
    return finished.reason == "length"


def _text_part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(usage: Usage) -> Json:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
