"""Who gets in, and how much they may send."""

from __future__ import annotations

import asyncio
import hmac
import logging
from dataclasses import replace
from typing import Any

import httpx
import pytest

from mixbit.server.app import create_app
from mixbit.server.pages import PUBLIC_PATHS
from mixbit.server.security import Guard
from mixbit.server.service import Service, Services
from mixbit.server.settings import HTTP, LOOPBACK_HOSTS, Access
from tests.fakes import FakeEngine
from tests.server.support import HELLO, connect, error_of, served_model

CHAT = "/v1/chat/completions"
KEYED = Access(keys=("sesame", "clé"), hosts=LOOPBACK_HOSTS)


async def send(access: Access, method: str, path: str, **options: Any) -> httpx.Response:
    async with connect(FakeEngine(), access=access) as client:
        return await client.request(method, path, **options)


async def raw(access: Access, path: str, headers: list[tuple[bytes, bytes]], chunks: list[bytes] | None = None) -> int:
    """The status of a request whose scope is exactly as given, as no well-behaved client would send it."""
    app = create_app(Services((Service(FakeEngine(), served_model()),)), access)
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET" if chunks is None else "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8080),
    }
    sent: list[Any] = []
    left = list(chunks or [b""])

    async def receive() -> dict[str, Any]:
        if not left:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    async def put(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, put)
    return int(sent[0]["status"])


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("Bearer sesame", 200),
        ("bearer  sesame ", 200),
        ("Bearer clé", 200),
        ("Bearer wrong", 401),
        ("Bearer sesam", 401),
        ("Bearer ", 401),
        ("Basic sesame", 401),
        ("sesame", 401),
    ],
)
async def test_keys(header: str | None, status: int) -> None:
    headers = {} if header is None else {"authorization": header.encode()}
    for method, path in (("GET", "/v1/models"), ("POST", CHAT)):
        response = await send(KEYED, method, path, headers=headers, json={"messages": HELLO})
        assert response.status_code == status
        if status == 401:
            error = error_of(response)
            assert error["code"] == "invalid_api_key"
            assert "sesam" not in response.text
            assert response.headers["www-authenticate"] == "Bearer"


async def test_a_key_is_compared_with_every_known_one_whichever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return one == other

    monkeypatch.setattr(hmac, "compare_digest", compare)
    access = Access(keys=("first", "second", "third"))
    for key, status in (("first", 200), ("second", 200), ("third", 200), ("other", 401), ("firs", 401)):
        response = await send(access, "GET", "/v1/models", headers={"authorization": f"Bearer {key}"})
        assert (response.status_code, len(compared)) == (status, 3)
        assert {len(each) for pair in compared for each in pair} == {32}  # digests: the length of keys is not seen
        compared.clear()


@pytest.mark.parametrize(("key", "status"), [("sesame", 200), (" sesame ", 200), ("wrong", 401), ("", 401)])
async def test_keys_as_other_apis_send_them(key: str, status: int) -> None:
    response = await send(KEYED, "GET", "/v1/models", headers={"x-api-key": key})
    assert response.status_code == status


async def test_any_key_is_welcome_where_none_is_set() -> None:
    response = await send(Access(), "GET", "/v1/models", headers={"authorization": "Bearer whatever"})
    assert response.status_code == 200


async def test_only_health_and_pages_are_open() -> None:
    assert (await send(KEYED, "GET", "/health")).status_code == 200
    for path in ("/", "/docs", "/openapi.json", *PUBLIC_PATHS):
        response = await send(KEYED, "GET", path)
        assert response.status_code == 200, path
        assert "tiny" not in response.text, path  # the model's name
        assert (await send(KEYED, "POST", path, json={})).status_code == 401, path
    for path in (
        "/static",
        "/static/",
        "/static/none.js",
        "/static/main.js/",
        "/STATIC/main.js",
        "/static/%2e%2e/v1/models",
        "/docs/",
        "/docs/redoc.standalone.js",
        "/openapi.json/",
        "/metrics",
        "/props",
        "/v1/models/tiny/tensors",
        "/v1/models",
        "/health/",
        "/health/x",
        "/HEALTH",
        "/nothing",
    ):
        assert (await send(KEYED, "GET", path)).status_code == 401, path
    assert (await send(KEYED, "POST", "/health", json={})).status_code == 401
    for path in ("//", "//health", "/static/../props", "/static//main.js", "", "*"):
        assert await raw(KEYED, path, [(b"host", b"localhost")]) == 401, path


