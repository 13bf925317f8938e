"""Pages for people and their files, from `static/`: what a browser may fetch, and all that such a page may do."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources

from fastapi import Request, Response

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
)
# swagger-ui makes style elements and markup of its own.
_DOCS_POLICY = _POLICY.partition("; require-trusted-types-for")[0].replace(
    "style-src 'self'", "style-src 'self' 'unsafe-inline'"
)


@dataclass(frozen=True)
class StaticFile:
    """One file as it is sent."""

    body: bytes
    headers: dict[str, str]

    def response(self, request: Request) -> Response:
        """The file, or word that the browser has it already."""
        known = request.headers.get("if-none-match", "")
        return (
            Response(b"", 304, self.headers)
            if known == self.headers["etag"]
            else Response(self.body, 200, self.headers)
        )


def _read(name: str, body: bytes) -> StaticFile:
    headers = {
        "content-type": f"{_TYPES[name.rpartition('.')[2]]}; charset=utf-8",
        "etag": f'"{hashlib.sha256(body).hexdigest()[:32]}"',
        "cache-control": "no-cache",
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-resource-policy": "same-origin",
        "content-security-policy": _DOCS_POLICY if name == "docs.html" else _POLICY,
    }
    return StaticFile(body, headers)


# All in memory, so that no path of a request is ever one of the file system.
FILES = {
    file.name: _read(file.name, file.read_bytes())
    for file in (resources.files("mixbit.server") / "static").iterdir()
    if file.name.rpartition(".")[2] in _TYPES
}
SWAGGER = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}

# Nothing here tells of this machine, its model or its users: a browser has no key yet when it asks for a page.
PUBLIC_PATHS = frozenset(
    ["/", "/docs", "/openapi.json", *(f"/static/{name}" for name in FILES), *(f"/docs/{name}" for name in SWAGGER)]
)
