"""`GET /v1/models`, `/v1/models/{id}/tensors` and `GET /health`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

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


class ActiveExperts(ResponseModel):
    """Experts in each layer that has them."""

    active: int = Field(description="For one token.")
    total: int


class TensorClass(ResponseModel):
    """Tensors of one role, shape and format. Sizes in bytes, of all of them together."""

    role: str
    count: int
    shape: list[int]
    bits: int | None = Field(description="Width of a weight; null if they are not quantized.")
    group_size: int | None
    mode: str | None
    dtype: str = Field(description="Of the values; of the scales where they are quantized.")
    parameters: int
    size: int
    token_bytes: int = Field(description="What one token reads: one row of the embedding, the active experts.")
    layers: list[int] = Field(description="Where they are; empty for those outside the layers.")
    overrides: list[str] = Field(description="Keys of config.json that gave the width.")


class ModelTensors(ResponseModel):
    """What the model is made of, as it runs: every class of tensor with its width. Sizes in bytes."""

    id: str
    object: Literal["model.tensors"]
    model_type: str
    backend: str
    backend_reason: str
    layers: dict[str, int] = Field(description="How many of each kind.")
    experts: ActiveExperts | None
    vocab_size: int
    context_length: int
    parameters: int
    size: int
    token_bytes: int = Field(description="Of the weights, what one token reads.")
    bits_per_weight: float
    classes: list[TensorClass]


class Health(ResponseModel):
    """`ok` with 200, else 503."""

    status: Literal["ok", "loading", "restarting", "failed"]
    detail: str | None = None
