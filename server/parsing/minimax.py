"""`<minimax:tool_call><invoke name="f"><parameter name="key">value</parameter></invoke></minimax:tool_call>`.

MiniMax M2. One block holds any number of calls.
"""

from __future__ import annotations

from collections.abc import Sequence

from mixbit.server.parsing.reader import END, SPACE, MalformedError, Pattern, Reader, Steps
from mixbit.server.parsing.tagged import Tags, argument_rules, arguments
from mixbit.server.parsing.tools import MAX_NAME, Calls, Rules, Tool, ToolFormat, either, literal, several

OPEN, CLOSE, INVOKE, END_INVOKE = "<minimax:tool_call>", "</minimax:tool_call>", '<invoke name="', "</invoke>"
TAGS = Tags('<parameter name="', '">', "", "</parameter>", newlines=False)
_ENDING: Pattern = [END_INVOKE, SPACE, (CLOSE, INVOKE, END)]


def read(reader: Reader, calls: Calls, _opener: str) -> Steps[None]:
    """Read a block after its opener."""
    yield from reader.space()
    yield from reader.expect(INVOKE)
    while True:
        name, _ = yield from reader.line(('">',), MAX_NAME)
        calls.start(name)
        yield from arguments(reader, calls, name, TAGS, _ENDING)
        yield from reader.expect(END_INVOKE)
        calls.end()
        yield from reader.space()
        found = yield from reader.accept(INVOKE, CLOSE)
        if found == INVOKE:
            continue
        if found is None and (yield from reader.peek()):
            raise MalformedError
        return


def grammar(rules: Rules, tools: Sequence[Tool], most: int) -> str:
    """Calls after the opener."""
    bodies = [
        f"{literal(f'{INVOKE}{tool.name}{chr(34)}>{chr(10)}')} {argument_rules(rules, tool, TAGS)}" for tool in tools
    ]
    return f'"\\n" {several(f"({either(bodies)} {literal(END_INVOKE + chr(10))})", "", most)} {rules.marker(CLOSE)}'


MINIMAX = ToolFormat("minimax", (OPEN,), (OPEN, CLOSE), read, grammar)
