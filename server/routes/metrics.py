"""`GET /metrics`: numbers for Prometheus. A key is needed where the API needs one."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from mixbit.server.metrics import CONTENT_TYPE, Metrics

router = APIRouter(tags=["server"])


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Requests, tokens, times, memory."""
    found = request.app.state.metrics
    assert isinstance(found, Metrics)
    return Response(found.text(), media_type=CONTENT_TYPE)
