"""`POST /v1/embeddings` over a fake engine."""

from __future__ import annotations

import asyncio
import base64
import struct
from typing import Any

import pytest
from msgspec.structs import replace
from openai.types import CreateEmbeddingResponse

from mixbit.engine.client import EngineState
from mixbit.engine.protocol import Embed
from mixbit.server.settings import REQUEST
from tests.fakes import FAKE_READY, FakeEngine, Reply, failure, refusal
from tests.server.running import numbers
from tests.server.support import connect, error_of

PATH = "/v1/embeddings"


async def post(engine: FakeEngine, **body: Any) -> Any:
    async with connect(engine) as client:
        return await client.post(PATH, json=body)


async def ask(engine: FakeEngine, **body: Any) -> Any:
    response = await post(engine, **body)
    assert response.status_code == 200, response.text
    return response.json()


def _by_length(request: Embed) -> Reply:
    """Vectors that tell which text they are of; those of short texts come later."""
    return Reply(embedding=(float(len(request.prompt)), 0.0, 0.0), delay=0.02 / len(request.prompt))


async def test_the_answer_is_what_the_sdk_expects() -> None:
    engine = FakeEngine()
    parsed = CreateEmbeddingResponse.model_validate(await ask(engine, input="abc", model="tiny"), strict=True)
    assert parsed.data[0].embedding == pytest.approx([0.6, 0.0, 0.8])
    assert (parsed.object, parsed.model, parsed.data[0].object) == ("list", "org/tiny", "embedding")
    assert (parsed.usage.prompt_tokens, parsed.usage.total_tokens) == (3, 3)
    assert engine.embeds[0].add_special_tokens


async def test_base64_is_of_little_endian_floats() -> None:
    answer = await ask(FakeEngine(), input="abc", encoding_format="base64")
    assert struct.unpack("<3f", base64.b64decode(answer["data"][0]["embedding"])) == pytest.approx((0.6, 0.0, 0.8))


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("abc", ["abc"]),
        (["abc", "d", "ef"], ["abc", "d", "ef"]),
        ([97, 98], [[97, 98]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
        (["abc"] * 40 + ["d"], ["abc"] * 40 + ["d"]),
    ],
)
async def test_inputs_of_every_kind_are_answered_in_their_order(given: Any, prompts: list[Any]) -> None:
    engine = FakeEngine(embedded=_by_length)
    answer = await ask(engine, input=given)
    assert [each["index"] for each in answer["data"]] == list(range(len(prompts)))
    assert [each["embedding"][0] for each in answer["data"]] == [len(prompt) for prompt in prompts]
    assert [each.prompt for each in engine.embeds] == prompts
    assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))


async def test_a_long_list_leaves_room_in_the_queue() -> None:
    most = 0

    def count(_: Embed) -> Reply:
        nonlocal most
        most = max(most, len(engine.running) + 1)
        return Reply(delay=0.001)

    engine = FakeEngine(embedded=count)
    await ask(engine, input=["x"] * 50)
    assert most == REQUEST.embeddings_at_once


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": {"a": 1}}, "input"),
        ({"input": ["a", 1]}, "input"),
        ({"input": [1, "a"]}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": [2**70]}, "input"),
        ({"input": ["x"] * (REQUEST.max_inputs + 1)}, "input"),
        ({"input": "x", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "x", "dimensions": 2}, "dimensions"),
        ({"input": "x", "dimensions": 0}, "dimensions"),
    ],
)
async def test_what_cannot_be_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    engine = FakeEngine()
    response = await post(engine, **body)
    assert response.status_code == 400, response.text
    assert (error_of(response)["param"] or "").split("[")[0] == param
    assert not engine.embeds


async def test_the_models_own_dimensions_and_null_are_no_wish() -> None:
    for body in ({"dimensions": 3}, {"dimensions": None, "encoding_format": None, "user": "me", "unknown": 1}):
        assert len((await ask(FakeEngine(), input="x", **body))["data"][0]["embedding"]) == 3


async def test_kernels_without_hidden_states_say_so() -> None:
    engine = FakeEngine(ready=replace(FAKE_READY, embedding_size=None))
    response = await post(engine, input="x")
    assert (response.status_code, error_of(response)["code"]) == (400, "embeddings_not_supported")
    assert not engine.embeds


@pytest.mark.parametrize(
    ("reply", "status", "code", "param"),
    [
        (refusal("context_length_exceeded", "too long", "prompt"), 400, "context_length_exceeded", "input"),
        (refusal("invalid_value", "the prompt has no tokens", "prompt"), 400, "invalid_value", "input"),
        (refusal("queue_full"), 429, "queue_full", None),
        (failure("worker_died"), 503, "worker_died", None),
        (failure("timeout"), 504, "timeout", None),
    ],
)
async def test_one_text_that_fails_is_the_requests_failure_and_ends_the_others(
    reply: Reply, status: int, code: str, param: str | None
) -> None:
    def one_fails(request: Embed) -> Reply:
        return reply if request.prompt == "bad" else Reply(hang=True)

    engine = FakeEngine(embedded=one_fails)
    response = await post(engine, input=["x", "bad", "y"])
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (status, code, param)
    assert ("retry-after" in response.headers) == (status in (429, 503))
    assert not engine.running


async def test_loading_is_a_503() -> None:
    response = await post(FakeEngine(state=EngineState.LOADING, ready=None), input="x")
    assert (response.status_code, error_of(response)["code"]) == (503, "model_loading")


async def test_a_client_that_hangs_up_ends_the_work() -> None:
    engine = FakeEngine(embedded=Reply(hang=True))
    async with connect(engine) as client:
        asking = asyncio.ensure_future(client.post(PATH, json={"input": ["x", "y"]}))
        while len(engine.running) < 2:
            await asyncio.sleep(0.001)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    assert not engine.running
    assert len(engine.aborted) == 2


@pytest.mark.parametrize(("reply", "outcome"), [(Reply(), "completed"), (refusal("queue_full"), "refused")])
async def test_metrics_count_them(reply: Reply, outcome: str) -> None:
    async with connect(FakeEngine(embedded=reply)) as client:
        await client.post(PATH, json={"input": ["abc", "de"]})
        found = numbers((await client.get("/metrics")).text)
    assert found[f'mixbit_requests_total{{outcome="{outcome}"}}'] == 1
    assert found["mixbit_prompt_tokens_total"] == (5 if outcome == "completed" else 0)
    assert found["mixbit_completion_tokens_total"] == 0
