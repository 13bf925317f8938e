"""`POST /v1/embeddings`: the mean of a text's hidden states, from a model made for something else."""

from __future__ import annotations

import asyncio
import base64
import sys
import uuid
from array import array
from collections.abc import Sequence

from fastapi import APIRouter, Request, Response

from mixbit.engine.client import Engine, EngineFailed, RequestError, RequestRefused
from mixbit.engine.protocol import Embed, Finished
from mixbit.server.answer import Json, whole_answer
from mixbit.server.errors import ApiError, invalid
from mixbit.server.generation import require_ready
from mixbit.server.observe import current_record
from mixbit.server.schema.embeddings import CreateEmbeddingRequest, CreateEmbeddingResponse
from mixbit.server.service import CurrentServices
from mixbit.server.settings import REQUEST

router = APIRouter(tags=["completions"])


@router.post("/v1/embeddings", response_model=CreateEmbeddingResponse)
async def create_embedding(body: CreateEmbeddingRequest, request: Request, services: CurrentServices) -> Response:
    """Turn texts into vectors of length 1: the nearer two texts, the larger the product of theirs."""
    service = services.of(body.model)
    require_ready(service.engine)
    return await whole_answer(request, _answer(body, service.engine, service.model.name), "input")


async def _answer(body: CreateEmbeddingRequest, engine: Engine, model: str) -> Json:
    await _check_size(body, engine, model)
    name = f"embd-{uuid.uuid4().hex}"
    messages = [
        Embed(request_id=f"{name}-{index}", prompt=prompt, add_special_tokens=True)
        for index, prompt in enumerate(_inputs(body))
    ]
    done = await _embed_all(engine, name, messages)
    tokens = sum(each.usage.prompt_tokens for each in done)
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": _encoded(each, body.encoding_format)}
            for index, each in enumerate(done)
        ],
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


async def _check_size(body: CreateEmbeddingRequest, engine: Engine, model: str) -> None:
    """Refuse what this model cannot give."""
    try:
        size = (await engine.wait_ready()).embedding_size
    except EngineFailed as error:
        raise RequestRefused("not_ready", str(error)) from None
    if size is None:
        text = f"The model {model!r} is run by kernels that give no embeddings; `mixbit doctor` names others."
        raise ApiError(400, text, param="model", code="embeddings_not_supported")
    if body.dimensions not in (None, size):
        text = f"'dimensions': the embeddings of this model have {size} values, and cannot be shortened."
        raise invalid(text, "dimensions", "unsupported_value")


async def _embed_all(engine: Engine, name: str, messages: Sequence[Embed]) -> list[Finished]:
    """All, a few at a time: who asks for thousands must not fill the queue. Raises RequestError of one that fails."""
    record = current_record()
    record.begin(name)
    pending, done = iter(enumerate(messages)), dict[int, Finished]()

    async def work() -> None:
        for index, message in pending:
            async with await engine.generate(message) as completion:
                async for event in completion:
                    if isinstance(event, Finished):
                        done[index] = event
                        record.note(index, event)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(REQUEST.embeddings_at_once, len(messages))):
                group.create_task(work())
    except ExceptionGroup as failures:
        error = failures.exceptions[0]
        if isinstance(error, RequestError):
            refused = isinstance(error, RequestRefused)
            record.end("timeout" if error.code == "timeout" else "refused" if refused else "failed")
        raise error from None
    finally:
        record.accepted([each.usage.prompt_tokens for each in done.values()], 1)
    record.end("completed")
    return [done[index] for index in range(len(messages))]


def _inputs(body: CreateEmbeddingRequest) -> list[str | list[int]]:
    given = body.input
    if isinstance(given, str):
        return [given]
    tokens = [each for each in given if isinstance(each, int)]
    return [tokens] if tokens else [each for each in given if not isinstance(each, int)]


def _encoded(finished: Finished, encoding: str | None) -> list[float] | str:
    assert finished.embedding is not None
    if encoding == "base64":
        return base64.b64encode(finished.embedding).decode()
    values = array("f", finished.embedding)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tolist()
