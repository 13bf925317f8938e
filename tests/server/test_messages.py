"""`POST /v1/messages` over a fake engine: Anthropic's requests, answers and events."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import anthropic
import httpx
import pytest
from anthropic.types import Message, MessageTokensCount, RawMessageStreamEvent
from pydantic import TypeAdapter

from mixbit.server.parsing.machine import ReasoningMarkers
from mixbit.server.schema import messages as schema
from mixbit.server.settings import LOOPBACK_HOSTS, Access
from tests.fakes import FakeEngine, Reply, failure, refusal
from tests.server.running import RunningServer
from tests.server.support import connect, served_model

PATH = "/v1/messages"
ASK: dict[str, Any] = {"max_tokens": 50, "messages": [{"role": "user", "content": "hi"}]}
EVENT: TypeAdapter[RawMessageStreamEvent] = TypeAdapter(RawMessageStreamEvent)
WEATHER = {
    "name": "weather",
    "description": "Tells it",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


async def post(engine: FakeEngine, path: str = PATH, **body: Any) -> httpx.Response:
    async with connect(engine) as client:
        return await client.post(path, json={**ASK, **body})


def named_events(text: str) -> list[Any]:
    """Events that carry their name, parsed."""
    assert text.endswith("\n\n")
    result = []
    for block in text.split("\n\n")[:-1]:
        if block.startswith(":"):
            continue
        name, data = block.split("\n")
        parsed = json.loads(data.removeprefix("data: "))
        assert name == f"event: {parsed['type']}"
        result.append(parsed)
    return result


def error_of(response: httpx.Response) -> Any:
    body = response.json()
    schema.AnthropicError.model_validate(body, strict=True)
    return body["error"]


async def test_whole_answer_is_what_the_sdk_expects() -> None:
    engine = FakeEngine(Reply(["Hel", "lo"], cached_tokens=4))
    response = await post(engine, temperature=0.5, top_k=7, top_p=0.9, stop_sequences=["END"], system="Be brief")
    answer = Message.model_validate(response.json(), strict=True)
    schema.Message.model_validate(response.json(), strict=True)
    assert answer.id.startswith("msg_")
    assert answer.model == "org/tiny"
    assert [block.to_dict() for block in answer.content] == [{"type": "text", "text": "Hello"}]
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)
    request = engine.requests[0]
    assert request.prompt == "<system>Be brief</><user>hi</><assistant>"
    assert (request.max_tokens, request.stop) == (50, ["END"])
    assert (request.sampling.temperature, request.sampling.top_k, request.sampling.top_p) == (0.5, 7, 0.9)
    assert (answer.usage.input_tokens, answer.usage.cache_read_input_tokens) == (len(request.prompt) - 4, 4)
    assert answer.usage.output_tokens == 2


async def test_stream_joins_to_the_whole() -> None:
    response = await post(FakeEngine(Reply(["Hel", "lo"], cached_tokens=3)), stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = named_events(response.text)
    assert [event["type"] for event in events] == [
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    for event in events:
        if event["type"] != "ping":
            EVENT.validate_python(event, strict=True)
    assert "".join(event["delta"]["text"] for event in events[3:5]) == "Hello"
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == 2
    assert events[-2]["usage"]["cache_read_input_tokens"] == 3


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("reply", "ending"),
    [
        (Reply(["a"], reason="length"), {"stop_reason": "max_tokens", "stop_sequence": None}),
        (Reply(["a"], stop="END"), {"stop_reason": "stop_sequence", "stop_sequence": "END"}),
        (Reply([]), {"stop_reason": "end_turn", "stop_sequence": None}),
    ],
)
async def test_why_it_stopped(reply: Reply, ending: dict[str, Any], stream: bool) -> None:
    response = await post(FakeEngine(reply), stream=stream)
    if stream:
        assert named_events(response.text)[-2]["delta"] == ending
    else:
        assert {name: response.json()[name] for name in ending} == ending


TURNS = [
    {"role": "user", "content": [{"type": "text", "text": "weather?", "cache_control": {"type": "ephemeral"}}]},
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "I look", "signature": ""},
            {"type": "redacted_thinking", "data": "x"},
            {"type": "text", "text": "Looking."},
            {"type": "tool_use", "id": "a1", "name": "weather", "input": {"city": "Köln"}},
        ],
    },
    {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "a1", "content": [{"type": "text", "text": "rain"}]},
            {"type": "text", "text": "and now?"},
        ],
    },
]
TELL_ALL = (
    "{% for m in messages %}<{{ m.role }}{% if m.reasoning_content %} thought={{ m.reasoning_content }}{% endif %}"
    "{% if m.tool_call_id %} id={{ m.tool_call_id }}{% endif %}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.id }} {{ c.function.name }} {{ c.function.arguments | tojson }}]"
    "{% endfor %}{% endfor %}{% if enable_thinking %}THINK{% else %}ANSWER{% endif %}"
    "{% for t in tools or [] %}({{ t.function.name }} {{ t.function.parameters | tojson }}){% endfor %}"
)


async def test_turns_with_tools_reach_the_template() -> None:
    engine = FakeEngine()
    async with connect(engine, served_model(TELL_ALL)) as client:
        response = await client.post(PATH, json={**ASK, "messages": TURNS, "tools": [WEATHER]})
        assert response.status_code == 200, response.text
        on = {"type": "enabled", "budget_tokens": 1024}
        await client.post(PATH, json={**ASK, "thinking": on})
    prompt = (
        '<user>weather?<assistant thought=I look>Looking.[a1 weather {"city": "Köln"}]'
        "<tool id=a1>rain<user>and now?ANSWER(weather "
    )
    assert str(engine.requests[0].prompt).startswith(prompt)
    assert str(engine.requests[1].prompt) == "<user>hiTHINK"


# What a model writes that thinks, says something and calls a tool.
CALLING = ["<think>", "I lo", "ok", "</think>", "Look", "ing.", '<tool_call>\n{"name": "weather", ']
CALLING += ['"arguments": {"city": "K', 'öln"}}', "\n</tool_call>"]
THINKING = replace(served_model(), reasoning=ReasoningMarkers("<think>", "</think>"))


@pytest.mark.parametrize("stream", [False, True])
async def test_thinking_and_calls_are_blocks(stream: bool) -> None:
    async with connect(FakeEngine(Reply(CALLING)), THINKING) as client:
        response = await client.post(PATH, json={**ASK, "tools": [WEATHER], "stream": stream})
    assert response.status_code == 200, response.text
    if not stream:
        answer = Message.model_validate(response.json(), strict=True)
        content: list[Any] = list(answer.content)
        thinking, text, call = content
        assert (thinking.type, text.type, call.type) == ("thinking", "text", "tool_use")
        assert (thinking.thinking, text.text, call.name, call.input) == (
            "I look",
            "Looking.",
            "weather",
            {"city": "Köln"},
        )
        assert call.id
        assert answer.stop_reason == "tool_use"
        return
    events = named_events(response.text)
    for event in events:
        if event["type"] != "ping":
            EVENT.validate_python(event, strict=True)
    blocks = [event["content_block"]["type"] for event in events if event["type"] == "content_block_start"]
    assert blocks == ["thinking", "text", "tool_use"]
    deltas: dict[int, str] = {}
    for event in events:
        if event["type"] == "content_block_delta":
            kind = event["delta"]["type"]
            key = {"thinking_delta": "thinking", "text_delta": "text", "input_json_delta": "partial_json"}[kind]
            deltas[event["index"]] = deltas.get(event["index"], "") + event["delta"][key]
    assert [deltas[0], deltas[1], json.loads(deltas[2])] == ["I look", "Looking.", {"city": "Köln"}]
    order = [(event["type"], event.get("index")) for event in events if event["type"].startswith("content_block_s")]
    assert order == [(f"content_block_{what}", index) for index in range(3) for what in ("start", "stop")]
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


async def test_a_call_can_be_demanded() -> None:
    engine = FakeEngine(Reply(CALLING[6:]))
    for choice in ({"type": "any"}, {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}):
        assert (await post(engine, tools=[WEATHER], tool_choice=choice)).status_code == 200
        assert engine.requests[-1].grammar is not None
    await post(engine, tools=[WEATHER], tool_choice={"type": "auto"})
    assert engine.requests[-1].grammar is None
    shape = {"format": {"type": "json_schema", "schema": {"type": "object"}}}
    assert (await post(engine, output_config=shape)).status_code == 200
    assert engine.requests[-1].grammar is not None


async def test_an_answer_can_be_begun() -> None:
    engine = FakeEngine()
    begun = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well,"}]
    assert (await post(engine, messages=begun)).status_code == 200
    assert engine.requests[0].prompt == "<user>hi</><assistant>Well,"


async def test_tokens_are_counted_as_they_would_be_used() -> None:
    engine = FakeEngine()
    body = {"messages": ASK["messages"], "system": "s", "tools": [WEATHER]}
    async with connect(engine) as client:
        response = await client.post(f"{PATH}/count_tokens", json=body)
        used = (await client.post(PATH, json={**body, "max_tokens": 5})).json()["usage"]["input_tokens"]
    assert MessageTokensCount.model_validate(response.json(), strict=True).input_tokens == used > 100


@pytest.mark.parametrize(
    "body",
    [
        {"messages": []},
        {"max_tokens": None},
        {"max_tokens": 0},
        {"max_tokens": 2**70},
        {"temperature": -1},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": {}}]}]},
        {"messages": [{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "a"}]}]},
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        {"tools": [{"name": "bad name!", "input_schema": {}}]},
        {"tool_choice": {"type": "tool"}, "tools": [WEATHER]},
        {"mcp_servers": [{"url": "http://evil.example"}]},
        {"thinking": {"type": "sometimes"}},
    ],
)
@pytest.mark.parametrize("path", [PATH, f"{PATH}/count_tokens"])
async def test_what_cannot_be_done_is_refused(body: dict[str, Any], path: str) -> None:
    engine = FakeEngine()
    response = await post(engine, path, **body)
    counts = path != PATH and not set(body) & {"messages", "tools", "tool_choice", "thinking"}
    assert response.status_code == (200 if counts else 400), response.text
    if not counts:
        assert error_of(response)["type"] == "invalid_request_error"
    assert not engine.requests


@pytest.mark.parametrize("stream", [False, True])
async def test_failures_are_told(stream: bool) -> None:
    long = refusal("context_length_exceeded", "maximum context length is 9 tokens")
    response = await post(FakeEngine(long), stream=stream)
    assert response.status_code == 400
    assert "prompt is too long" in error_of(response)["message"]
    response = await post(FakeEngine(refusal("queue_full")), stream=stream)
    assert (response.status_code, error_of(response)["type"]) == (429, "rate_limit_error")
    assert response.headers["retry-after"]
    response = await post(FakeEngine(failure("worker_died")), stream=stream)
    if stream:
        assert named_events(response.text)[-1]["error"]["type"] == "overloaded_error"
    else:
        assert (response.status_code, error_of(response)["type"]) == (503, "overloaded_error")


async def test_refusals_at_the_door_have_this_form_too() -> None:
    keyed = Access(keys=("sesame",), hosts=LOOPBACK_HOSTS)
    async with connect(FakeEngine(), access=keyed) as client:
        for headers, status in (({}, 401), ({"x-api-key": "no"}, 401), ({"x-api-key": "sesame"}, 200)):
            response = await client.post(PATH, json=ASK, headers=headers)
            assert response.status_code == status
            if status == 401:
                assert error_of(response)["type"] == "authentication_error"
    response = await post(FakeEngine(), model="nope")
    assert (response.status_code, error_of(response)["type"]) == (404, "not_found_error")


def test_the_sdk_reads_it(tiny_server: RunningServer) -> None:
    with anthropic.Anthropic(base_url=tiny_server.url, api_key="any", max_retries=0) as client:
        ask: dict[str, Any] = {"model": "tiny-llama", "messages": ASK["messages"], "max_tokens": 20}
        with client.messages.stream(**ask, extra_body={"temperature": 0}) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        whole = client.messages.create(**ask, extra_body={"temperature": 0})
        assert [block.text for block in whole.content if block.type == "text"] == [text]
        assert text
        assert final.usage.output_tokens == whole.usage.output_tokens <= 20
        counted = client.messages.count_tokens(model="tiny-llama", messages=ASK["messages"]).input_tokens
        assert counted == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
        with pytest.raises(anthropic.NotFoundError):
            client.messages.create(**{**ask, "model": "nope"})
        with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
            client.messages.create(**{**ask, "messages": [{"role": "user", "content": "x y z " * 4096}]})
