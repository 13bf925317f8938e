"""`GET /v1/models`: the names the model is served under."""

from __future__ import annotations

from fastapi import APIRouter

from mixbit.server.schema.common import ErrorResponse
from mixbit.server.schema.models import ListModelsResponse, Model
from mixbit.server.service import CurrentService, Service

router = APIRouter(tags=["models"])


@router.get("/v1/models")
async def list_models(service: CurrentService) -> ListModelsResponse:
    """The served name first, then its aliases."""
    return ListModelsResponse(object="list", data=[_model(service, name) for name in service.model.names])


@router.get("/v1/models/{model:path}", responses={404: {"model": ErrorResponse}})
async def retrieve_model(model: str, service: CurrentService) -> Model:
    """One name; it may contain slashes, plain or as %2F."""
    service.require_model(model)
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
