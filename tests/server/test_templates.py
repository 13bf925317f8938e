"""The template sandbox: what templates may do, and when they are stopped."""

from __future__ import annotations

import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from mixbit.server.model import ModelFileError, describe_model
from mixbit.server.presets import load_presets
from mixbit.server.settings import TemplateLimits
from mixbit.server.templates import ChatTemplate, ChatTemplateError, RenderError


async def render(source: str, limits: TemplateLimits | None = None, **variables: Any) -> str:
    template = ChatTemplate({"default": source}, {"bos_token": "<s>"}, limits or TemplateLimits(5.0, 10_000))
    return await template.render(variables, has_tools=False)


async def test_blocks_are_trimmed_as_the_field_does() -> None:
    assert await render("  {% if true %}\n  a\n  {% endif %}\nb") == "  a\nb"


async def test_names_that_templates_use() -> None:
    assert await render("{{ bos_token }}") == "<s>"
    assert await render("{{ strftime_now('%Y') }}") == str(datetime.now().year)
    assert await render("{{ x | tojson }}", x={"b": "é<&>'", "a": [1, None]}) == '{"b": "é<&>\'", "a": [1, null]}'
    assert await render("{{ x | tojson(indent=2) }}", x={"b": 1}) == json.dumps({"b": 1}, indent=2)
    assert await render("{% for i in [1, 2, 3] %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}") == "13"
    assert await render("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "1"
    assert await render("{% generation %}x{{ 1 }}{% endgeneration %}y") == "x1y"
    assert await render("{% macro f(x) %}({{ x }}){% endmacro %}{{ f(1) }}{{ f(2) }}") == "(1)(2)"
    assert await render("{% set ns = namespace(a=1) %}{% set ns.a = 2 %}{{ ns.a }}") == "2"
    assert await render("{{ missing }}{{ '-' * 3 }}{{ 2 * 3 }}") == "---6"


async def test_constants_win_over_variables() -> None:
    assert await render("{{ bos_token }}", bos_token="evil") == "<s>"


async def test_raise_exception_is_quoted() -> None:
    with pytest.raises(RenderError, match="roles must alternate"):
        await render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(1) }}",
        "{% include 'x' %}",
        "{{ 1 / 0 }}",
        "{{ missing.field.deeper }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
async def test_what_templates_may_not_do(source: str) -> None:
    with pytest.raises(RenderError):
        await render(source, messages=[])


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for i in range(99999) %}{% set x = i %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    ],
)
async def test_time_is_bounded(source: str) -> None:
    start = time.monotonic()
    with pytest.raises(RenderError, match="longer than"):
        await render(source, TemplateLimits(0.2, 10_000))
    assert time.monotonic() - start < 5
    assert await render("still alive") == "still alive"


@pytest.mark.parametrize(
    "source",
    ["{% for i in range(99999) %}0123456789{% endfor %}", "{{ 'x' * 10000000000 }}", "{{ 10 ** 100 ** 100 }}"],
)
async def test_size_is_bounded(source: str) -> None:
    with pytest.raises(RenderError, match="stopped"):
        await render(source)


