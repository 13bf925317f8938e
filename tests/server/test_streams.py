"""Streams over time: silence, clients that hang up, engines that break."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from mixbit.server import answer, sse
from mixbit.server.app import create_app
from mixbit.server.service import Service, Services
from mixbit.server.settings import HTTP, Access
from tests.fakes import FakeEngine, Reply
from tests.server.support import HELLO, served_model


class Connection:
    """One POST to the application, seen as a server sees it: message by message."""

    def __init__(self, engine: FakeEngine, **body: Any) -> None:
        app = create_app(Services((Service(engine, served_model()),)), Access())
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/v1/chat/completions",
            "raw_path": b"/v1/chat/completions",
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8080),
        }
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        content = json.dumps({"messages": HELLO, **body}).encode()
        self._incoming.put_nowait({"type": "http.request", "body": content})
        self.sent: asyncio.Queue[Any] = asyncio.Queue()
        self.task = asyncio.ensure_future(app(scope, self._incoming.get, self.sent.put))

    def hang_up(self) -> None:
        self._incoming.put_nowait({"type": "http.disconnect"})

    async def next(self) -> Any:
        return await asyncio.wait_for(self.sent.get(), 5)

    async def over(self) -> None:
        await asyncio.wait_for(self.task, 5)


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


async def test_headers_come_before_the_first_token() -> None:
    connection = Connection(FakeEngine(Reply([], hang=True)), stream=True)
    start = await connection.next()
    assert (start["type"], start["status"]) == ("http.response.start", 200)
    headers = dict(start["headers"])
    assert headers[b"content-type"].startswith(b"text/event-stream")
    assert headers[b"cache-control"] == b"no-cache"
    assert b"content-length" not in headers
    connection.hang_up()
    await connection.over()


async def test_silence_is_filled_with_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer, "HTTP", HTTP.__class__(**{**HTTP.__dict__, "keepalive_seconds": 0.02}))
    connection = Connection(FakeEngine(Reply([], hang=True)), stream=True)
    await connection.next()
    assert b'"role":"assistant"' in (await connection.next())["body"]
    for _ in range(3):
        assert (await connection.next())["body"] == b": keepalive\n\n"
    connection.hang_up()
    await connection.over()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_hangs_up_frees_everything(stream: bool, n: int) -> None:
    engine = FakeEngine(Reply(["a"], hang=True))
    connection = Connection(engine, stream=stream, n=n)
    await until(lambda: len(engine.running) == n)
    if stream:
        await connection.next()
    connection.hang_up()
    await connection.over()
    assert not engine.running
    assert len(engine.aborted) == n


async def test_a_finished_stream_aborts_nothing() -> None:
    engine = FakeEngine()
    connection = Connection(engine, stream=True, n=2)
    await connection.over()
    messages = [connection.sent.get_nowait() for _ in range(connection.sent.qsize())]
    assert messages[-1] == {"type": "http.response.body", "body": b"", "more_body": False}
    assert messages[-2]["body"] == b"data: [DONE]\n\n"
    assert not engine.aborted


async def test_a_task_that_is_cancelled_frees_everything() -> None:
    engine = FakeEngine(Reply(["a"], hang=True))
    connection = Connection(engine, stream=True)
    await until(lambda: engine.running)
    connection.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await connection.over()
    assert not engine.running


async def test_a_fault_of_our_own_ends_the_stream_with_an_error(caplog: pytest.LogCaptureFixture) -> None:
    async def broken() -> AsyncGenerator[bytes, None]:
        yield sse.event({"x": 1})
        raise RuntimeError("inside")

    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    async def send(message: Any) -> None:
        sent.append(message)

    await sse.EventStream(broken(), 10.0)({"type": "http"}, receive, send)
    error = json.loads(sent[2]["body"].split(b"\n\n")[0][6:])
    assert error["error"]["code"] == "internal_error"
    assert "inside" not in str(sent)
    assert sent[2]["body"].endswith(sse.DONE)
    assert "inside" in caplog.text


async def test_no_choice_starves_another() -> None:
    engine = FakeEngine(
        lambda request: Reply(["x"] * 3, delay=0.001) if request.request_id.endswith("-0") else Reply(["y"], hang=True)
    )
    connection = Connection(engine, stream=True, n=2)
    seen = b""
    while b'"finish_reason":"stop"' not in seen:
        seen += (await connection.next()).get("body", b"")
    assert b'"content":"y"' in seen
    connection.hang_up()
    await connection.over()
