"""Numbers and logs: what they say is what was answered, and never what was said."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from mixbit.engine.client import EngineState
from mixbit.engine.protocol import ExpertStats, Generate, Stats
from mixbit.server.settings import Access
from tests.fakes import FakeEngine, Reply, failure, refusal
from tests.server.running import numbers, start, until
from tests.server.support import HELLO, LOCAL, connect, events

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


async def metrics(client: httpx.AsyncClient, **options: Any) -> dict[str, float]:
    response = await client.get("/metrics", **options)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return numbers(response.text)


def outcomes(found: dict[str, float]) -> dict[str, float]:
    start = 'mixbit_requests_total{outcome="'
    return {name[len(start) : -2]: value for name, value in found.items() if name.startswith(start) and value}


async def test_tokens_equal_the_usage_of_the_answers() -> None:
    bodies: list[tuple[str, dict[str, Any]]] = [
        (CHAT, {"messages": HELLO}),
        (CHAT, {"messages": HELLO, "n": 3}),
        (CHAT, {"messages": HELLO, "stream": True, "stream_options": {"include_usage": True}}),
        (TEXT, {"prompt": ["one", "three"], "n": 2}),
    ]
    engine = FakeEngine(Reply(["a", "b", "c"], cached_tokens=2))
    usages = []
    async with connect(engine) as client:
        for path, body in bodies:
            response = await client.post(path, json=body)
            usages.append(events(response.text)[-2]["usage"] if "stream" in body else response.json()["usage"])
        found = await metrics(client)
    assert len(usages) == len(bodies)
    assert found["mixbit_prompt_tokens_total"] == sum(usage["prompt_tokens"] for usage in usages)
    assert found["mixbit_completion_tokens_total"] == sum(usage["completion_tokens"] for usage in usages)
    cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    assert found["mixbit_cached_tokens_total"] == cached == 2 * 5
    assert outcomes(found) == {"completed": len(bodies)}
    choices = 1 + 3 + 1 + 4
    assert found["mixbit_time_to_first_token_seconds_count"] == len(bodies)
    assert found["mixbit_inter_token_seconds_count"] == 2 * choices  # three deltas each
    assert found['mixbit_http_responses_total{route="/v1/chat/completions",status="200"}'] == 3


async def test_tokens_count_while_they_come() -> None:
    engine = FakeEngine(Reply(["a", "b", "c"], hang=True))
    async with connect(engine) as client:
        answer = asyncio.create_task(client.post(CHAT, json={"messages": HELLO}))
        async with asyncio.timeout(10):
            while (await metrics(client))["mixbit_completion_tokens_total"] < 3:
                await asyncio.sleep(0.01)
        assert not answer.done()
        answer.cancel()
        await asyncio.gather(answer, return_exceptions=True)
        assert (await metrics(client))["mixbit_completion_tokens_total"] == 3


async def test_times_are_measured() -> None:
    async with connect(FakeEngine(Reply(["a", "b", "c"], delay=0.03))) as client:
        await client.post(CHAT, json={"messages": HELLO})
        found = await metrics(client)
    assert 0.03 <= found["mixbit_time_to_first_token_seconds_sum"] < 5
    assert 0.06 <= found["mixbit_inter_token_seconds_sum"] < 5


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        (Reply(), "completed"),
        (refusal("queue_full"), "refused"),
        (failure("internal_error"), "failed"),
        (failure("worker_died"), "failed"),
        (failure("timeout"), "timeout"),
        (refusal("timeout"), "timeout"),
    ],
)
async def test_outcomes(reply: Reply, outcome: str, stream: bool) -> None:
    async with connect(FakeEngine(reply)) as client:
        response = await client.post(CHAT, json={"messages": HELLO, "stream": stream})
        if outcome == "timeout" and (reply.refuse or not stream):
            assert response.status_code == 504
        found = await metrics(client)
    assert outcomes(found) == {outcome: 1}
    if reply.fail:  # the text that came was generated
        assert found["mixbit_completion_tokens_total"] == 1
        assert found["mixbit_prompt_tokens_total"] > 0


async def test_requests_that_do_not_reach_the_engine_are_answers_alone() -> None:
    async with connect(FakeEngine()) as client:
        await client.post(CHAT, json={"messages": []})
        await client.get("/no/such/path")
        await client.get("/health")
        found = await metrics(client)
    assert outcomes(found) == {}
    assert found['mixbit_http_responses_total{route="/v1/chat/completions",status="400"}'] == 1
    assert found['mixbit_http_responses_total{route="none",status="404"}'] == 1
    assert found['mixbit_http_responses_total{route="/health",status="200"}'] == 1


async def test_what_the_engine_holds() -> None:
    engine = FakeEngine(
        stats=Stats(running=2, waiting=3, blocks_used=7, blocks_cached=9, steps=11, preemptions=5, leaks=1), restarts=4
    )
    async with connect(engine) as client:
        found = await metrics(client)
        expected = {
            "mixbit_ready": 1,
            "mixbit_requests_running": 2,
            "mixbit_requests_waiting": 3,
            'mixbit_kv_bytes{state="used"}': 70,
            'mixbit_kv_bytes{state="cached"}': 90,
            "mixbit_cache_bytes": 1000,
            "mixbit_worker_restarts_total": 4,
            "mixbit_steps_total": 11,
            "mixbit_preemptions_total": 5,
            "mixbit_leaks_total": 1,
        }
        assert {name: found[name] for name in expected} == expected
        engine.state, engine.ready, engine.stats = EngineState.RESTARTING, None, None
        found = await metrics(client)
        assert found["mixbit_ready"] == found["mixbit_requests_running"] == found["mixbit_cache_bytes"] == 0
        assert found["mixbit_worker_restarts_total"] == 4


async def test_what_streaming_costs_and_that_weights_cannot_be_read() -> None:
    streamed = ExpertStats(hits=7, misses=3, ahead=2, unused=1, bytes_read=900, read_seconds=0.5, wait_seconds=0.25)
    engine = FakeEngine(stats=Stats(experts=streamed, fault="model.safetensors: cannot be read at byte 7"))
    async with connect(engine) as client:
        found = await metrics(client)
        health = await client.get("/health")
    expected = {
        "mixbit_expert_hits_total": 7,
        "mixbit_expert_misses_total": 3,
        "mixbit_expert_reads_ahead_total": 2,
        "mixbit_expert_reads_unused_total": 1,
        "mixbit_expert_read_bytes_total": 900,
        "mixbit_expert_read_seconds_total": 0.5,
        "mixbit_expert_wait_seconds_total": 0.25,
        "mixbit_expert_memory_bytes": 0,
        "mixbit_weights_unreadable": 1,
    }
    assert {name: found[name] for name in expected} == expected
    assert health.status_code == 503
    assert health.json() == {"status": "failed", "detail": "model.safetensors: cannot be read at byte 7"}


async def test_a_key_is_needed_where_the_api_needs_one() -> None:
    access = Access(keys=("secret",), hosts=LOCAL.hosts)
    async with connect(FakeEngine(), access=access) as client:
        assert (await client.get("/metrics")).status_code == 401
        assert (await client.get("/metrics", headers={"host": "evil.example"})).status_code == 403
        found = await metrics(client, headers={"authorization": "Bearer secret"})
    assert found['mixbit_http_responses_total{route="none",status="401"}'] == 1


async def test_one_line_a_request_without_its_words(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mixbit.server")

    def reply(request: Generate) -> Reply:
        return Reply(["private", "answer"], cached_tokens=3)

    async with connect(FakeEngine(reply)) as client:
        body = {"messages": [{"role": "user", "content": "a secret question"}], "stream": True}
        response = await client.post(CHAT, json=body)
        await client.get("/v1/models")
    request, models = [record for record in caplog.records if record.name == "mixbit.server"]
    fields: dict[str, Any] = request.__dict__["fields"]
    assert fields["id"] == events(response.text)[0]["id"]
    assert (fields["outcome"], fields["status"], fields["path"]) == ("completed", 200, CHAT)
    assert (fields["cached_tokens"], fields["completion_tokens"]) == (3, 2)
    assert fields["prompt_tokens"] > 3
    assert 0 <= fields["ttft"] <= fields["seconds"]
    assert "id" not in models.__dict__["fields"]
    for word in ("secret", "question", "private", "answer"):
        assert word not in caplog.text


async def test_what_machines_ask_for_all_the_time_is_not_news(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "mixbit.server")
    async with connect(FakeEngine()) as client:
        await client.get("/metrics")
        await client.get("/health")
    async with connect(FakeEngine(state=EngineState.FAILED, ready=None)) as client:
        await client.get("/health")
    lines = [record for record in caplog.records if record.name == "mixbit.server"]
    assert [line.levelno for line in lines] == [logging.DEBUG, logging.DEBUG, logging.INFO]


# --- the real server ---


def test_json_logs_of_a_real_server(tiny_checkpoint: Path) -> None:
    with start("--model", str(tiny_checkpoint), "--threads", "1", "--log-format", "json") as server:
        with server.client() as client:
            body = {
                "messages": [{"role": "user", "content": "a secret question"}],
                "max_tokens": 300,
                "ignore_eos": True,
            }
            answer = client.post(CHAT, json=body).json()
            until(lambda: '"outcome"' in server.text())
            server.worker().kill()
            until(lambda: client.get("/health").status_code == 200)
            until(lambda: numbers(client.get("/metrics").text)["mixbit_worker_restarts_total"] == 1)
        lines = [json.loads(line) for line in server.text().splitlines() if line.startswith("{")]
        assert all({"time", "level", "logger", "message"} <= set(line) for line in lines)
        (request,) = [line for line in lines if "outcome" in line]
        assert request["id"] == answer["id"]
        assert request["prompt_tokens"] == answer["usage"]["prompt_tokens"]
        assert request["completion_tokens"] == 300
        assert request["tokens_per_second"] > 0
        assert any(line["level"] == "error" and "SIGKILL" in line["message"] for line in lines)
        assert "secret" not in server.text()


def test_a_real_servers_numbers_equal_its_answers(tiny_checkpoint: Path) -> None:
    with start("--model", str(tiny_checkpoint), "--threads", "1") as server, server.client() as client:

        def ask(number: int) -> dict[str, Any]:
            body = {
                "prompt": [5, 6, 7] * (number + 1),
                "max_tokens": 3 + number,
                "ignore_eos": True,
                "n": 1 + number % 2,
            }
            usage: dict[str, Any] = client.post(TEXT, json=body).json()["usage"]
            return usage

        with ThreadPoolExecutor(4) as pool:
            usages = list(pool.map(ask, range(12)))
        found = server.settled()
    assert found["mixbit_prompt_tokens_total"] == sum(usage["prompt_tokens"] for usage in usages)
    assert found["mixbit_completion_tokens_total"] == sum(usage["completion_tokens"] for usage in usages)
    cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    assert found["mixbit_cached_tokens_total"] == cached
    assert outcomes(found) == {"completed": 12}
    assert math.isclose(found["mixbit_http_responses_total" + '{route="/v1/completions",status="200"}'], 12)