# Each would take gigabytes or minutes in one call into C, where no deadline is looked at.
BOMBS = [
    "{{ 'x' | center(10000000000) }}",
    "{{ 'x'.center(10000000000) }}",
    "{{ 'x'.ljust(width=10000000000) }}",
    "{{ 'x'.zfill(10000000000) }}",
    "{{ ('\\t' * 9000).expandtabs(100000) }}",
    "{{ ('x' * 9000).replace('x', 'y' * 9000) }}",
    "{{ ('x' * 9000) | replace('', 'y' * 9000) }}",
    "{{ ('x' * 9000).join('y' * 9000) }}",
    "{{ 'xy' | map('upper') | join('y' * 9000) }}",
    "{{ range(9000) | join('y' * 9000) }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '%*d' % (10000000000, 1) }}",
    "{{ '%10000000000d' | format(1) }}",
    "{{ '{:>10000000000}'.format(1) }}",
    "{{ '{:>{}}'.format('x', 10000000000) }}",
    "{{ '{x:>10000000000}'.format_map({'x': 1}) }}",
    "{{ ('x\\n' * 4000) | indent(10000000000) }}",
    "{{ ('x\\n' * 4000) | indent('y' * 9000) }}",
    "{{ ('x y ' * 2000) | wordwrap(1, wrapstring='y' * 9000) }}",
    "{{ ['x'] | batch(10000000000, 'y') | list }}",
    "{{ ['x'] | slice(10000000000) | list }}",
    "{{ [1] | tojson(indent=10000000000) }}",
    "{{ 5 | round(-1000000000) }}",
    "{{ [('x' * 9000)] * 9000 }}",
    "{{ ([('x' * 9000)] * 9000) | string }}",
    "{% set n = namespace(x='xx') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x='xx') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
    "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}{% set n = namespace(x='x') %}"
    "{% for i in range(60) %}{% set n.x = f(n.x) %}{% endfor %}",
    "{% set n = namespace(x=[]) %}{% set s = 'x' * 9000 %}"
    "{% for i in range(9000) %}{% set n.x = n.x + [s[1:]] %}{% endfor %}",
    "{% set n = namespace(x=9) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "{{ strftime_now('%10000000000d') }}",
]


@pytest.mark.parametrize("source", BOMBS)
async def test_what_one_call_makes_is_bounded(source: str) -> None:
    start = time.monotonic()
    with pytest.raises(RenderError, match="stopped"):
        await render(source)
    assert time.monotonic() - start < 2


async def test_bounded_calls_still_work() -> None:
    assert await render("{{ 'x' | center(3) }}{{ 'x'.rjust(3) }}") == " x   x"
    assert await render("{{ ['a', 'b'] | join(', ') }}{{ '-'.join(['a', 'b']) }}") == "a, ba-b"
    assert await render("{{ ['a', 1] | map('string') | join }}{{ 'a' ~ 1 ~ none }}") == "a1a1None"
    assert await render("{{ 'aXb'.replace('X', '--') }}{{ 'a b' | replace(' ', '_') }}") == "a--ba_b"
    assert await render("{{ '%s=%03d' | format('n', 7) }}{{ '{}:{:>3}'.format('n', 7) }}") == "n=007n:  7"
    assert await render("{{ 'a\nb' | indent(2) }}{{ [1] | tojson(indent=2) }}") == "a\n  b[\n  1\n]"
    assert await render("{{ 'abcdef'[1:-1:2] }}{{ [1, 2, 3][::-1] }}{{ x[0] }}", x="yz") == "bd[3, 2, 1]y"
    assert await render("{{ 2.345 | round(1) }}{{ [3, 1] | sort | first }}{{ 5 % 3 }}{{ 1 + 1 }}") == "2.3122"
    assert await render("{% set x %}a{{ 1 }}{% endset %}{{ x }}{{ [1] + [2] }}{{ 'a' + 'b' }}") == "a1[1, 2]ab"
    assert await render("{{ 1700000000000 | default(1) }}{{ 1700000000000 | string }}") == "17000000000001700000000000"


def test_a_broken_template_says_where() -> None:
    with pytest.raises(ChatTemplateError, match="line 2"):
        ChatTemplate({"default": "a\n{% if %}"}, {})


async def test_tool_use_template_is_for_tools() -> None:
    template = ChatTemplate({"default": "plain", "tool_use": "tools"}, {})
    assert await template.render({}, has_tools=False) == "plain"
    assert await template.render({}, has_tools=True) == "tools"


# --- model directories ---


