"""`POST /v1/responses` over a fake engine."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from mixbit.server.schema import responses as schema
from tests.fakes import FakeEngine, Reply, failure, refusal
from tests.server.support import connect, error_of, served_model
from tests.server.test_messages import CALLING, TELL_ALL, THINKING, WEATHER, named_events

PATH = "/v1/responses"
EVENT: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)


async def post(engine: FakeEngine, template: str | None = None, **body: Any) -> Any:
    model = served_model(template) if template else served_model()
    async with connect(engine, model) as client:
        return await client.post(PATH, json={"input": "hi", **body})


async def test_whole_answer_is_what_the_sdk_expects() -> None:
    engine = FakeEngine(Reply(["Hel", "lo"], cached_tokens=4))
    body = (
        await post(engine, instructions="Be brief", temperature=0.5, top_p=0.9, max_output_tokens=9, store=True)
    ).json()
    answer = Response.model_validate(body, strict=True)
    schema.Response.model_validate(body, strict=True)
    assert (answer.output_text, answer.status, answer.model) == ("Hello", "completed", "org/tiny")
    request = engine.requests[0]
    assert request.prompt == "<system>Be brief</><user>hi</><assistant>"
    assert (request.max_tokens, request.sampling.temperature, request.sampling.top_p) == (9, 0.5, 0.9)
    assert answer.usage is not None
    assert answer.usage.input_tokens == len(request.prompt)
    assert answer.usage.input_tokens_details.cached_tokens == 4
    assert answer.usage.output_tokens == 2
    assert (answer.instructions, answer.max_output_tokens, answer.temperature) == ("Be brief", 9, 0.5)


@pytest.mark.parametrize(
    ("reason", "status", "item"), [("stop", "completed", "completed"), ("length", "incomplete", "incomplete")]
)
async def test_stream_joins_to_the_whole(reason: Any, status: str, item: str) -> None:
    engine = FakeEngine(Reply(["Hel", "lo"], reason=reason))
    response = await post(engine, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = named_events(response.text)
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        status,
    ]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:
        EVENT.validate_python(event, strict=True)
    assert events[6]["text"] == "Hello"
    last = events[-1]["response"]
    whole = (await post(engine)).json()
    for name in ("status", "usage", "incomplete_details"):
        assert last[name] == whole[name]
    assert last["output"][0]["content"] == whole["output"][0]["content"]
    assert last["output"][0] == events[-2]["item"]
    assert last["output"][0]["status"] == item
    assert len({event["response"]["id"] for event in events if "response" in event}) == 1


async def test_items_reach_the_template_as_turns() -> None:
    engine = FakeEngine()
    call = {"type": "function_call", "call_id": "a", "name": "weather", "arguments": '{"city": "Köln"}'}
    other = {**call, "call_id": "b"}
    items: list[Any] = [
        {"role": "developer", "content": [{"type": "input_text", "text": "dev"}]},
        {"role": "user", "content": "weather?"},
        {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "I look"}]},
        {
            "type": "message",
            "id": "msg",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "Looking.", "annotations": []}],
        },
        call,
        other,
        {"type": "function_call_output", "call_id": "a", "output": "rain"},
        {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "sun"}]},
        {"role": "assistant", "content": "Both."},
        {"role": "user", "content": "Thanks"},
    ]
    tools = [{"type": "function", "name": "weather", "parameters": {"type": "object"}}, {"type": "web_search"}]
    response = await post(engine, TELL_ALL, input=items, instructions="inst", tools=tools)
    assert response.status_code == 200, response.text
    assert engine.requests[0].prompt == (
        '<system>inst\n\ndev<user>weather?<assistant thought=I look>Looking.[a weather {"city": "Köln"}]'
        '[b weather {"city": "Köln"}]<tool id=a>rain<tool id=b>sun<assistant>Both.<user>Thanks'
        'ANSWER(weather {"type": "object"})'
    )
    assert [tool["name"] for tool in response.json()["tools"]] == ["weather"]


TOOL = {"type": "function", "name": "weather", "parameters": WEATHER["input_schema"], "strict": False}


@pytest.mark.parametrize("stream", [False, True])
async def test_thinking_and_calls_are_items(stream: bool) -> None:
    async with connect(FakeEngine(Reply(CALLING)), THINKING) as client:
        response = await client.post(PATH, json={"input": "hi", "tools": [TOOL], "stream": stream})
    assert response.status_code == 200, response.text
    body = response.json() if not stream else named_events(response.text)[-1]["response"]
    answer = Response.model_validate(body, strict=True)
    output: list[Any] = list(answer.output)
    thinking, message, call = output
    assert (thinking.type, message.type, call.type) == ("reasoning", "message", "function_call")
    assert thinking.content is not None
    assert (thinking.content[0].text, answer.output_text) == ("I look", "Looking.")
    assert (call.name, json.loads(call.arguments), call.status) == ("weather", {"city": "Köln"}, "completed")
    if not stream:
        return
    events = named_events(response.text)
    for event in events:
        EVENT.validate_python(event, strict=True)
    fragments = [event["delta"] for event in events if event["type"] == "response.function_call_arguments.delta"]
    assert json.loads("".join(fragments)) == {"city": "Köln"}
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == body["output"]


@pytest.mark.parametrize("stream", [False, True])
async def test_functions_of_a_namespace_keep_it(stream: bool) -> None:
    written = '<tool_call>\n{"name": "sky.weather", "arguments": {"city": "Köln"}}\n</tool_call>'
    engine = FakeEngine(Reply([written]))
    call = {"type": "function_call", "call_id": "a", "namespace": "sky", "name": "weather", "arguments": "{}"}
    items = [
        {"role": "user", "content": "hi"},
        call,
        {"type": "function_call_output", "call_id": "a", "output": "rain"},
    ]
    tools = [{"type": "namespace", "name": "sky", "description": "", "tools": [TOOL]}, {**TOOL, "name": "other"}]
    response = await post(engine, TELL_ALL, input=items, tools=tools, stream=stream)
    assert response.status_code == 200, response.text
    assert "[a sky.weather {}]" in engine.requests[0].prompt
    events = named_events(response.text) if stream else []
    for event in events:
        EVENT.validate_python(event, strict=True)
    answer = Response.model_validate(events[-1]["response"] if stream else response.json(), strict=True)
    (called,) = answer.output
    assert called.type == "function_call"
    assert (called.namespace, called.name) == ("sky", "weather")
    assert [tool.type for tool in answer.tools] == ["namespace", "function"]


async def test_calls_and_shapes_can_be_demanded() -> None:
    engine = FakeEngine(Reply(CALLING[6:]))
    form = {"type": "json_schema", "name": "city", "schema": {"type": "object"}, "strict": True}
    choices: list[Any] = ["required", {"type": "function", "name": "weather"}]
    for body in (*({"tools": [TOOL], "tool_choice": each} for each in choices), {"text": {"format": form}}):
        response = await post(engine, **body)
        assert response.status_code == 200, response.text
        assert engine.requests[-1].grammar is not None
        Response.model_validate(response.json(), strict=True)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": []}, "input"),
        ({"input": None}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "function_call", "call_id": "a"}]}, "input[0].name"),
        ({"input": [5]}, "input[0]"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "file_search"}]}, "tools[0].type"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 2**70}, "max_output_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    engine = FakeEngine()
    response = await post(engine, **body)
    assert response.status_code == 400, response.text
    assert error_of(response)["param"] == param
    assert not engine.requests


async def test_what_sdks_always_send_is_taken() -> None:
    body: dict[str, Any] = {
        "background": False,
        "truncation": "disabled",
        "include": ["reasoning.encrypted_content"],
        "store": False,
    }
    more: dict[str, Any] = {
        "metadata": {"a": "b"},
        "text": {"format": {"type": "text"}, "verbosity": "low"},
        "prompt_cache_key": "k",
    }
    response = await post(FakeEngine(), **body, **more)
    assert response.status_code == 200, response.text
    assert response.json()["metadata"] == {"a": "b"}


@pytest.mark.parametrize("stream", [False, True])
async def test_failures_are_told(stream: bool) -> None:
    response = await post(FakeEngine(refusal("context_length_exceeded")), stream=stream)
    assert (response.status_code, error_of(response)["param"]) == (400, "input")
    response = await post(FakeEngine(failure("worker_died", "it died")), stream=stream)
    if stream:
        last = named_events(response.text)[-1]
        EVENT.validate_python(last, strict=True)
        assert (last["type"], last["response"]["error"]["message"]) == ("response.failed", "it died")
    else:
        assert (response.status_code, error_of(response)["code"]) == (503, "worker_died")


async def test_the_sdk_reads_it() -> None:
    async with connect(FakeEngine(Reply(["Hel", "lo"]))) as connection:
        http: Any = connection  # the SDK's types name a twin of httpx
        client = openai.AsyncOpenAI(base_url="http://127.0.0.1:8080/v1", api_key="any", http_client=http)
        async with client.responses.stream(model="tiny", input="hi") as stream:
            text = "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])
            final = await stream.get_final_response()
        assert (text, final.output_text) == ("Hello", "Hello")
