"""`<tool_call>{"name": "f", "arguments": {...}}</tool_call>`: Hermes, Qwen 2.5 and 3, and many others."""

from __future__ import annotations

import json
from collections.abc import Sequence

from mixbit.server.parsing.reader import MalformedError, Reader, Steps
from mixbit.server.parsing.tools import Calls, Rules, Tool, ToolFormat, either, literal, several
from mixbit.server.parsing.values import string, value

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_ARGUMENTS = ("arguments", "parameters")


def read(reader: Reader, calls: Calls, _opener: str) -> Steps[None]:
    """Read a call after its opener."""
    yield from reader.space()
    yield from json_call(reader, calls)
    yield from reader.space()
    yield from reader.accept(CLOSE)
    calls.end()


def json_call(reader: Reader, calls: Calls) -> Steps[None]:
    """Read an object with `name` and `arguments`, in any order; the call is started and not ended."""
    yield from reader.expect("{")
    name: str | None = None
    held: list[str] | None = None  # arguments that came before the name
    while True:
        yield from reader.space()
        key = yield from _text(reader)
        yield from reader.space()
        yield from reader.expect(":")
        yield from reader.space()
        if key == "name" and name is None:
            name = yield from _text(reader)
            calls.start(name)
            if held is not None:
                calls.arguments("".join(held))
        elif key in _ARGUMENTS and held is None:
            held = []
            yield from _arguments(reader, held, None if name is None else calls)
        else:
            yield from value(reader, lambda _: None)
        yield from reader.space()
        if (yield from reader.expect(",", "}")) == "}":
            break
    if name is None:
        raise MalformedError
    if held is None:
        calls.arguments("{}")


def _arguments(reader: Reader, held: list[str], calls: Calls | None) -> Steps[None]:
    """Read an object, or a string that holds one as some models write."""
    if (yield from reader.peek()) == "{":
        yield from value(reader, held.append if calls is None else calls.arguments)
        return
    text = yield from _text(reader)
    try:
        inner = json.loads(text)
    except (ValueError, RecursionError):
        raise MalformedError from None
    if not isinstance(inner, dict):
        raise MalformedError
    (held.append if calls is None else calls.arguments)(text)


def _text(reader: Reader) -> Steps[str]:
    """Read a string; returns what it means."""
    if (yield from reader.peek()) != '"':
        raise MalformedError
    pieces: list[str] = []
    yield from string(reader, pieces.append)
    text: str = json.loads("".join(pieces))
    return text


def object_rule(rules: Rules, tool: Tool) -> str:
    """The object of a call, in Lark."""
    head = f'{{"name": {json.dumps(tool.name)}, "arguments": '
    return f'{literal(head)} {rules.arguments(tool)} "}}"'


def grammar(rules: Rules, tools: Sequence[Tool], most: int) -> str:
    """Calls after the first opener."""
    one = f'"\\n" {either([object_rule(rules, tool) for tool in tools])} "\\n" {rules.marker(CLOSE)}'
    return several(f"({one})", f'"\\n" {rules.marker(OPEN)}', most)


HERMES = ToolFormat("hermes", (OPEN,), (OPEN, CLOSE), read, grammar)