def write(directory: Path, **files: Any) -> Path:
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (directory / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return directory


async def rendered(directory: Path, **options: Any) -> str:
    template = describe_model(directory, ["m"], **options).template
    assert template is not None
    return await template.render({}, has_tools=False)


async def test_where_templates_are_found(tmp_path: Path) -> None:
    assert describe_model(tmp_path, ["m"]).template is None
    write(tmp_path, chat_template__json={"chat_template": "oldest"})
    assert await rendered(tmp_path) == "oldest"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "named {{ eos_token }}"}]
    write(tmp_path, tokenizer_config__json={"chat_template": named, "eos_token": {"content": "</s>"}})
    assert await rendered(tmp_path) == "named </s>"
    write(tmp_path, tokenizer_config__json={"chat_template": "plain {{ bos_token }}", "bos_token": "<s>"})
    assert await rendered(tmp_path) == "plain <s>"
    write(tmp_path, chat_template__jinja="file {{ bos_token }}")
    assert await rendered(tmp_path) == "file <s>"
    own = write(tmp_path, mine__txt="mine {{ bos_token }}") / "mine.txt"
    assert await rendered(tmp_path, chat_template=own) == "mine <s>"


def test_a_models_broken_template_leaves_the_rest_working(tmp_path: Path) -> None:
    model = describe_model(write(tmp_path, chat_template__jinja="{% if %}"), ["m"])
    assert model.template is None
    assert "line 1" in model.template_problem
    with pytest.raises(ChatTemplateError):
        describe_model(tmp_path, ["m"], tmp_path / "chat_template.jinja")


def test_defaults_come_from_generation_config_then_preset(tmp_path: Path) -> None:
    write(
        tmp_path,
        config__json={"model_type": "qwen3_moe"},
        generation_config__json={"temperature": 0.9, "eos_token_id": 1},
    )
    defaults = describe_model(tmp_path, ["Qwen3-Coder-30B"]).defaults
    assert (defaults.temperature, defaults.top_p, defaults.top_k, defaults.repetition_penalty) == (0.9, 0.8, 20, 1.05)
    unknown = write(tmp_path, config__json={"model_type": "other"})
    assert describe_model(unknown, ["thing"]).defaults.top_p is None


@pytest.mark.parametrize(
    ("files", "word"),
    [
        ({"config__json": "{"}, "config.json"),
        ({"tokenizer_config__json": "[]"}, "tokenizer_config.json"),
        ({"generation_config__json": {"temperature": "hot"}}, "temperature"),
        ({"generation_config__json": {"top_p": 7}}, "top_p"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, files: dict[str, Any], word: str) -> None:
    with pytest.raises(ModelFileError, match=word):
        describe_model(write(tmp_path, **files), ["m"])


def test_fill_in_the_middle_needs_the_tokens(tmp_path: Path) -> None:
    names = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
    write(tmp_path, config__json={"model_type": "qwen2"}, tokenizer__json={"added_tokens": [], "model": {"vocab": {}}})
    assert describe_model(tmp_path, ["Qwen2.5-Coder-7B"]).fim is None
    write(tmp_path, tokenizer__json={"added_tokens": [{"id": n, "content": text} for n, text in enumerate(names)]})
    fim = describe_model(tmp_path, ["Qwen2.5-Coder-7B"]).fim
    assert fim is not None
    assert fim.prompt("a", "b") == "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>"
    assert describe_model(tmp_path, ["Qwen2.5-7B"]).fim is None


def test_presets_are_sound() -> None:
    presets = load_presets()
    assert len({preset.name for preset in presets}) == len(presets)
    assert all(preset.model_types or preset.names for preset in presets)
    assert all(name == name.lower() for preset in presets for name in preset.names)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, ["not quantized"]),
        ({"quantization": {"bits": 4, "group_size": 64}}, ["4-bit, group 64"]),
        (
            {"quantization": {"bits": 4, "group_size": 32, "a": {"bits": 8}, "b": {"bits": 8}, "c": False, "d": True}},
            ["4-bit, group 32", "8-bit: 2 matrices", "unquantized: 1 matrix"],
        ),
    ],
)
def test_quantization_in_a_line(tmp_path: Path, config: dict[str, Any], words: list[str]) -> None:
    summary = describe_model(write(tmp_path, config__json=config), ["m"]).quantization
    assert summary.split("; ") == words
