"""What routes work with: the engine, the model, and the question whether a request means it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from mixbit.engine.client import Engine
from mixbit.server.errors import ApiError
from mixbit.server.model import ServedModel


@dataclass(frozen=True)
class Service:
    """One engine serving one model."""

    engine: Engine
    model: ServedModel

    def require_model(self, name: str | None) -> None:
        """Raise a 404 unless `name` is a name of the served model; no name means it."""
        if name is None or name in self.model.names:
            return
        names = ", ".join(repr(each) for each in self.model.names)
        raise ApiError(
            404,
            f"The model {name[:200]!r} does not exist; this server has {names}.",
            param="model",
            code="model_not_found",
        )


def _service(request: Request) -> Service:
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


CurrentService = Annotated[Service, Depends(_service)]
