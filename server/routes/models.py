"""`GET /v1/models`: the names the model is served under, and what it is made of."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter

from mixbit.server.generation import require_ready
from mixbit.server.schema.common import ErrorResponse
from mixbit.server.schema.models import ActiveExperts, ListModelsResponse, Model, ModelTensors, TensorClass
from mixbit.server.service import CurrentServices, Service

router = APIRouter(tags=["models"])


@router.head("/v1/models", include_in_schema=False)
@router.get("/v1/models")
async def list_models(services: CurrentServices) -> ListModelsResponse:
    """Every model under its name and its aliases."""
    listed = [_model(service, name) for service in services.all for name in service.model.names]
    return ListModelsResponse(object="list", data=listed)


@router.get(
    "/v1/models/{model:path}/tensors",
    responses={404: {"model": ErrorResponse}, 503: {"model": ErrorResponse, "description": "Loading or restarting"}},
)
async def retrieve_tensors(model: str, services: CurrentServices) -> ModelTensors:
    """Every class of tensor: its width, its layers, what it takes; as `mixbit inspect` has them."""
    service = services.of(model)
    require_ready(service.engine)
    ready = service.engine.ready
    assert ready is not None
    made, classes = ready.model, ready.model.classes
    parameters, size = sum(each.parameters for each in classes), sum(each.size for each in classes)
    return ModelTensors(
        id=model,
        object="model.tensors",
        model_type=made.model_type,
        backend=ready.backend,
        backend_reason=ready.backend_reason,
        layers=made.layers,
        experts=ActiveExperts(active=made.experts[0], total=made.experts[1]) if made.experts else None,
        vocab_size=ready.vocab_size,
        context_length=ready.context_length,
        parameters=parameters,
        size=size,
        token_bytes=sum(each.token_bytes for each in classes),
        bits_per_weight=round(8 * size / max(parameters, 1), 3),
        classes=[TensorClass.model_validate(msgspec.to_builtins(each)) for each in classes],
    )


@router.get("/v1/models/{model:path}", responses={404: {"model": ErrorResponse}})
async def retrieve_model(model: str, services: CurrentServices) -> Model:
    """One name; it may contain slashes, plain or as %2F."""
    service = services.of(model)
    return _model(service, model)


def _model(service: Service, name: str) -> Model:
    ready = service.engine.ready
    length = ready.context_length if ready else None
    return Model(
        id=name,
        object="model",
        created=service.model.created,
        owned_by="mixbit",
        context_length=length,
        max_model_len=length,
    )
