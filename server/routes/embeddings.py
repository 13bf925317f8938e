"""`POST /v1/embeddings`: refused, since the served models have no embedding head."""

from __future__ import annotations

from fastapi import APIRouter, Response

from mixbit.server.errors import ApiError
from mixbit.server.schema.embeddings import CreateEmbeddingRequest
from mixbit.server.service import CurrentServices

router = APIRouter(tags=["completions"])


@router.post("/v1/embeddings", response_class=Response)
async def create_embedding(body: CreateEmbeddingRequest, services: CurrentServices) -> None:
    """Always a 400 that says why, so that a client can fall back to another server."""
    service = services.of(body.model)
    raise ApiError(
        400,
        f"The model {service.model.name!r} is served for generation; this server computes no embeddings. "
        "Use an embedding model on another server.",
        param="model",
        code="embeddings_not_supported",
    )
