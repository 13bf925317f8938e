"""`GET /docs`: the API's own page. Its script and style are served from here: it works without a network."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import FileResponse

from mixbit.server.pages import FILES, SWAGGER

router = APIRouter(include_in_schema=False)


def _assets() -> Path:
    spec = find_spec("fastapi_offline")  # ships swagger-ui's files
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "static"


@router.get("/docs")
async def docs(request: Request) -> Response:
    """swagger-ui over /openapi.json."""
    return FILES["docs.html"].response(request)


@router.get("/docs/{name}")
async def asset(name: str) -> FileResponse:
    """swagger-ui's script or style."""
    if name not in SWAGGER:
        raise HTTPException(404)
    return FileResponse(_assets() / name, media_type=SWAGGER[name])
