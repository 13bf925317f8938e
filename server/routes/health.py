"""`GET /health`: whether requests are taken, and if not, why. Open to everyone, so it says nothing else."""

from __future__ import annotations

from fastapi import APIRouter, Response

from mixbit.engine.client import Engine, EngineState
from mixbit.server.schema.models import Health
from mixbit.server.service import CurrentServices

router = APIRouter(tags=["server"])

_ORDER = ("failed", "restarting", "loading", "ok")  # the worst first


@router.head("/health", include_in_schema=False)
@router.get("/health", response_model=Health, responses={503: {"model": Health}})
async def health(services: CurrentServices) -> Response:
    """200 if every model takes requests, else 503 and the state of the worst."""
    states = [_state(service.engine) for service in services.all]
    worst = min(states, key=lambda state: _ORDER.index(state.status))
    status = 200 if worst.status == "ok" else 503
    headers = {} if status == 200 else {"retry-after": "2"}
    return Response(worst.model_dump_json(), status, headers, media_type="application/json")


def _state(engine: Engine) -> Health:
    if engine.stats is not None and engine.stats.fault is not None:
        return Health(status="failed", detail=engine.stats.fault)
    if engine.state in {EngineState.READY, EngineState.UNLOADED}:
        return Health(status="ok")
    if engine.state in {EngineState.STARTING, EngineState.LOADING}:
        step = engine.progress
        return Health(status="loading", detail=f"{step.stage} {step.done}/{step.total}" if step else None)
    return Health(status="restarting" if engine.state is EngineState.RESTARTING else "failed")
