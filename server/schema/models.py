"""`GET /v1/models` and `GET /health`."""

from __future__ import annotations

from typing import Literal

from mixbit.server.schema.common import ResponseModel


class Model(ResponseModel):
    """A name under which the model is served. Lengths in tokens, null until the model is loaded."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_length: int | None
    max_model_len: int | None


class ListModelsResponse(ResponseModel):
    """All names."""

    object: Literal["list"]
    data: list[Model]


class Health(ResponseModel):
    """`ok` with 200, else 503."""

    status: Literal["ok", "loading", "restarting", "failed"]
    detail: str | None = None
