"""`GET /docs`: the API's own page. Its script and style are served from here: it works without a network."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from fastapi import APIRouter, HTTPException, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse

router = APIRouter(include_in_schema=False)

_TYPES = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}


def _assets() -> Path:
    spec = find_spec("fastapi_offline")  # ships swagger-ui's files
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "static"


@router.get("/docs")
async def docs(request: Request) -> HTMLResponse:
    """swagger-ui over /openapi.json."""
    return get_swagger_ui_html(
        openapi_url=request.app.openapi_url,
        title=f"{request.app.title} API",
        swagger_js_url="/docs/swagger-ui-bundle.js",
        swagger_css_url="/docs/swagger-ui.css",
        swagger_favicon_url="data:,",
    )


@router.get("/docs/{name}")
async def asset(name: str) -> FileResponse:
    """The page's script or style."""
    if name not in _TYPES:
        raise HTTPException(404)
    return FileResponse(_assets() / name, media_type=_TYPES[name])
