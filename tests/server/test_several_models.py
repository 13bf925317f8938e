"""Several models behind one address: who answers, and who is left alone when one falls."""

from __future__ import annotations

import asyncio
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from mixbit.engine.client import EngineState, RequestRefused
from mixbit.server import answer
from mixbit.server.app import create_app
from mixbit.server.service import Service, Services
from mixbit.server.settings import HTTP
from tests.checkpoints import write_checkpoint
from tests.fakes import FakeEngine, Reply
from tests.server.running import RunningServer, run, start, until
from tests.server.support import HELLO, LOCAL, error_of, served_model

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def two(first: FakeEngine, second: FakeEngine) -> httpx.AsyncClient:
    one = served_model()
    services = Services((Service(first, one), Service(second, replace(one, names=("coder", "autocomplete")))))
    transport = httpx.ASGITransport(create_app(services, LOCAL), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8080")


@pytest.mark.parametrize(
    ("model", "answer", "named"),
    [
        (None, "one", "org/tiny"),
        ("tiny", "one", "org/tiny"),
        ("coder", "two", "coder"),
        ("autocomplete", "two", "coder"),
    ],
)
async def test_the_model_named_answers(model: str | None, answer: str, named: str) -> None:
    async with two(FakeEngine(Reply(["one"])), FakeEngine(Reply(["two"]))) as client:
        body: dict[str, Any] = {"messages": HELLO} | ({} if model is None else {"model": model})
        said = (await client.post(CHAT, json=body)).json()
    assert (said["choices"][0]["message"]["content"], said["model"]) == (answer, named)


async def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    async with two(FakeEngine(), FakeEngine()) as client:
        response = await client.post(CHAT, json={"model": "gpt", "messages": HELLO})
    assert response.status_code == 404
    for name in ("gpt", "org/tiny", "tiny", "coder", "autocomplete"):
        assert repr(name) in error_of(response)["message"]


async def test_all_names_are_listed() -> None:
    async with two(FakeEngine(), FakeEngine()) as client:
        listed = (await client.get("/v1/models")).json()["data"]
        assert [each["id"] for each in listed] == ["org/tiny", "tiny", "coder", "autocomplete"]
        assert (await client.get("/v1/models/autocomplete")).json()["id"] == "autocomplete"
        assert (await client.get("/props", params={"model": "coder"})).json()["model_alias"] == "coder"
        assert (await client.get("/props")).json()["model_alias"] == "org/tiny"


async def test_tokens_are_those_of_the_model_named() -> None:
    async with two(FakeEngine(), FakeEngine(state=EngineState.FAILED)) as client:
        assert (await client.post("/tokenize", json={"content": "a"})).status_code == 200
        assert (await client.post("/tokenize", json={"content": "a", "model": "coder"})).status_code == 503


@pytest.mark.parametrize(
    ("state", "status", "word"),
    [
        (EngineState.READY, 200, "ok"),
        (EngineState.UNLOADED, 200, "ok"),
        (EngineState.LOADING, 503, "loading"),
        (EngineState.RESTARTING, 503, "restarting"),
        (EngineState.FAILED, 503, "failed"),
    ],
)
async def test_health_is_that_of_the_worst(state: EngineState, status: int, word: str) -> None:
    async with two(FakeEngine(), FakeEngine(state=state, ready=None)) as client:
        response = await client.get("/health")
    assert (response.status_code, response.json()["status"]) == (status, word)


async def test_an_unloaded_model_takes_requests_if_they_bring_it_back() -> None:
    class Sleeping(FakeEngine):
        async def generate(self, request: Any) -> Any:
            self.state = EngineState.READY
            return await super().generate(request)

    asleep = Sleeping(Reply(["awake"]), state=EngineState.UNLOADED, on_demand=True)
    async with two(FakeEngine(), asleep) as client:
        said = await client.post(CHAT, json={"model": "coder", "messages": HELLO})
        assert said.json()["choices"][0]["message"]["content"] == "awake"
        asleep.state, asleep.on_demand = EngineState.UNLOADED, False
        assert (await client.post(CHAT, json={"model": "coder", "messages": HELLO})).status_code == 503


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": HELLO}),
        (TEXT, {"prompt": "a"}),
        ("/v1/messages", {"messages": HELLO, "max_tokens": 4}),
        ("/v1/responses", {"input": "a"}),
    ],
)
async def test_a_stream_is_kept_alive_while_its_model_is_loaded(
    path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer, "HTTP", replace(HTTP, keepalive_seconds=0.02))
    refusal: list[RequestRefused] = []

    class Slow(FakeEngine):
        async def generate(self, request: Any) -> Any:
            await asyncio.sleep(0.1)
            if refusal:
                raise refusal[0]
            self.state = EngineState.READY
            return await super().generate(request)

    asleep = Slow(Reply(["awake"]), state=EngineState.UNLOADED, on_demand=True)
    async with two(FakeEngine(), asleep) as client:
        body |= {"model": "coder", "stream": True}
        first = await client.post(path, json=body)
        assert first.text.startswith(": keepalive\n\n: keepalive\n\n")
        assert "awake" in first.text
        assert ": keepalive" not in (await client.post(path, json=body)).text.split("awake")[0]
        asleep.state = EngineState.UNLOADED
        refusal.append(RequestRefused("not_ready", "it cannot be loaded"))
        second = await client.post(path, json=body)
        assert second.status_code == 200
        assert "it cannot be loaded" in second.text
        whole = await client.post(path, json={**body, "stream": False})
        assert whole.status_code == 503


