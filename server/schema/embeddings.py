"""`POST /v1/embeddings`."""

from __future__ import annotations

from typing import Any

from mixbit.server.schema.common import RequestModel


class CreateEmbeddingRequest(RequestModel):
    """Texts to be embedded."""

    input: Any
    model: str | None = None
