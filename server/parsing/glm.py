"""`<tool_call>f<arg_key>key</arg_key><arg_value>value</arg_value></tool_call>`: GLM 4.5 and later."""

from __future__ import annotations

from collections.abc import Sequence

from mixbit.server.parsing.reader import Pattern, Reader, Steps
from mixbit.server.parsing.tagged import Tags, argument_rules, arguments
from mixbit.server.parsing.tools import MAX_NAME, Calls, Rules, Tool, ToolFormat, either, literal, several

OPEN, CLOSE = "<tool_call>", "</tool_call>"
TAGS = Tags("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", newlines=False)
_ENDING: Pattern = CLOSE


def read(reader: Reader, calls: Calls, _opener: str) -> Steps[None]:
    """Read a call after its opener."""
    pieces: list[str] = []
    yield from reader.space()
    while (character := (yield from reader.peek())) not in ("", "<", "\n") and len(pieces) <= MAX_NAME:
        pieces.append(reader.take(len(character)))
    name = "".join(pieces).strip()
    yield from reader.space()
    if not (yield from reader.looking_at((TAGS.before, CLOSE))):
        pieces.clear()  # prose, not a name
    calls.start(name if pieces else "")
    yield from arguments(reader, calls, name, TAGS, _ENDING)
    yield from reader.expect(CLOSE)
    calls.end()


def grammar(rules: Rules, tools: Sequence[Tool], most: int) -> str:
    """Calls after the first opener."""
    bodies = [f"{literal(tool.name + chr(10))} {argument_rules(rules, tool, TAGS)}" for tool in tools]
    one = f"({either(bodies)} {rules.marker(CLOSE)})"
    return several(one, f'"\\n" {rules.marker(OPEN)}', most)


GLM = ToolFormat("glm", (OPEN,), (OPEN, CLOSE, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"), read, grammar)
