"""uvicorn around the application. Importing this takes a second: it is done while the worker loads."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from mixbit.server.settings import HTTP


class Server(uvicorn.Server):
    """A server that leaves signals to the process around it."""

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        """Capture nothing."""
        return contextlib.nullcontext()


class Protocol(H11Protocol):
    """HTTP/1.1 that hangs up on a client that does not finish the headers of its request in time.

    uvicorn itself bounds the pause between requests alone, so that a client that sends a byte now and then
    would hold its connection for ever.
    """

    def __init__(self, *args: Any, header_seconds: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_seconds = header_seconds
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Wait for the rest of the headers, if this was part of them."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """What has come of the next request counts from here."""
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """There is nothing to wait for."""
        self._unwatch()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Let time run while headers are awaited; between requests only keep-alive's does."""
        waiting = self.conn.their_state is h11.IDLE and self.timeout_keep_alive_task is None
        if waiting and self._deadline is None:
            self._deadline = self.loop.call_later(self._header_seconds, self.transport.close)
        elif not waiting:
            self._unwatch()

    def _unwatch(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def make_server(
    app: ASGIApp, shutdown_seconds: float = HTTP.shutdown_seconds, header_seconds: float = HTTP.header_seconds
) -> Server:
    """A server for `app`, not yet started."""
    config = uvicorn.Config(
        app,
        http=functools.partial(Protocol, header_seconds=header_seconds),  # type: ignore[arg-type]
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=math.ceil(shutdown_seconds) + 5,
        h11_max_incomplete_event_size=2 * HTTP.max_header_bytes,
    )
    return Server(config)
