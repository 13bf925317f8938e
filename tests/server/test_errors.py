"""Every error is an OpenAI error, and wrong values are named."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from mixbit.engine.client import EngineState
from mixbit.engine.protocol import Generate, Progress
from tests.fakes import FakeEngine, Reply, refusal
from tests.server.support import HELLO, connect, error_of

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
JSON = {"content-type": "application/json"}


async def send(method: str, path: str, engine: FakeEngine | None = None, **options: Any) -> httpx.Response:
    async with connect(engine or FakeEngine()) as client:
        return await client.request(method, path, **options)


async def test_unknown_paths_and_methods() -> None:
    response = await send("GET", "/v1/nothing")
    assert (response.status_code, error_of(response)["code"]) == (404, "not_found")
    for path, meant in (("/chat/completions", CHAT), ("/v1/v1/messages", "/v1/messages"), ("/v1/infill", "/infill")):
        response = await send("POST", path, json={})
        assert (response.status_code, error_of(response)["code"]) == (404, "not_found")
        assert f"Is {meant} meant?" in error_of(response)["message"]
    response = await send("GET", CHAT)
    assert (response.status_code, error_of(response)["code"]) == (405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"messages": [}',
        b"\xff\xfe",
        b'{"temperature": NaN}',
        b'{"n": ' + b"9" * 5000 + b"}",
        b'{"prompt": "\\ud800"}',
        b"[" * 100_000,
        b"[" * 100 + b"]" * 100,
        b'{"a":' * 100 + b"1" + b"}" * 100,
    ],
)
async def test_bodies_that_are_not_sound_json(content: bytes) -> None:
    for path in (CHAT, TEXT):
        response = await send("POST", path, content=content, headers=JSON)
        assert response.status_code == 400, content[:50]
        assert error_of(response)["code"] == "invalid_json"


@pytest.mark.parametrize("content", [b"[]", b"5", b"null", b'"x"', b"true"])
async def test_bodies_that_are_not_objects(content: bytes) -> None:
    response = await send("POST", CHAT, content=content, headers=JSON)
    assert response.status_code == 400
    assert "object" in error_of(response)["message"]


async def test_pairs_of_surrogates_are_characters() -> None:
    engine = FakeEngine()
    response = await send("POST", TEXT, engine, content=b'{"prompt": "\\ud83d\\ude00"}', headers=JSON)
    assert response.status_code == 200
    assert engine.requests[0].prompt == "😀"


WRONG: list[tuple[str, Any]] = [
    ("temperature", "0.5"),
    ("temperature", True),
    ("temperature", -0.1),
    ("temperature", 2.5),
    ("temperature", 1e999),
    ("top_p", 1.5),
    ("top_p", []),
    ("n", 0),
    ("n", -1),
    ("n", 10**9),
    ("n", 10**30),
    ("n", 1.5),
    ("n", True),
    ("seed", "x"),
    ("seed", 2**63),
    ("seed", -(2**63) - 1),
    ("max_tokens", 0),
    ("max_tokens", -5),
    ("max_tokens", 2**31),
    ("max_tokens", 10**40),
    ("presence_penalty", 3),
    ("frequency_penalty", -3),
    ("stop", 5),
    ("stop", ""),
    ("stop", ["x"] * 1000),
    ("stop", "x" * 100_000),
    ("stream", "yes"),
    ("stream", 1),
    ("stream_options", True),
    ("model", 5),
    ("logit_bias", []),
    ("logit_bias", {str(n): 1 for n in range(5000)}),
    ("top_k", -2),
    ("top_k", 2**40),
    ("min_p", 2),
    ("repetition_penalty", 0),
    ("ignore_eos", "no"),
]
WRONG_CHAT: list[tuple[str, Any]] = [
    ("max_completion_tokens", -1),
    ("top_logprobs", 1000),
    ("logprobs", 3),
    ("tools", "x"),
    ("tools", [{"type": "function", "function": {"name": "f"}}] * 1000),
    ("messages", HELLO * 5000),
    ("chat_template_kwargs", {f"k{n}": 1 for n in range(100)}),
    ("chat_template_kwargs", []),
    ("tool_choice", "maybe"),
    ("reasoning_effort", "huge"),
    ("response_format", "json"),
]


@pytest.mark.parametrize(("name", "value"), WRONG + WRONG_CHAT)
async def test_wrong_values_in_chat(name: str, value: Any) -> None:
    await _refused(CHAT, {"messages": HELLO, name: value}, name)


@pytest.mark.parametrize(("name", "value"), WRONG)
async def test_wrong_values_in_completions(name: str, value: Any) -> None:
    await _refused(TEXT, {"prompt": "x", name: value}, name)


async def _refused(path: str, body: dict[str, Any], name: str) -> None:
    engine = FakeEngine()
    response = await send("POST", path, engine, content=json.dumps(body).replace("Infinity", "1e999"), headers=JSON)
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert (error["param"] or "").split("[")[0].split(".")[0] == name, error
    assert error["type"] == "invalid_request_error"
    assert not engine.requests


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "/etc/passwd", "org/../tiny", "./tiny", "tiny/", "TINY", "tiny\x00", "", "~", "x" * 5000],
)
async def test_model_ids_are_names_and_never_paths(name: str) -> None:
    engine = FakeEngine()
    bodies: dict[str, dict[str, Any]] = {
        CHAT: {"messages": HELLO},
        TEXT: {"prompt": "x"},
        "/v1/responses": {"input": "x"},
        "/v1/embeddings": {"input": "x"},
        "/infill": {"input_prefix": "x"},
        "/v1/messages": {"messages": HELLO, "max_tokens": 5},
        "/v1/messages/count_tokens": {"messages": HELLO},
    }
    for path, body in bodies.items():
        response = await send("POST", path, engine, json={**body, "model": name})
        assert response.status_code == 404, path
        assert len(response.text) < 500
    if name:
        response = await send("GET", f"/v1/models/{quote(name, safe='')}", engine)
        assert (response.status_code, error_of(response)["code"]) == (404, "model_not_found")
    assert not engine.requests


@pytest.mark.parametrize("key", ["x", "-1", "1.5", "", "99999999999999999999", "²"])
async def test_logit_bias_is_keyed_by_tokens(key: str) -> None:
    await _refused(CHAT, {"messages": HELLO, "logit_bias": {key: 1}}, "logit_bias")
    await _refused(CHAT, {"messages": HELLO, "logit_bias": {"1": 101}}, "logit_bias")


async def test_a_crash_is_a_500_that_says_nothing_of_the_inside(caplog: pytest.LogCaptureFixture) -> None:
    def crash(_: Generate) -> Reply:
        raise RuntimeError("the secret of the inside")

    response = await send("POST", CHAT, FakeEngine(crash), json={"messages": HELLO})
    assert response.status_code == 500
    error = error_of(response)
    assert (error["type"], error["code"]) == ("server_error", "internal_error")
    assert "secret" not in response.text


@pytest.mark.parametrize(
    ("state", "code"),
    [
        (EngineState.STARTING, "model_loading"),
        (EngineState.LOADING, "model_loading"),
        (EngineState.RESTARTING, "engine_restarting"),
        (EngineState.FAILED, "engine_failed"),
    ],
)
async def test_503_with_retry_after_until_the_engine_is_ready(state: EngineState, code: str) -> None:
    engine = FakeEngine(state=state, ready=None, progress=Progress(stage="reading", done=1, total=4))
    for path, body in ((CHAT, {"messages": HELLO}), (TEXT, {"prompt": "x"})):
        response = await send("POST", path, engine, json=body)
        assert (response.status_code, error_of(response)["code"]) == (503, code)
        assert int(response.headers["retry-after"]) > 0
    response = await send("GET", "/health", engine)
    assert response.status_code == 503
    assert response.json()["status"] in {"loading", "restarting", "failed"}
    assert (await send("GET", "/v1/models", engine)).json()["data"][0]["context_length"] is None


async def test_health_and_models_when_ready() -> None:
    assert (await send("GET", "/health")).json() == {"status": "ok", "detail": None}
    models = (await send("GET", "/v1/models")).json()
    assert [each["id"] for each in models["data"]] == ["org/tiny", "tiny"]
    assert models["data"][0]["context_length"] == models["data"][0]["max_model_len"] == 4096
    for path in ("/v1/models/org/tiny", "/v1/models/org%2Ftiny"):
        assert (await send("GET", path)).json() == models["data"][0]
    for path in ("/v1/models/other", "/v1/models/..%2F..%2Fetc%2Fpasswd"):
        response = await send("GET", path)
        assert (response.status_code, error_of(response)["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("code", "status", "retry"),
    [
        ("context_length_exceeded", 400, False),
        ("invalid_value", 400, False),
        ("queue_full", 429, True),
        ("insufficient_memory", 503, True),
        ("worker_died", 503, True),
        ("not_ready", 503, True),
        ("internal_error", 500, False),
    ],
)
async def test_refusals_of_the_engine(code: Any, status: int, retry: bool) -> None:
    for path, body in ((CHAT, {"messages": HELLO}), (TEXT, {"prompt": ["x", "y"]})):
        response = await send("POST", path, FakeEngine(refusal(code, "because", "logit_bias")), json=body)
        error = error_of(response)
        assert (response.status_code, error["code"], error["message"]) == (status, code, "because")
        assert ("retry-after" in response.headers) == retry
