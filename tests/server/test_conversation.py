"""How messages reach the template."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fakes import FakeEngine
from tests.server.support import connect, error_of, served_model

PATH = "/v1/chat/completions"


async def prompt_of(messages: list[dict[str, Any]], template: str | None = None, **body: Any) -> str:
    engine = FakeEngine()
    model = served_model(template) if template else served_model()
    async with connect(engine, model) as client:
        response = await client.post(PATH, json={"messages": messages, **body})
    assert response.status_code == 200, response.text
    prompt = engine.requests[0].prompt
    assert isinstance(prompt, str)
    return prompt


async def refused(messages: Any, template: str | None = None, **body: Any) -> dict[str, Any]:
    engine = FakeEngine()
    model = served_model(template) if template else served_model()
    async with connect(engine, model) as client:
        response = await client.post(PATH, json={"messages": messages, **body})
    assert response.status_code == 400, response.text
    assert not engine.requests
    return error_of(response)


async def test_content_may_be_text_null_or_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages: list[dict[str, Any]] = [{"role": "system", "content": None}, {"role": "user", "content": parts}]
    assert await prompt_of(messages) == "<system></><user>a\nb</><assistant>"


async def test_developer_is_system_unless_the_template_knows_it() -> None:
    messages = [{"role": "developer", "content": "x"}, {"role": "user", "content": "y"}]
    assert (await prompt_of(messages)).startswith("<system>x</>")
    knowing = "{# developer #}{% for m in messages %}{{ m.role }} {% endfor %}"
    assert (await prompt_of(messages, knowing)).startswith("developer user")


async def test_tools_are_given_to_the_template_unless_none_may_be_chosen() -> None:
    messages = [{"role": "user", "content": "x"}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    assert '"name": "f"' in await prompt_of(messages, tools=tools)
    assert await prompt_of(messages, tools=tools, tool_choice="none") == "<user>x</><assistant>"


async def test_arguments_of_earlier_calls_are_objects_where_they_can_be() -> None:
    template = (
        "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
    )
    calls = [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": text}}
        for text in ('{"a": [1]}', "nonsense")
    ]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "content": "r"},
    ]
    assert await prompt_of(messages, template) == '{"a": [1]}"nonsense"'


async def test_a_last_assistant_message_is_continued() -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "It is "}]
    assert await prompt_of(messages) == "<user>x</><assistant>It is "


async def test_a_template_that_drops_the_last_message_cannot_continue_it() -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    error = await refused(messages, "{{ messages[0].content }}")
    assert error["param"] == "messages[1]"


async def test_a_last_message_with_calls_needs_results() -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": "{}"}}
    error = await refused([{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}])
    assert error["param"] == "messages[1]"


async def test_the_templates_own_words_are_quoted() -> None:
    error = await refused([{"role": "user", "content": "refuse me"}])
    assert error["code"] == "chat_template_error"
    assert "I will not read this" in error["message"]


async def test_a_model_without_a_template_says_what_to_do() -> None:
    async with connect(FakeEngine(), served_model(template=None)) as client:
        response = await client.post(PATH, json={"messages": [{"role": "user", "content": "x"}]})
    assert response.status_code == 400
    assert "--chat-template" in error_of(response)["message"]


async def test_template_kwargs_reach_the_template() -> None:
    template = "{{ enable_thinking }} {{ reasoning_effort }}"
    kwargs = {"enable_thinking": False}
    messages = [{"role": "user", "content": "x"}]
    assert await prompt_of(messages, template, chat_template_kwargs=kwargs, reasoning_effort="low") == "False low"


@pytest.mark.parametrize(
    "name",
    [
        "messages",
        "tools",
        "add_generation_prompt",
        "tokenize",
        "bos_token",
        "raise_exception",
        "range",
        "_x",
        "a b",
        "",
    ],
)
async def test_template_kwargs_cannot_take_control(name: str) -> None:
    error = await refused([{"role": "user", "content": "x"}], chat_template_kwargs={name: "evil"})
    assert error["param"] == "chat_template_kwargs"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hello", "messages"),
        (None, "messages"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "robot", "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": "x"}, "y"], "messages[1]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
            "messages[0].content[0].type",
        ),
        ([{"role": "assistant", "tool_calls": [{"id": "1"}]}], "messages[0].tool_calls[0].function"),
    ],
)
async def test_malformed_messages_are_named(messages: Any, param: str) -> None:
    error = await refused(messages)
    assert error["param"] == param
    if "image" in str(messages):
        assert "image_url" in error["message"]
