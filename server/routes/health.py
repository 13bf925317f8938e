"""`GET /health`: whether requests are taken. Open to everyone, so it says nothing else."""

from __future__ import annotations

from fastapi import APIRouter, Response

from mixbit.engine.client import EngineState
from mixbit.server.schema.models import Health
from mixbit.server.service import CurrentService

router = APIRouter(tags=["server"])


@router.head("/health", include_in_schema=False)
@router.get("/health", response_model=Health, responses={503: {"model": Health}})
async def health(service: CurrentService) -> Response:
    """200 if the model is loaded and the engine runs, else 503."""
    engine = service.engine
    if engine.state is EngineState.READY:
        return _answer(Health(status="ok"), 200)
    if engine.state in {EngineState.STARTING, EngineState.LOADING}:
        step = engine.progress
        detail = f"{step.stage} {step.done}/{step.total}" if step else None
        return _answer(Health(status="loading", detail=detail), 503)
    status = "restarting" if engine.state is EngineState.RESTARTING else "failed"
    return _answer(Health.model_validate({"status": status}), 503)


def _answer(body: Health, status: int) -> Response:
    headers = {} if status == 200 else {"retry-after": "2"}
    return Response(body.model_dump_json(), status, headers, media_type="application/json")
