"""What routes work with: engines, their models, and the question which one a request means."""

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


@dataclass(frozen=True)
class Services:
    """All that is served here, at least one; the first is meant where a request names none."""

    all: tuple[Service, ...]

    def of(self, name: str | None) -> Service:
        """The service whose model has this name. Raises a 404 if there is none."""
        if name is None:
            return self.all[0]
        for service in self.all:
            if name in service.model.names:
                return service
        names = ", ".join(repr(each) for service in self.all for each in service.model.names)
        raise ApiError(
            404,
            f"The model {name[:200]!r} does not exist; this server has {names}.",
            param="model",
            code="model_not_found",
        )


def _services(request: Request) -> Services:
    services = request.app.state.services
    assert isinstance(services, Services)
    return services


CurrentServices = Annotated[Services, Depends(_services)]
