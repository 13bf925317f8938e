"""Server-sent events, and what a client that hangs up does to the work done for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mixbit.server.errors import ApiError, error_object

log = logging.getLogger("mixbit.server")
T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
KEEPALIVE = b": keepalive\n\n"


def event(data: object) -> bytes:
    """One event with `data` as JSON."""
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


def typed_event(data: dict[str, Any]) -> bytes:
    """One event under the name that `data` has as its `type`."""
    return f"event: {data['type']}\n".encode() + event(data)


def error_event(error: ApiError) -> bytes:
    """What a stream says when it cannot go on."""
    return event(error_object(error))


def error_events(error: ApiError) -> bytes:
    """How a stream of OpenAI's form ends that cannot go on."""
    return error_event(error) + DONE


class Disconnected(Exception):  # noqa: N818
    """The client hung up."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run `work` for as long as the client listens; else cancel it and raise Disconnected."""

    async def hang_up() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(hang_up())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Disconnected
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class EventStream(Response):
    """An answer of events: headers at once, comments while there is silence.

    An error that `events` does not handle itself is logged and becomes what `broken` makes of it.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        keepalive_seconds: float,
        broken: Callable[[ApiError], bytes] = error_events,
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.events, self._pause, self._broken = events, keepalive_seconds, broken
        self._last = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send headers and events; stop the work if the client hangs up."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await while_connected(receive, self._send_all(send))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except Disconnected:
            pass
        finally:
            await self.events.aclose()

    async def _send_all(self, send: Send) -> None:
        clock = asyncio.get_running_loop().time

        async def put(data: bytes) -> None:
            self._last = clock()
            await send({"type": "http.response.body", "body": data, "more_body": True})

        async def keep_alive() -> None:
            while True:
                await asyncio.sleep(max(0.0, self._last + self._pause - clock()))
                if clock() - self._last >= self._pause:
                    await put(KEEPALIVE)

        self._last = clock()
        alive = asyncio.ensure_future(keep_alive())
        try:
            async with aclosing(self.events):
                async for data in self.events:
                    await put(data)
        except Exception:
            log.exception("a stream broke off")
            await put(
                self._broken(
                    ApiError(500, "The server failed on this request; its log says why.", code="internal_error")
                )
            )
        finally:
            alive.cancel()
