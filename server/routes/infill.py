"""`POST /infill`: fill in the middle, in llama.cpp's form. Its streams end with the event that says `stop`."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from mixbit.engine.client import RequestError, RequestRefused
from mixbit.engine.protocol import Delta, Finished, Generate
from mixbit.server.answer import Json, begun, whole_answer
from mixbit.server.errors import invalid
from mixbit.server.generation import Batch, api_error, choice_seed, require_ready, resolve_sampling, stop_strings
from mixbit.server.model import ServedModel
from mixbit.server.schema.common import SamplingFields
from mixbit.server.schema.llama import InfillRequest, InfillResponse
from mixbit.server.service import CurrentServices
from mixbit.server.settings import HTTP
from mixbit.server.sse import EventStream, error_event, event

router = APIRouter(tags=["llama.cpp"])


@router.post(
    "/infill",
    response_model=InfillResponse,
    responses={200: {"description": "The text for the gap; with `stream`, server-sent events of its pieces."}},
)
async def infill(body: InfillRequest, request: Request, services: CurrentServices) -> Response:
    """Fill in a gap in a file."""
    service = services.of(body.model)
    prompt = _prompt(body, service.model)
    require_ready(service.engine)
    started = time.perf_counter()

    async def begin() -> Response:
        try:
            batch = await Batch.start(service.engine, [_plan(body, prompt, service.model)], per_prompt=1)
        except RequestRefused as error:
            raise api_error(error, "input_prefix") from None
        answer = _Infill(body, service.model.name, batch, started)
        if body.stream:
            return EventStream(answer.stream(), HTTP.keepalive_seconds)
        return await whole_answer(request, answer.whole(), "input_prefix")

    return await begun(service.engine, begin, stream=body.stream)


def _prompt(body: InfillRequest, model: ServedModel) -> str:
    if model.fim is None:
        raise invalid("'input_suffix': this model has no tokens for filling in.", "input_suffix", "unsupported_value")
    before = (body.input_prefix or "") + (body.prompt or "")
    extra = [(each.filename or "tmp", each.text) for each in body.input_extra or ()]
    return model.fim.prompt(before, body.input_suffix or "", extra)


def _plan(body: InfillRequest, prompt: str, model: ServedModel) -> Generate:
    fields = SamplingFields.model_construct(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        repetition_penalty=body.repeat_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        stop=body.stop,
    )
    seed = None if body.seed == -1 else body.seed
    return Generate(
        request_id=f"infill-{uuid.uuid4().hex}",
        prompt=prompt,
        add_special_tokens=True,
        sampling=msgspec.structs.replace(resolve_sampling(fields, model.defaults), seed=choice_seed(seed, 0)),
        max_tokens=None if body.n_predict in {None, -1} else max(body.n_predict or 0, 1),
        stop=stop_strings(fields),
        ignore_eos=bool(body.ignore_eos),
    )


@dataclass
class _Infill:
    """One request under way. Times are those of time.perf_counter()."""

    body: InfillRequest
    model: str
    batch: Batch
    started: float
    text: list[str] = field(default_factory=list)
    tokens: int = 0
    first: float | None = None  # when the first text came

    async def whole(self) -> Json:
        """Everything at once. Raises RequestFailed."""
        finished = None
        async with aclosing(self._deltas()) as events:
            async for item in events:
                finished = item if isinstance(item, Finished) else finished
        return self._select(self._last("".join(self.text), finished))

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """An event for each piece of text, and one with the rest."""
        finished = None
        try:
            async with aclosing(self._deltas()) as events:
                async for item in events:
                    if isinstance(item, Finished):
                        finished = item
                    else:
                        yield event(self._piece(item.text, stop=False))
        except RequestError as error:
            yield error_event(api_error(error, "input_prefix"))
            return
        yield event(self._select(self._last("", finished)))

    async def _deltas(self) -> AsyncGenerator[Delta | Finished, None]:
        """What comes, until it is over or has taken too long."""
        async with aclosing(self.batch.events()) as events:
            async for _, item in events:
                if isinstance(item, Finished):
                    yield item
                    continue
                self.first = self.first or time.perf_counter()
                self.tokens += item.token_count
                if item.text and self.body.n_predict != 0:
                    self.text.append(item.text)
                    yield item
                if self._late():
                    return

    def _late(self) -> bool:
        limit = self.body.t_max_predict_ms or 0
        waited = 1000 * (time.perf_counter() - (self.first or self.started))
        return limit > 0 and waited > limit and any("\n" in piece for piece in self.text)

    def _piece(self, text: str, *, stop: bool) -> Json:
        return {
            "index": 0,
            "content": text,
            "tokens": [],
            "stop": stop,
            "model": self.model,
            "id_slot": -1,
            "tokens_predicted": self.tokens,
            "tokens_evaluated": self.batch.completions[0].prompt_tokens,
        }

    def _last(self, text: str, finished: Finished | None) -> Json:
        """finished: None if it took too long."""
        if finished is not None:
            self.tokens = 0 if self.body.n_predict == 0 else finished.usage.completion_tokens
        word = finished.stop if finished else None
        limited = finished is None or finished.reason == "length"
        cached = finished.usage.cached_tokens if finished else 0
        return {
            **self._piece(text, stop=True),
            "tokens_cached": cached,
            "truncated": False,
            "stop_type": "word" if word else "limit" if limited else "eos",
            "stopping_word": word or "",
            "has_new_line": any("\n" in piece for piece in self.text),
            "timings": self._timings(self.batch.completions[0].prompt_tokens - cached),
        }

    def _timings(self, computed: int) -> Json:
        now = time.perf_counter()
        first = self.first or now
        result: Json = {}
        for name, count, seconds in (
            ("prompt", computed, first - self.started),
            ("predicted", self.tokens, now - first),
        ):
            result |= {
                f"{name}_n": count,
                f"{name}_ms": 1000 * seconds,
                f"{name}_per_token_ms": 1000 * seconds / max(count, 1),
                f"{name}_per_second": count / max(seconds, 1e-6),
            }
        return result

    def _select(self, answer: Json) -> Json:
        """The fields that were asked for, under the names that were asked for."""
        if self.body.response_fields is None:
            return answer
        result = {}
        for path in self.body.response_fields:
            value: Any = answer
            for key in path.split("/"):
                value = value.get(key) if isinstance(value, dict) else None
            if value is not None:
                result[path] = value
        return result
