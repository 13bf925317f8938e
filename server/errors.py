"""Errors as OpenAI's clients expect them: `{"error": {"message", "type", "param", "code"}}` for everything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match

ANTHROPIC = "/v1/messages"  # paths from here on speak Anthropic's form

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 503: "service_unavailable"}


class ApiError(HTTPException):
    """A refusal with all that the client is told.

    param: the request field it is about, e.g. `messages[0].content`. code: a word for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.param = param
        self.code = code


def invalid(message: str, param: str | None, code: str | None = "invalid_value") -> ApiError:
    """A 400 about one field."""
    return ApiError(400, message, param=param, code=code)


def error_object(error: HTTPException) -> dict[str, Any]:
    """The body of an error answer, or of an error event in a stream."""
    status = error.status_code
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    param, code = (error.param, error.code) if isinstance(error, ApiError) else (None, None)
    return {"error": {"message": str(error.detail), "type": kind, "param": param, "code": code}}


_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def anthropic_error(error: HTTPException) -> dict[str, Any]:
    """The same as Anthropic's clients expect it."""
    status = error.status_code
    kind = _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": str(error.detail)}}


def error_response(error: HTTPException, path: str) -> Response:
    """The answer for `error`, in the form of the API that `path` belongs to."""
    anthropic = path == ANTHROPIC or path.startswith(f"{ANTHROPIC}/")
    return Response(
        msgspec.json.encode(anthropic_error(error) if anthropic else error_object(error)),
        error.status_code,
        dict(error.headers or {}),
        media_type="application/json",
    )


def install(app: FastAPI) -> None:
    """Make every error of `app` an OpenAI error."""
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(Exception, _on_crash)


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if not isinstance(error, ApiError):  # made by the framework: no route, wrong method
        path = request.scope["path"][:200]
        text = {
            404: f"No such endpoint: {request.method} {path}. {_other_path(request, path)}",
            405: f"{request.method} is not allowed on {path}.",
        }.get(error.status_code, str(error.detail))
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        error = ApiError(error.status_code, text, code=code, headers=error.headers)
    return error_response(error, request.scope["path"])


def _other_path(request: Request, path: str) -> str:
    """What may have been meant: a client was given the address with `/v1` too few or too many."""
    for other in (f"/v1{path}", path.removeprefix("/v1")):
        scope = {**request.scope, "path": other}
        if other not in {path, "", "/"} and any(route.matches(scope)[0] is Match.FULL for route in request.app.routes):
            return f"Is {other} meant? Look at the client's base URL."
    return "See /docs for those there are."


async def _on_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(validation_error(error.errors(), error.body), request.scope["path"])


async def _on_crash(request: Request, error: Exception) -> Response:
    crash = ApiError(500, "The server failed on this request; its log says why.", code="internal_error")
    return error_response(crash, request.scope["path"])


def validation_error(problems: Iterable[Mapping[str, Any]], body: Any) -> ApiError:
    """One error out of pydantic's list.

    The alternatives of a union each report; what got deepest into the body is what the client meant.
    """
    found: dict[str, list[str]] = {}
    depths: dict[str, int] = {}
    codes: dict[str, str] = {}
    for problem in problems:
        param, depth = _locate(problem, body)
        found.setdefault(param, []).append(_say(problem))
        depths[param] = depth
        missing = problem["type"] == "missing"
        codes.setdefault(param, "missing_required_parameter" if missing else "invalid_value")
    param = max(found, key=lambda name: depths[name])
    if not param:
        return invalid("The request body must be a JSON object.", None)
    return invalid(f"Invalid '{param}': {' or '.join(dict.fromkeys(found[param]))}.", param, codes[param])


def _locate(problem: Mapping[str, Any], body: Any) -> tuple[str, int]:
    """The field as a path such as `messages[0].content`, leaving out pydantic's names of union members."""
    loc: Sequence[str | int] = problem["loc"]
    if loc and loc[0] != "body":
        return str(loc[-1]), 1
    steps: list[str | int] = []
    value = body
    for position, step in enumerate(loc[1:], start=2):
        in_dict = isinstance(value, dict) and step in value
        in_list = isinstance(value, list) and isinstance(step, int) and step < len(value)
        missing = isinstance(value, dict) and position == len(loc) and problem["type"] == "missing"
        if in_dict or in_list:
            value = value[step]
        if in_dict or in_list or missing:
            steps.append(step)
    if problem["type"].startswith("union_tag"):
        steps.append(str(problem["ctx"]["discriminator"]).strip("'"))
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
    return path.lstrip("."), len(steps)


def _say(problem: Mapping[str, Any]) -> str:
    if problem["type"] == "union_tag_invalid":
        return f"{problem['ctx']['tag']!r} is not supported; use one of {problem['ctx']['expected_tags']}"
    text = str(problem["msg"]).replace(" after validation", "").rstrip(".")
    return text[:1].lower() + text[1:]
