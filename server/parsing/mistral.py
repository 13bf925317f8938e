"""`[TOOL_CALLS]f[ARGS]{...}`, and before that `[TOOL_CALLS][{"name": "f", "arguments": {...}}]`: Mistral."""

from __future__ import annotations

from collections.abc import Sequence

from mixbit.server.parsing.hermes import json_call, object_rule
from mixbit.server.parsing.reader import MalformedError, Reader, Steps
from mixbit.server.parsing.tools import (
    MAX_NAME,
    Calls,
    Rules,
    Tool,
    ToolFormat,
    either,
    literal,
    several,
    short_call_id,
)
from mixbit.server.parsing.values import value

OPEN, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"


def read(reader: Reader, calls: Calls, _opener: str) -> Steps[None]:
    """Read a call, or a list of them, after the opener."""
    yield from reader.space()
    if (yield from reader.peek()) == "[":
        yield from _list(reader, calls)
        return
    name, mark = yield from reader.line((CALL_ID, ARGS), MAX_NAME)
    if mark == CALL_ID:
        yield from reader.line((ARGS,), MAX_NAME)
    calls.start(name.strip())
    yield from reader.space()
    if (yield from reader.peek()) != "{":
        raise MalformedError
    yield from value(reader, calls.arguments)
    calls.end()


def _list(reader: Reader, calls: Calls) -> Steps[None]:
    yield from reader.expect("[")
    while True:
        yield from reader.space()
        yield from json_call(reader, calls)
        calls.end()
        yield from reader.space()
        if (yield from reader.expect(",", "]")) == "]":
            return


def grammar(rules: Rules, tools: Sequence[Tool], most: int) -> str:
    """Calls after the first opener."""
    one = either([f"{literal(tool.name)} {rules.marker(ARGS)} {rules.arguments(tool)}" for tool in tools])
    return several(one, rules.marker(OPEN), most)


def list_grammar(rules: Rules, tools: Sequence[Tool], most: int) -> str:
    """A list of calls after the opener."""
    return f'"[" {several(either([object_rule(rules, tool) for tool in tools]), literal(", "), most)} "]"'


MISTRAL = ToolFormat("mistral", (OPEN,), (OPEN, ARGS, CALL_ID), read, grammar, new_id=short_call_id)
MISTRAL_LIST = ToolFormat("mistral-list", (OPEN,), (OPEN, ARGS, CALL_ID), read, list_grammar, new_id=short_call_id)
