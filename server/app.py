"""The application: routes, errors, and the guard around them."""

from __future__ import annotations

from fastapi import FastAPI, Security
from fastapi.security import HTTPBearer
from pydantic import BaseModel

from mixbit.server import errors
from mixbit.server.metrics import Metrics
from mixbit.server.observe import Observer
from mixbit.server.routes import (
    chat,
    completions,
    docs,
    embeddings,
    health,
    infill,
    llama,
    messages,
    metrics,
    models,
    page,
    responses,
)
from mixbit.server.schema.common import ErrorResponse
from mixbit.server.schema.messages import AnthropicError
from mixbit.server.security import Guard
from mixbit.server.service import Services
from mixbit.server.settings import Access
from mixbit.server.version import VERSION

Responses = dict[int | str, dict[str, object]]

_REFUSALS = {
    400: "A field is wrong, cannot be honoured, or the prompt exceeds the context",
    401: "No API key, or a wrong one",
    404: "No such model",
    413: "The body is too large",
    415: "Not JSON",
    429: "The queue is full; see Retry-After",
    503: "Loading, restarting, or out of memory; see Retry-After",
}
# For the document alone: the guard checks keys before any route is looked for.
_KEY = Security(
    HTTPBearer(scheme_name="key", description="An API key, where the server asks for one.", auto_error=False)
)
_ANY_ERROR: Responses = {"default": {"model": ErrorResponse, "description": "Any other error"}}


def _refusals(form: type[BaseModel]) -> Responses:
    """What the document says of answers that are no success."""
    listed: Responses = {status: {"model": form, "description": text} for status, text in _REFUSALS.items()}
    return {**listed, "default": {"model": form, "description": "Any other error"}}


def create_app(services: Services, access: Access) -> FastAPI:
    """The ASGI application that offers `services` to whom `access` lets in."""
    app = FastAPI(
        title="Mixbit",
        version=VERSION,
        summary="An OpenAI-compatible server for mixed-precision models",
        docs_url=None,  # routes/docs.py
        redoc_url=None,
    )
    app.state.services = services
    app.state.metrics = Metrics(services)
    for route in (chat, completions, responses, embeddings, infill, llama):
        app.include_router(route.router, responses=_refusals(ErrorResponse), dependencies=[_KEY])
    app.include_router(messages.router, responses=_refusals(AnthropicError), dependencies=[_KEY])
    for route in (models, metrics):
        app.include_router(route.router, responses=_ANY_ERROR, dependencies=[_KEY])
    app.include_router(health.router, responses=_ANY_ERROR)
    for route in (docs, page):
        app.include_router(route.router)
    errors.install(app)
    app.add_middleware(Guard, access=access)
    app.add_middleware(Observer, meter=app.state.metrics)  # around the guard
    return app
