"""uvicorn around the application. Importing this takes a second: it is done while the worker loads."""

from __future__ import annotations

import contextlib
import math

import uvicorn
from starlette.types import ASGIApp

from mixbit.server.settings import HTTP


class Server(uvicorn.Server):
    """A server that leaves signals to the process around it."""

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        """Capture nothing."""
        return contextlib.nullcontext()


def make_server(app: ASGIApp) -> Server:
    """A server for `app`, not yet started."""
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=math.ceil(HTTP.shutdown_seconds) + 5,
        h11_max_incomplete_event_size=2 * HTTP.max_header_bytes,
    )
    return Server(config)
