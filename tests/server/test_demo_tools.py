"""The demo model, which was never taught tools, made to answer in shape through the openai SDK."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.server.running import RunningServer, start

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city now.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 30},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 7},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
CLOCK: Any = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
QUESTION: Any = [{"role": "user", "content": "What is the weather in Paris?"}]


@pytest.fixture(scope="module")
def client(demo_checkpoint: Path) -> Iterator[openai.OpenAI]:
    server: RunningServer
    with (
        start("--model", str(demo_checkpoint)) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as sdk,
    ):
        yield sdk


def ask(client: openai.OpenAI, **body: Any) -> Any:
    fields = {"model": "smollm2-135m-instruct", "messages": QUESTION, "temperature": 0, "max_tokens": 300, **body}
    return client.chat.completions.create(**fields)


def check_weather(arguments: str) -> None:
    value = json.loads(arguments)
    assert set(value) <= {"city", "unit", "days"}
    assert len(value["city"]) <= 30
    assert value["unit"] in {"celsius", "fahrenheit"}
    assert 1 <= value.get("days", 1) <= 7


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_json_schema(client: openai.OpenAI, temperature: float) -> None:
    shape = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    choice = ask(client, response_format=shape, temperature=temperature, seed=1).choices[0]
    value = json.loads(choice.message.content)
    assert choice.finish_reason == "stop"
    assert set(value) == {"name", "age", "tags"}
    assert 0 <= value["age"] <= 120
    assert set(value["tags"]) <= {"a", "b", "c"}


def test_a_json_object_is_one_as_far_as_it_goes(client: openai.OpenAI) -> None:
    choice = ask(client, response_format={"type": "json_object"}, max_tokens=60).choices[0]
    assert choice.message.content.startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)


def test_a_named_tool_is_called_once(client: openai.OpenAI) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    choice = ask(client, tools=[CLOCK, WEATHER], tool_choice=named).choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert call.function.name == "get_weather"
    check_weather(call.function.arguments)


def test_a_tool_is_required(client: openai.OpenAI) -> None:
    choice = ask(client, tools=[WEATHER, CLOCK], tool_choice="required", parallel_tool_calls=False).choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert call.function.name in {"get_weather", "get_time"}


@pytest.mark.parametrize("stream", [False, True])
def test_no_tool_is_called_where_none_may_be(client: openai.OpenAI, stream: bool) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    called = ask(client, tools=[WEATHER], tool_choice=named).choices[0].message.tool_calls[0].function
    written = f'<tool_call>\n{{"name": "get_weather", "arguments": {called.arguments}}}\n</tool_call>'
    # The model is made to write a call; it is one if it may be, and text if not.
    body: dict[str, Any] = {"extra_body": {"grammar": f"start: {json.dumps(written)}"}, "stream": stream}
    told = {}
    free = {"type": "function", "function": {**WEATHER["function"], "strict": False}}
    for choice in ("auto", "none"):
        answer = ask(client, tools=[free], tool_choice=choice, **body)
        text, calls, reason = "", 0, None
        for part in answer if stream else [answer]:
            said = part.choices[0].delta if stream else part.choices[0].message
            text += said.content or ""
            calls += sum(1 for call in said.tool_calls or () if call.id)
            reason = part.choices[0].finish_reason or reason
        told[choice] = (text, calls, reason)
    assert told == {"auto": ("", 1, "tool_calls"), "none": (written, 0, "stop")}


def test_streamed_deltas_join_to_valid_json(client: openai.OpenAI) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    chunks = list(ask(client, tools=[WEATHER], tool_choice=named, stream=True))
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert deltas[0].id
    assert [delta.id for delta in deltas[1:]] == [None] * (len(deltas) - 1)
    assert deltas[0].function.name == "get_weather"
    assert len(deltas) > 3
    check_weather("".join(delta.function.arguments for delta in deltas))
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_strict_tool_that_may_be_called_is_called_rightly_or_not_at_all(client: openai.OpenAI) -> None:
    messages = [*QUESTION, {"role": "assistant", "content": "<tool_call>"}]
    choice = ask(client, tools=[WEATHER], max_tokens=120).choices[0]
    for call in choice.message.tool_calls or ():
        check_weather(call.function.arguments)
    assert choice.message.content or choice.message.tool_calls
    assert ask(client, messages=messages, max_tokens=5).choices[0].message.content is not None


def test_a_regular_expression_and_a_grammar(client: openai.OpenAI) -> None:
    grammar = {"syntax": "regex", "definition": "[A-Z][a-z]{2,8}"}
    text = ask(client, extra_body={"grammar": grammar}).choices[0].message.content
    assert text.isalpha()
    lark = 'start: ("yes" | "no") "!"'
    assert ask(client, extra_body={"grammar": lark}).choices[0].message.content in {"yes!", "no!"}
    completion = client.completions.create(
        model="smollm2-135m-instruct", prompt="1, 2,", max_tokens=20, extra_body={"grammar": "start: /[0-9 ,]{9}/"}
    )
    assert len(completion.choices[0].text) == 9


def test_a_bad_schema_is_refused_by_its_path(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "strin"}}}
    shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    with pytest.raises(openai.BadRequestError, match="strin") as raised:
        ask(client, response_format=shape, stream=True)
    assert raised.value.param == "response_format.json_schema.schema.properties.a"
    tool = {"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}
    with pytest.raises(openai.BadRequestError) as raised:
        ask(client, tools=[tool], tool_choice="required")
    assert raised.value.param == "tools[0].function.parameters.properties.a"
