"""gpt-oss: `<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...`.

Messages on channels: analysis is reasoning, a message addressed to `functions.f` is a call, the rest is text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from mixbit.server.parsing.reader import MalformedError, Reader, Steps
from mixbit.server.parsing.tools import Calls, Rules, Tool, ToolFormat, either, literal
from mixbit.server.parsing.values import value

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")
MAX_HEADER = 400
_RECIPIENT = re.compile(r"to=functions\.([^\s<]+)")


def recipient(header: str) -> str | None:
    """The function that a message calls."""
    found = _RECIPIENT.search(header)
    return found[1] if found else None


def is_reasoning(header: str) -> bool:
    """Whether a message is thinking."""
    return "analysis" in header


def read(reader: Reader, calls: Calls, name: str) -> Steps[None]:
    """Read a call after its header; `name` is the function's."""
    calls.start(name)
    yield from reader.space()
    if (yield from reader.peek()) != "{":
        raise MalformedError
    yield from value(reader, calls.arguments)
    yield from reader.space()
    yield from reader.accept(*ENDS)
    calls.end()


def grammar(rules: Rules, tools: Sequence[Tool], most: int) -> str:
    """One call after the opening of its channel: the model ends its turn with it."""
    heads = [
        f"{literal(f'commentary to=functions.{tool.name} ')} {rules.marker(CONSTRAIN)} {literal('json')} "
        f"{rules.marker(MESSAGE)} {rules.arguments(tool)}"
        for tool in tools
    ]
    return either(heads)


HARMONY = ToolFormat("harmony", (CHANNEL,), (START, CHANNEL, MESSAGE, CONSTRAIN, *ENDS), read, grammar)