@pytest.mark.parametrize("host", [b"127.0.0.1/health?", b"localhost/health?x=", b"127.0.0.1:8080/health#", b"x/y?"])
async def test_a_host_header_with_a_path_opens_nothing(host: bytes) -> None:
    assert await raw(KEYED, "/v1/models", [(b"host", host)]) == 403
    anywhere = Access(keys=("sesame",), hosts=None)
    assert await raw(anywhere, "/v1/models", [(b"host", host)]) == 401


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("127.0.0.1:8080", 200),
        ("localhost:1", 200),
        ("LOCALHOST", 200),
        ("[::1]:8080", 200),
        ("evil.example", 403),
        ("evil.example:8080", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost:", 403),
        ("localhost:80:80", 403),
        ("", 403),
    ],
)
async def test_a_loopback_server_answers_to_local_names_alone(host: str, status: int) -> None:
    response = await send(Access(hosts=LOOPBACK_HOSTS), "GET", "/v1/models", headers={"host": host})
    assert response.status_code == status
    if status == 403:
        assert error_of(response)["code"] == "host_not_allowed"


async def test_no_or_two_host_headers_are_refused() -> None:
    access = Access(hosts=LOOPBACK_HOSTS)
    assert await raw(access, "/v1/models", [(b"host", b"localhost")]) == 200
    assert await raw(access, "/v1/models", []) == 403
    assert await raw(access, "/v1/models", [(b"host", b"localhost"), (b"host", b"evil.example")]) == 403


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:8080", 200),
        ("http://localhost:8080", 403),
        ("http://127.0.0.1:9999", 403),
        ("https://evil.example", 403),
        ("null", 403),
        ("https://friend.example", 200),
        ("https://friend.example.evil.example", 403),
    ],
)
async def test_foreign_origins_are_refused(origin: str, status: int) -> None:
    access = Access(hosts=LOOPBACK_HOSTS, origins=frozenset({"https://friend.example"}))
    response = await send(access, "POST", CHAT, headers={"origin": origin}, json={"messages": HELLO})
    assert response.status_code == status
    shared = response.headers.get("access-control-allow-origin")
    assert shared == (origin if "friend" in origin and status == 200 else None)


async def test_preflight_is_answered_for_allowed_origins_alone() -> None:
    access = Access(keys=("sesame",), hosts=LOOPBACK_HOSTS, origins=frozenset({"https://friend.example"}))
    ask = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    response = await send(access, "OPTIONS", CHAT, headers={"origin": "https://friend.example", **ask})
    assert response.status_code == 204
    assert response.headers["access-control-allow-origin"] == "https://friend.example"
    assert "POST" in response.headers["access-control-allow-methods"]
    assert "access-control-allow-credentials" not in response.headers
    response = await send(access, "OPTIONS", CHAT, headers={"origin": "https://evil.example", **ask})
    assert response.status_code == 403
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonx", ""])
async def test_posts_must_be_json(kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    response = await send(Access(), "POST", CHAT, headers=headers, content=b'{"messages": []}')
    assert (response.status_code, error_of(response)["code"]) == (415, "unsupported_media_type")


async def test_content_type_may_have_parameters() -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    content = b'{"messages": [{"role": "user", "content": "hi"}]}'
    assert (await send(Access(), "POST", CHAT, headers=headers, content=content)).status_code == 200


async def test_bodies_are_bounded_however_they_come() -> None:
    json_type, host = (b"content-type", b"application/json"), (b"host", b"localhost")
    large = HTTP.max_body_bytes + 1
    assert await raw(Access(), CHAT, [host, json_type, (b"content-length", str(large).encode())], [b"{}"]) == 413
    assert await raw(Access(), CHAT, [host, json_type, (b"content-length", b"9" * 500)], [b"{}"]) == 413
    piece = b" " * 2**20
    chunks = [piece] * (HTTP.max_body_bytes // len(piece)) + [b" ", b"{}"]
    assert await raw(Access(), CHAT, [host, json_type], chunks) == 413
    assert await raw(Access(), CHAT, [host, json_type, (b"content-length", b"2")], [b" " * large]) == 413


async def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.02)
        return {"type": "http.request", "body": b" ", "more_body": True}

    async def put(message: Any) -> None:
        sent.append(message)

    async def never(*_: Any) -> None:
        raise AssertionError("it must not get this far")

    guard = Guard(never, Access(), replace(HTTP, body_seconds=0.1))
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    await guard({"type": "http", "method": "POST", "path": CHAT, "headers": headers}, receive, put)
    assert sent[0]["status"] == 408


async def test_headers_are_bounded() -> None:
    response = await send(Access(), "GET", "/v1/models", headers={"x-long": "x" * HTTP.max_header_bytes})
    assert (response.status_code, error_of(response)["code"]) == (431, "headers_too_large")


async def test_prompts_and_keys_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    secret = "a very private question"
    body = {"messages": [{"role": "user", "content": secret}], "temperature": "wrong"}
    for part in (body, {**body, "temperature": 1}):
        await send(KEYED, "POST", CHAT, headers={"authorization": "Bearer sesame"}, json=part)
    await send(KEYED, "POST", CHAT, headers={"authorization": "Bearer sesame"}, content=secret.encode())
    lines = [record.getMessage() for record in caplog.records if record.name == "mixbit.server"]
    assert [line.split()[:3] for line in lines] == [["POST", CHAT, status] for status in ("400", "200", "415")]
    assert secret not in caplog.text
    assert "sesame" not in caplog.text
    assert "sesame" not in repr(KEYED)
