"""What clients do to connections: slow headers, slow bodies, header bombs; against sockets of a real HTTP server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from mixbit.server.app import create_app
from mixbit.server.service import Service, Services
from mixbit.server.serving import listen
from mixbit.server.settings import HTTP
from mixbit.server.web import make_server
from tests.fakes import FakeEngine, Reply
from tests.server.support import LOCAL, served_model

SECONDS = 0.4
REQUEST = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"


@asynccontextmanager
async def serving() -> AsyncIterator[int]:
    """A server over a fake engine; its port."""
    with listen("127.0.0.1", 0) as sock:
        app = create_app(Services((Service(FakeEngine(), served_model()),)), LOCAL)
        server = make_server(app, header_seconds=SECONDS)
        task = asyncio.create_task(server.serve(sockets=[sock]))
        try:
            yield sock.getsockname()[1]
        finally:
            server.should_exit = True
            await task


@asynccontextmanager
async def connection(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def answer(reader: asyncio.StreamReader) -> bytes:
    """One whole answer that has a content-length."""
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
    length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"content-length"))
    return head + await reader.readexactly(length)


async def hung_up(reader: asyncio.StreamReader) -> bool:
    """Whether the server hangs up without a word."""
    try:
        return await asyncio.wait_for(reader.read(), 10) == b""
    except ConnectionResetError:
        return True


async def drip(writer: asyncio.StreamWriter) -> None:
    """A header line now and then, for as long as anyone listens."""
    while not writer.is_closing():
        writer.write(b"X-a: b\r\n")
        await asyncio.sleep(SECONDS / 8)


@pytest.mark.parametrize("begun", [b"", b"G", b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n"])
async def test_headers_that_stop_are_not_waited_for(begun: bytes) -> None:
    async with serving() as port, connection(port) as (reader, writer):
        writer.write(begun)
        assert await hung_up(reader)


@pytest.mark.parametrize("first", [b"", REQUEST])
async def test_headers_that_drip_are_not_waited_for(first: bytes) -> None:
    async with serving() as port, connection(port) as (reader, writer):
        if first:
            writer.write(first)
            assert b"200 OK" in await answer(reader)
        writer.write(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n")
        dripping = asyncio.create_task(drip(writer))
        assert await hung_up(reader)
        dripping.cancel()


async def test_quiet_connections_stay_open_between_requests() -> None:
    async with serving() as port, connection(port) as (reader, writer):
        for pause in (0.0, 2 * SECONDS, 0.0):
            await asyncio.sleep(pause or SECONDS / 4)
            writer.write(REQUEST)
            assert b"200 OK" in await answer(reader)


async def test_a_slow_answer_is_not_cut_off() -> None:
    with listen("127.0.0.1", 0) as sock:
        engine = FakeEngine(Reply(["a", "b", "c"], delay=SECONDS))
        server = make_server(create_app(Services((Service(engine, served_model()),)), LOCAL), header_seconds=SECONDS)
        task = asyncio.create_task(server.serve(sockets=[sock]))
        async with connection(sock.getsockname()[1]) as (reader, writer):
            body = b'{"prompt": "x"}'
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            assert b'"text":"abc"' in await answer(reader)
        server.should_exit = True
        await task


async def test_a_server_of_slow_clients_serves_the_others() -> None:
    async with serving() as port:
        slow = [await asyncio.open_connection("127.0.0.1", port) for _ in range(100)]
        for _, writer in slow:
            writer.write(b"GET / HTTP/1.1\r\n")
        async with connection(port) as (reader, writer):
            writer.write(REQUEST)
            assert b"200 OK" in await answer(reader)
        assert all(await asyncio.gather(*(hung_up(reader) for reader, _ in slow)))
        for _, writer in slow:
            writer.close()


@pytest.mark.parametrize(
    "headers",
    [
        b"X-long: " + b"x" * (4 * HTTP.max_header_bytes),
        b"\r\n".join(b"X-%d: y" % number for number in range(20_000)),
        b"x" * (4 * HTTP.max_header_bytes),
    ],
)
async def test_header_bombs_are_refused_before_they_end(headers: bytes) -> None:
    async with serving() as port:
        async with connection(port) as (reader, writer):
            writer.write(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n" + headers)
            try:
                status = (await asyncio.wait_for(reader.readline(), 10)).split()[1:2]
            except ConnectionResetError:
                status = []
            assert status in ([b"400"], [b"431"], [])
        async with connection(port) as (reader, writer):
            writer.write(REQUEST)
            assert b"200 OK" in await answer(reader)


@pytest.mark.parametrize(
    "request_",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20,  # TLS
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\n\r\n",
    ],
)
async def test_nonsense_is_refused(request_: bytes) -> None:
    async with serving() as port, connection(port) as (reader, writer):
        writer.write(request_)
        line = await asyncio.wait_for(reader.readline(), 10)
        assert line.split()[1:2] in ([b"400"], [b"403"], [b"415"]), line
