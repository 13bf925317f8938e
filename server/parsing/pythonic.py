"""`[f(a=1, b="x"), g()]`: Llama 4, Llama 3.2 and LFM2 write calls as Python does. They are read, never run."""

from __future__ import annotations

import json
from collections.abc import Sequence

from mixbit.server.parsing.coerce import properties
from mixbit.server.parsing.reader import MalformedError, Reader, Steps
from mixbit.server.parsing.tools import MAX_NAME, Calls, Rules, Tool, ToolFormat, either, literal, several
from mixbit.server.parsing.values import PYTHON, value

LFM_OPEN, LFM_CLOSE = "<|tool_call_start|>", "<|tool_call_end|>"
LLAMA_OPEN, LLAMA_CLOSE = "<|python_start|>", "<|python_end|>"


def read(reader: Reader, calls: Calls, opener: str) -> Steps[None]:
    """Read a list of calls after the opener."""
    if opener != "[":
        yield from reader.space()
        yield from reader.expect("[")
    while True:
        yield from reader.space()
        name, _ = yield from reader.line(("(",), MAX_NAME)
        if opener == "[" and name not in calls.tools:
            raise MalformedError  # without a marker it might be anything
        calls.start(name)
        yield from _keywords(reader, calls)
        calls.end()
        yield from reader.space()
        if (yield from reader.expect(",", "]")) == "]":
            break
    if opener != "[":
        yield from reader.space()
        yield from reader.accept(LFM_CLOSE, LLAMA_CLOSE)


def _keywords(reader: Reader, calls: Calls) -> Steps[None]:
    comma = "{"
    while True:
        yield from reader.space()
        if (yield from reader.accept(")")):
            break
        key, _ = yield from reader.line(("=",), MAX_NAME)
        if not key.strip().isidentifier():
            raise MalformedError
        calls.arguments(f"{comma}{json.dumps(key.strip(), ensure_ascii=False)}: ")
        comma = ", "
        yield from value(reader, calls.arguments, PYTHON)
        yield from reader.space()
        if (yield from reader.expect(",", ")")) == ")":
            break
    calls.arguments("{}" if comma == "{" else "}")


def _call(rules: Rules, tool: Tool) -> str:
    """Arguments in the order of the schema, values in JSON, which the reader takes too."""
    required = tool.parameters.get("required")
    needed = [key for key in properties(tool.parameters) if isinstance(required, list) and key in required]
    optional = [key for key in properties(tool.parameters) if key not in needed]
    shared = {name: tool.parameters[name] for name in ("$defs", "definitions") if name in tool.parameters}

    def argument(key: str) -> str:
        schema = properties(tool.parameters)[key]
        inner = {**shared, **schema} if isinstance(schema, dict) else schema
        param = f"{tool.param}.parameters.properties.{key}"
        return f"{literal(f'{key}=')} {rules.schema(inner, param, lenient=not tool.strict)}"

    parts = ' ", " '.join(argument(key) for key in needed)
    if needed:
        parts += "".join(f' (", " {argument(key)})?' for key in optional)
    else:  # any one of them first, then those behind it
        tails = [argument(key) for key in optional]
        chains = [" ".join([each, *(f'(", " {later})?' for later in tails[n + 1 :])]) for n, each in enumerate(tails)]
        parts = f"{either(chains)}?" if chains else ""
    return f'{literal(f"{tool.name}(")} {parts} ")"'


def grammar(rules: Rules, tools: Sequence[Tool], most: int) -> str:
    """A list of calls after the marker."""
    return f'"[" {_bare_grammar(rules, tools, most)}'


def _bare_grammar(rules: Rules, tools: Sequence[Tool], most: int) -> str:
    return f'{several(either([_call(rules, tool) for tool in tools]), literal(", "), most)} "]"'


_MARKERS = (LFM_OPEN, LFM_CLOSE, LLAMA_OPEN, LLAMA_CLOSE)
PYTHONIC = ToolFormat("pythonic", ("[", LFM_OPEN, LLAMA_OPEN), _MARKERS, read, _bare_grammar, at_start=True)
PYTHONIC_LFM = ToolFormat("pythonic-lfm", (LFM_OPEN,), _MARKERS, read, grammar)
PYTHONIC_LLAMA = ToolFormat("pythonic-llama", (LLAMA_OPEN,), _MARKERS, read, grammar)
