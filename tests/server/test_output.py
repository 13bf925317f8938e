"""Reasoning, tool calls and shaped answers over a scripted engine."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixbit.engine.constraint import GrammarCompiler
from mixbit.engine.protocol import Generate, TokenLogprob, TokenLogprobs
from mixbit.server.model import ServedModel
from mixbit.server.parsing.formats import FORMATS
from mixbit.server.parsing.machine import ReasoningMarkers
from tests.engine.tokenizers_for_tests import byte_level
from tests.fakes import FakeEngine, Reply, refusal
from tests.server.support import HELLO, connect, error_of, events, served_model

PATH = "/v1/chat/completions"
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "</tool_call>"}}\n</tool_call>'
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["a"]}


TOKENIZER = byte_level()


def tool(name: str = "add", **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": SCHEMA, **fields}}


def model(template: str | None = None, **fields: Any) -> ServedModel:
    return replace(served_model(template) if template else served_model(), **fields)


async def whole(text: str, served: ServedModel | None = None, **body: Any) -> dict[str, Any]:
    async with connect(FakeEngine(Reply(list(text))), served) as client:
        response = await client.post(PATH, json={"messages": HELLO, **body})
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


async def streamed(pieces: list[str], served: ServedModel | None = None, **body: Any) -> dict[str, Any]:
    """The choice as a client puts it together, checked for the form of its chunks."""
    async with connect(FakeEngine(Reply(pieces)), served) as client:
        response = await client.post(PATH, json={"messages": HELLO, "stream": True, **body})
    *chunks, done = events(response.text)
    assert done == "[DONE]"
    result: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons[:-1] == [None] * (len(reasons) - 1)
    for chunk in chunks:
        delta = chunk["choices"][0]["delta"]
        for name in ("content", "reasoning_content"):
            result[name] += delta.get(name) or ""
        for call in delta.get("tool_calls", ()):
            if call["index"] == len(result["tool_calls"]):
                assert call["type"] == "function"
                assert call["id"]
                result["tool_calls"].append({"name": call["function"]["name"], "arguments": ""})
            else:
                assert set(call) == {"index", "function"}
                assert set(call["function"]) == {"arguments"}
            result["tool_calls"][call["index"]]["arguments"] += call["function"]["arguments"]
    return {**result, "finish_reason": reasons[-1]}


async def sent(served: ServedModel | None = None, **body: Any) -> Generate:
    engine = FakeEngine()
    async with connect(engine, served) as client:
        response = await client.post(PATH, json={"messages": HELLO, **body})
    assert response.status_code == 200, response.text
    return engine.requests[0]


async def test_a_call_is_taken_out_of_the_text() -> None:
    choice = await whole(f"I shall add.\n{CALL}", tools=[tool()])
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert message["content"] == "I shall add."
    (call,) = message["tool_calls"]
    assert call["function"] == {"name": "add", "arguments": '{"a": 1, "b": "</tool_call>"}'}
    assert call["type"] == "function"
    alone = (await whole(CALL, tools=[tool()]))["message"]
    assert alone["content"] is None


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 200), max_size=6))
async def test_a_stream_says_the_same(cuts: list[int]) -> None:
    text = f"<think>\nhm</think>\n\nFirst.\n{CALL}\n{CALL}"
    places = sorted({min(cut, len(text)) for cut in cuts})
    pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    result = await streamed(pieces, model(reasoning=ReasoningMarkers("<think>", "</think>")), tools=[tool()])
    call = {"name": "add", "arguments": '{"a": 1, "b": "</tool_call>"}'}
    assert result == {
        "content": "First.",
        "reasoning_content": "hm",
        "tool_calls": [call, call],
        "finish_reason": "tool_calls",
    }


async def test_without_tools_or_with_none_chosen_a_call_is_text() -> None:
    assert (await whole(CALL))["message"]["content"] == CALL
    choice = await whole(CALL, tools=[tool()], tool_choice="none")
    assert (choice["message"]["content"], choice["finish_reason"]) == (CALL, "stop")


async def test_a_call_that_breaks_off_is_text_and_the_stream_still_ends() -> None:
    broken = CALL[:40]
    choice = await whole(broken, tools=[tool()])
    assert choice["message"]["content"] == broken
    assert "tool_calls" not in choice["message"]
    assert choice["finish_reason"] == "stop"
    result = await streamed(list(broken), tools=[tool()])
    assert (result["content"], result["finish_reason"]) == (broken, "stop")


async def test_thinking_begins_inside_where_the_template_opened_it() -> None:
    template = "{{ messages[0].content }}{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
    served = model(template, reasoning=ReasoningMarkers("<think>", "</think>"))
    message = (await whole("why\n</think>\n\nso", served))["message"]
    assert (message["reasoning_content"], message["content"]) == ("why", "so")
    result = await streamed(list("why\n</think>\n\nso"), served)
    assert (result["reasoning_content"], result["content"]) == ("why", "so")
    request = await sent(served)
    assert request.shown_tokens == ["<think>", "</think>"]


async def test_log_probabilities_of_held_text_are_not_lost() -> None:
    text = "so <tool_ca"
    entries = [TokenLogprobs(TokenLogprob(0, each.encode(), -1.0), []) for each in text]
    engine = FakeEngine(Reply(list(text), logprobs=entries))
    async with connect(engine) as client:
        body = {"messages": HELLO, "stream": True, "logprobs": True, "tools": [tool()]}
        response = await client.post(PATH, json=body)
    shown = [chunk["choices"][0]["logprobs"] for chunk in events(response.text)[:-1]]
    assert "".join(entry["token"] for each in shown if each for entry in each["content"]) == text


async def test_a_free_answer_has_no_grammar() -> None:
    for body in ({}, {"tools": [tool()]}, {"response_format": {"type": "text"}}):
        assert (await sent(**body)).grammar is None
    assert (await sent()).shown_tokens == []


async def test_shapes_reach_the_engine_with_their_place_in_the_request() -> None:
    shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    grammar = (await sent(response_format=shape)).grammar
    assert grammar is not None
    (schema,) = grammar.schemas
    assert (json.loads(schema.json), schema.lenient) == (SCHEMA, False)
    assert schema.param == "response_format.json_schema.schema"
    pattern = (await sent(grammar={"syntax": "regex", "definition": "[0-9]+"})).grammar
    assert pattern is not None
    assert pattern.patterns == ["[0-9]+"]
    lark = (await sent(grammar='start: "a"')).grammar
    assert lark is not None
    assert (lark.lark, lark.param) == ('start: "a"', "grammar")


@pytest.mark.parametrize("name", sorted(FORMATS))
async def test_forced_calls_have_a_grammar_in_every_format(name: str) -> None:
    compiler = GrammarCompiler(TOKENIZER, TOKENIZER.vocab_size)
    served = model(tools=FORMATS[name])
    enough = {
        "type": "object",
        "properties": {
            "word": {"type": "string", "enum": ["yes", "no"]},
            "count": {"type": "integer", "minimum": 0, "maximum": 99},
            "flag": {"type": "boolean"},
        },
        "required": ["word", "count"],
        "additionalProperties": False,
    }
    tools = [tool(parameters=enough, strict=True), tool("stop", parameters={"type": "object", "properties": {}})]
    for body in (
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "add"}}, "parallel_tool_calls": False},
    ):
        request = await sent(served, tools=tools, **body)
        assert request.grammar is not None
        text = written(compiler, request.grammar, TOKENIZER)
        choice = await whole(text, served, tools=tools, **body)
        assert choice["finish_reason"] == "tool_calls", text
        for call in choice["message"]["tool_calls"]:
            arguments = json.loads(call["function"]["arguments"])
            assert call["function"]["name"] in {"add", "stop"}
            if call["function"]["name"] == "add":
                assert arguments["word"] in {"yes", "no"}
                assert 0 <= arguments["count"] <= 99
    thinking = replace(served, reasoning=ReasoningMarkers("<think>", "</think>"))
    if name != "harmony":
        free = (await sent(thinking, tools=tools)).grammar
        assert free is not None
        compiler.compile(free)


def written(compiler: Any, grammar: Any, tokenizer: Any) -> str:
    """A text that the grammar permits: of the tokens it allows, one chosen by a fixed rule."""
    constraint, chooser, tokens = compiler.compile(grammar), random.Random(7), []
    for _ in range(3000):
        allowed = constraint.allowed().nonzero()[0].tolist()
        if any(token in tokenizer.eos_ids for token in allowed):
            break
        tokens.append(chooser.choice(allowed))
        if constraint.accept(tokens[-1]):
            break
    return b"".join(map(tokenizer.token_bytes, tokens)).decode()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"a": [0] * 5000}}}},
            "response_format.json_schema.schema",
        ),
        (
            {
                "tools": [tool(parameters=json.loads('{"a": ' * 40 + "1" + "}" * 40))],
                "tool_choice": "required",
            },
            "tools[0].function.parameters",
        ),
    ],
)
async def test_depth_and_size_of_schemas_are_bounded(body: dict[str, Any], param: str) -> None:
    engine = FakeEngine()
    async with connect(engine) as client:
        response = await client.post(PATH, json={"messages": HELLO, **body})
    assert response.status_code == 400
    assert error_of(response)["param"] == param
    assert not engine.requests


async def test_what_the_worker_finds_wrong_with_a_schema_is_a_400() -> None:
    param = "response_format.json_schema.schema.properties.a"
    async with connect(FakeEngine(refusal("invalid_value", "Invalid", param))) as client:
        shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
        response = await client.post(PATH, json={"messages": HELLO, "response_format": shape, "stream": True})
    assert response.status_code == 400
    assert error_of(response)["param"] == param


async def test_a_template_that_knows_no_tools_gets_them_as_text() -> None:
    served = model("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "2"},
    ]
    prompt = str((await sent(served, messages=messages, tools=[tool()])).prompt)
    assert prompt.startswith("<system>")
    assert '"name": "add"' in prompt
    assert '<assistant><tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>' in prompt
    assert "<user><tool_response>\n2\n</tool_response>" in prompt
    system = [{"role": "system", "content": "Be brief."}, *HELLO]
    assert str((await sent(served, messages=system, tools=[tool()])).prompt).startswith("<system>Be brief.\n\nYou can")