async def test_numbers_carry_the_name_of_the_model() -> None:
    async with two(FakeEngine(), FakeEngine(restarts=3)) as client:
        text = (await client.get("/metrics")).text
    assert 'mixbit_worker_restarts_total{model="org/tiny"} 0.0' in text
    assert 'mixbit_worker_restarts_total{model="coder"} 3.0' in text


# --- real processes ---


@pytest.fixture(scope="module")
def coder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny-coder", "qwen3_next")


def ask(client: httpx.Client, model: str) -> httpx.Response:
    return client.post(TEXT, json={"model": model, "prompt": "the capital", "max_tokens": 4, "temperature": 0})


def worker_of(server: RunningServer, model: Path) -> Any:
    import psutil

    children: Any = psutil.Process(server.process.pid).children(recursive=True)  # type: ignore[no-untyped-call]
    return next(child for child in children if f'"model":"{model}"' in " ".join(child.cmdline()))


def test_a_model_that_dies_leaves_the_other_alone(tiny_checkpoint: Path, coder: Path) -> None:
    arguments = ("--model", str(tiny_checkpoint), "--model", f"{coder}=autocomplete", "--threads", "1")
    with start(*arguments) as server, server.client() as client:
        for name in ("tiny-llama", "tiny-coder", "autocomplete"):
            assert name in server.text()
            assert ask(client, name).status_code == 200
        other = worker_of(server, tiny_checkpoint)
        worker_of(server, coder).send_signal(signal.SIGKILL)
        until(lambda: client.get("/health").status_code == 503)
        assert ask(client, "tiny-llama").status_code == 200
        until(lambda: client.get("/health").status_code == 200)
        assert ask(client, "autocomplete").status_code == 200
        assert worker_of(server, tiny_checkpoint).pid == other.pid
        text = client.get("/metrics").text
        assert 'mixbit_worker_restarts_total{model="tiny-coder"} 1.0' in text
        assert 'mixbit_worker_restarts_total{model="tiny-llama"} 0.0' in text


def test_an_idle_model_is_unloaded_and_loaded_again(tiny_checkpoint: Path, coder: Path) -> None:
    arguments = ("--model", str(tiny_checkpoint), "--model", str(coder), "--threads", "1", "--unload-after", "0.5")
    with start(*arguments) as server, server.client() as client:
        first = ask(client, "tiny-coder").json()["choices"][0]["text"]
        until(lambda: 'mixbit_ready{model="tiny-coder"} 0.0' in client.get("/metrics").text)
        assert client.get("/health").json()["status"] == "ok"
        assert ask(client, "tiny-coder").json()["choices"][0]["text"] == first
        assert 'mixbit_ready{model="tiny-coder"} 1.0' in client.get("/metrics").text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "{a}", "--model", "{a}"), ("tiny-llama", "=NAME")),
        (("--model", "{a}", "--model", "{b}=tiny-llama"), ("tiny-llama", "=NAME")),
        (("--model", "{a}", "--model", "{b}", "--alias", "x"), ("--alias", "=NAME")),
        (("--model", "{a}", "--model", "{b}="), ("{b}=", "=NAME")),
    ],
)
def test_what_cannot_be_told_apart_is_refused(
    tiny_checkpoint: Path, coder: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    paths = {"a": tiny_checkpoint, "b": coder}
    result = run("serve", "--port", "0", *(each.format(**paths) for each in arguments))
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    for word in words:
        assert word.format(**paths) in line
