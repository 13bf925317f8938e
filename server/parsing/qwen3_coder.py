"""`<tool_call><function=f><parameter=key>value</parameter></function></tool_call>`: Qwen3-Coder and Qwen3.5.

Models leave out the outer tags at times.
"""

from __future__ import annotations

from collections.abc import Sequence

from mixbit.server.parsing.reader import END, SPACE, Pattern, Reader, Steps
from mixbit.server.parsing.tagged import Tags, argument_rules, arguments
from mixbit.server.parsing.tools import MAX_NAME, Calls, Rules, Tool, ToolFormat, either, literal, several

OPEN, CLOSE, FUNCTION, END_FUNCTION = "<tool_call>", "</tool_call>", "<function=", "</function>"
TAGS = Tags("<parameter=", ">", "", "</parameter>", newlines=True)
_ENDING: Pattern = [END_FUNCTION, SPACE, (CLOSE, FUNCTION, END)]


def read(reader: Reader, calls: Calls, opener: str) -> Steps[None]:
    """Read a call after its opener."""
    if opener == OPEN:
        yield from reader.space()
        yield from reader.expect(FUNCTION)
    name, _ = yield from reader.line((">",), MAX_NAME)
    calls.start(name.strip())
    yield from arguments(reader, calls, name.strip(), TAGS, _ENDING)
    yield from reader.expect(END_FUNCTION)
    yield from reader.space()
    yield from reader.accept(CLOSE)
    calls.end()


def grammar(rules: Rules, tools: Sequence[Tool], most: int) -> str:
    """Calls after the first opener."""
    bodies = [f"{literal(f'{FUNCTION}{tool.name}>{chr(10)}')} {argument_rules(rules, tool, TAGS)}" for tool in tools]
    one = f'("\\n" {either(bodies)} "{END_FUNCTION}\\n" {rules.marker(CLOSE)})'
    return several(one, f'"\\n" {rules.marker(OPEN)}', most)


QWEN3_CODER = ToolFormat("qwen3-coder", (OPEN, FUNCTION), (OPEN, CLOSE), read, grammar)
