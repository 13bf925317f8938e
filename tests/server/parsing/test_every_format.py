"""What holds for every tool format: values survive, cuts do not matter, nothing raises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mixbit.server.parsing.events import ArgumentsDelta
from mixbit.server.parsing.formats import FORMATS
from mixbit.server.parsing.machine import OutputParser
from tests.server.parsing.reading import THINK, TOOLS, cut, read, syntax
from tests.server.parsing.writing import WRITERS, Call

NASTY = [
    "null",
    "None",
    "true",
    "5",
    "",
    " ",
    "a\nb\n",
    '"quoted" \\n \\',
    "größer ☃ 😀 \u2028",
    "</parameter>",
    "a</parameter>\nb",
    "\n</parameter>\n",
    "<parameter=x>",
    "</tool_call>",
    "<tool_call>",
    "<function=read>",
    "</function>",
    "</arg_value>",
    "</arg_value> <b>",
    "</invoke>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "<|end|>",
    "]",
    "')",
    '{"a": 1}',
    "<think>",
    "</think>",
    "\ttab \x0b \x7f",
]
FRAGMENTS = [
    *NASTY,
    "<tool_call>\n",
    '{"name": "read", "arguments": {',
    "<function=read>\n<parameter=path>\n",
    "<arg_key>path</arg_key><arg_value>",
    "<minimax:tool_call>",
    '<invoke name="read">',
    "[read(path=",
    "'x'",
    ")]",
    "read",
    "<|channel|>commentary to=functions.read <|message|>",
    "<|channel|>analysis<|message|>",
    "<|start|>assistant",
    "<|call|>",
    '"path": "x"}}',
    "word ",
]
# GLM, and MiniMax, write no line break around a value, so the ends of text are all its own.
TEXT = st.one_of(st.sampled_from(NASTY), st.text(max_size=12))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "text": TEXT,
        "path": TEXT,
        "count": st.integers(),
        "ratio": st.floats(allow_nan=False, allow_infinity=False),
        "flag": st.booleans(),
        "items": st.lists(JSON, max_size=3),
        "options": st.dictionaries(TEXT, JSON, max_size=3),
    },
)
CALLS = st.lists(
    st.one_of(
        ARGUMENTS.map(lambda arguments: ("write", arguments)),
        TEXT.map(lambda path: ("read", {"path": path})),
        st.just(("now", {})),
    ),
    min_size=1,
    max_size=3,
)
CUTS = st.lists(st.integers(0, 10_000), max_size=12)
NAMES = sorted(WRITERS)


def test_every_format_has_a_writer_here() -> None:
    assert set(FORMATS) == set(WRITERS)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(CALLS, CUTS)
@example([("write", {"text": text, "count": 1}) for text in NASTY], [])
@example([("write", {"count": 1, "text": text}) for text in NASTY], [])
def test_calls_survive_whatever_their_values_are_and_wherever_the_text_is_cut(
    name: str, calls: list[Call], cuts: list[int]
) -> None:
    text = WRITERS[name](calls)
    output = read(syntax(name), cut(text, cuts))
    assert output.parsed == calls
    assert output.complete == [True] * len(calls)
    assert output.text == ""
    assert len(set(output.ids)) == len(calls)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=5), max_size=12), CUTS, st.booleans())
def test_any_text_is_read_the_same_however_it_is_cut(
    name: str, fragments: list[str], cuts: list[int], inside: bool
) -> None:
    text = "".join(fragments)
    kind = syntax(name, THINK, inside=inside)
    whole = read(kind, [text])
    assert read(kind, cut(text, cuts)).told() == whole.told()
    assert read(kind, list(text)).told() == whole.told()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(CALLS, st.integers(0, 10_000), CUTS)
def test_a_call_that_breaks_off_is_text_and_what_came_before_is_complete(
    name: str, calls: list[Call], end: int, cuts: list[int]
) -> None:
    text = WRITERS[name](calls)
    text = text[: end % (len(text) + 1)]
    output = read(syntax(name), cut(text, cuts))
    complete = [call for call, whole in zip(output.calls, output.complete, strict=True) if whole]
    assert len(complete) >= len(output.calls) - 1
    if not all(output.complete):
        assert output.text
    for (called, _), (expected, _) in zip(output.calls, calls, strict=False):
        assert called == expected


@pytest.mark.parametrize("name", [name for name in NAMES if name not in {"pythonic", "harmony"}])
def test_text_around_calls_stays_text(name: str) -> None:
    call = WRITERS[name]([("read", {"path": "x"})])
    output = read(syntax(name), [f"I shall look.\n\n{call}"])
    assert (output.text, output.parsed) == ("I shall look.", [("read", {"path": "x"})])
    for text in ("no call at all \n", "a < b <", "", "  \n", "[1] (a)", "<tool", "{"):
        output = read(syntax(name), list(text))
        assert (output.text, output.calls) == (text, [])


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_told_while_they_are_written(name: str) -> None:
    long = "word " * 50
    text = WRITERS[name]([("write", {"text": long})])
    parser = OutputParser(syntax(name), TOOLS)
    told = 0
    at_half = 0
    for place, character in enumerate(text):
        for event in parser.feed(character):
            if isinstance(event, ArgumentsDelta):
                told += len(event.text)
        if place == text.index(long) + len(long) // 2:
            at_half = told
    assert at_half > len(long) // 2 - 20


@pytest.mark.parametrize("name", [name for name in NAMES if name != "harmony"])  # whose names end at a space
def test_a_name_that_no_function_can_have_is_text(name: str) -> None:
    text = WRITERS[name]([("no such name!", {})])
    output = read(syntax(name), [text])
    assert output.calls == []
    assert output.text == text


def test_a_plain_output_passes_through_as_it_is() -> None:
    text = "<think> <tool_call> \n"
    assert read(syntax(None), list(text)).text == text


CODE = '__import__("pathlib").Path("written").write_text("by a call")'


@pytest.mark.parametrize("name", NAMES)
def test_code_in_the_place_of_a_value_is_never_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = WRITERS[name]([("write", {"count": 12345, "items": [12345], "text": CODE})]).replace("12345", CODE)
    output = read(syntax(name), list(text))
    for (_, arguments), complete in zip(output.calls, output.complete, strict=True):
        if complete:
            assert {type(value) for value in json.loads(arguments).values()} == {str}, "it can only be text"
    assert all(output.complete) != bool(output.text)
    assert list(tmp_path.iterdir()) == []
