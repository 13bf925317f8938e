"""What every request passes before it reaches a route: size of headers, Host, Origin, key, content type, body.

A plain ASGI layer around the whole application. It decides by the scope alone, never by a URL rebuilt from
headers. Only `GET /health` and the files of the pages are open, each by its exact path, so no form of a path or
Host header leads around the key.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import Iterable
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mixbit.server.errors import ApiError, error_response
from mixbit.server.pages import PUBLIC_PATHS
from mixbit.server.settings import HTTP, Access, HttpLimits

_OPEN = PUBLIC_PATHS | {"/health"}  # to everyone


class Guard:
    """Checks requests by `access` and `limits`."""

    def __init__(self, app: ASGIApp, access: Access, limits: HttpLimits = HTTP) -> None:
        self._app, self._access, self._limits = app, access, limits
        self._keys = [_digest(key.encode()) for key in access.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it with what is wrong."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        shared = self._may_share(headers.get("origin"))

        async def share(message: Message) -> None:
            if message["type"] == "http.response.start" and shared:
                allow = (b"access-control-allow-origin", headers["origin"].encode("latin-1"))
                message = {**message, "headers": [*message.get("headers", ()), allow, (b"vary", b"Origin")]}
            await send(message)

        try:
            self._check(scope, headers)
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers and shared:
                await _preflight(headers)(scope, receive, share)
                return
            self._check_key(scope, headers)
            if scope["method"] in {"POST", "PUT", "PATCH"}:
                receive = await self._read(headers, receive)
            await self._app(scope, receive, share)
        except ApiError as error:
            await error_response(error, scope["path"])(scope, receive, share)

    def _check(self, scope: Scope, headers: Headers) -> None:
        if sum(len(name) + len(value) for name, value in scope["headers"]) > self._limits.max_header_bytes:
            raise ApiError(431, f"The headers exceed {self._limits.max_header_bytes} bytes.", code="headers_too_large")
        hosts = headers.getlist("host")
        host = _without_port(hosts[0].lower()) if len(hosts) == 1 else ""
        allowed = self._access.hosts
        if allowed is not None and host not in allowed:
            raise ApiError(
                403,
                "The Host header is not one of this server's names "
                f"({', '.join(sorted(allowed))}); --allow-host adds a name.",
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        same = len(hosts) == 1 and origin in {f"http://{hosts[0]}", f"https://{hosts[0]}"}
        if origin is not None and not same and not self._may_share(origin):
            raise ApiError(
                403,
                "Pages of other origins may not use this server; --allow-origin allows one.",
                code="origin_not_allowed",
            )

    def _may_share(self, origin: str | None) -> bool:
        return origin is not None and bool(self._access.origins & {origin, "*"})

    def _check_key(self, scope: Scope, headers: Headers) -> None:
        if not self._keys or (scope["path"] in _OPEN and scope["method"] in {"GET", "HEAD"}):
            return
        kind, _, key = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer":
            key = headers.get("x-api-key", "")  # as Anthropic's and llama.cpp's clients send it
        given = _digest(key.strip().encode("latin-1")) if key.strip() else b""
        # Every key is compared, each in constant time, so that the time says nothing.
        if not sum([hmac.compare_digest(given, known) for known in self._keys]):
            text = "The API key is wrong." if given else "An API key is needed: send 'Authorization: Bearer KEY'."
            raise ApiError(401, text, code="invalid_api_key", headers={"www-authenticate": "Bearer"})

    async def _read(self, headers: Headers, receive: Receive) -> Receive:
        """The whole body, bounded in size, time and depth; then a `receive` that gives it again."""
        media = headers.get("content-type", "").partition(";")[0].strip().lower()
        if media != "application/json":
            raise ApiError(415, "The content type must be application/json.", code="unsupported_media_type")
        limit = self._limits.max_body_bytes
        too_large = ApiError(413, f"The body exceeds {limit} bytes.", code="body_too_large")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        break
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise too_large
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            seconds = self._limits.body_seconds
            raise ApiError(408, f"The body did not come within {seconds:g} s.", code="timeout") from None
        check_json(bytes(body), self._limits.max_json_depth)
        return _replay(bytes(body), receive)


def _replay(body: bytes, receive: Receive) -> Receive:
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def check_json(body: bytes, max_depth: int) -> None:
    """Raise a 400 unless `body` is JSON of finite numbers, nested no deeper than `max_depth`."""
    try:
        value = json.loads(body, parse_constant=_no_constant)
        if b"\\ud" in body.lower():  # half of a surrogate pair is not a character
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise _too_deep(max_depth) from None
    except ValueError as error:  # also no UTF-8, half a surrogate pair, an integer of thousands of digits
        where = f"{error.msg} at character {error.pos}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise ApiError(400, f"The body is not valid JSON: {where[:200]}.", code="invalid_json") from None
    level: list[Any] = [value]
    for _ in range(max_depth + 1):
        level = [inner for outer in level for inner in _children(outer)]
        if not level:
            return
    raise _too_deep(max_depth)


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _too_deep(limit: int) -> ApiError:
    return ApiError(400, f"The body is nested deeper than {limit} levels.", code="invalid_json")


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _preflight(headers: Headers) -> Response:
    return Response(
        status_code=204,
        headers={
            "access-control-allow-methods": "GET, POST",
            "access-control-allow-headers": headers.get(
                "access-control-request-headers", "authorization, content-type"
            ),
            "access-control-max-age": "600",
        },
    )


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdecimal() else host


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
