"""`GET /`: the page for people, and its files."""

from __future__ import annotations

from fastapi import APIRouter, HTTPException, Request, Response

from mixbit.server.pages import FILES

router = APIRouter(include_in_schema=False)


@router.get("/")
@router.head("/")  # agents look whether someone is there
async def page(request: Request) -> Response:
    """Chat, and the model as it is."""
    return FILES["index.html"].response(request)


@router.get("/static/{name}")
async def static(name: str, request: Request) -> Response:
    """A script, style or picture of a page."""
    if name not in FILES:
        raise HTTPException(404)
    return FILES[name].response(request)
