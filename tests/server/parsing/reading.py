"""Reads a whole output as a client would put it together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mixbit.server.parsing.events import (
    ArgumentsDelta,
    Event,
    ReasoningDelta,
    TextDelta,
    ToolCallEnd,
    ToolCallStart,
)
from mixbit.server.parsing.formats import FORMATS
from mixbit.server.parsing.machine import OutputParser, ReasoningMarkers, Syntax
from mixbit.server.parsing.tools import Tool

THINK = ReasoningMarkers("<think>", "</think>")
PROPERTIES = {
    "path": {"type": "string"},
    "text": {"type": "string"},
    "count": {"type": "integer"},
    "ratio": {"type": "number"},
    "flag": {"type": "boolean"},
    "items": {"type": "array"},
    "options": {"$ref": "#/$defs/options"},
    "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    "free": {},
}
TOOLS = {
    "write": Tool("write", {"type": "object", "properties": PROPERTIES, "$defs": {"options": {"type": "object"}}}),
    "read": Tool("read", {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}),
    "now": Tool("now", {"type": "object", "properties": {}}),
}


@dataclass
class Output:
    text: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    complete: list[bool] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)

    @property
    def parsed(self) -> list[tuple[str, Any]]:
        return [(name, json.loads(arguments)) for name, arguments in self.calls]

    def told(self) -> tuple[Any, ...]:
        """All but the random ids."""
        return self.text, self.reasoning, self.calls, self.complete


def collect(events: Sequence[Event]) -> Output:
    output = Output()
    for event in events:
        match event:
            case TextDelta():
                output.text += event.text
            case ReasoningDelta():
                output.reasoning += event.text
            case ToolCallStart():
                assert event.index == len(output.calls) == len(output.complete)
                output.calls.append((event.name, ""))
                output.ids.append(event.id)
            case ArgumentsDelta():
                assert event.index == len(output.calls) - 1
                name, before = output.calls[event.index]
                output.calls[event.index] = (name, before + event.text)
            case ToolCallEnd():
                assert event.index == len(output.complete) == len(output.calls) - 1
                output.complete.append(event.complete)
    assert len(output.complete) == len(output.calls)
    for (_, arguments), complete in zip(output.calls, output.complete, strict=True):
        if complete:
            assert isinstance(json.loads(arguments), dict), arguments
    return output


def syntax(name: str | None, reasoning: ReasoningMarkers | None = None, *, inside: bool = False) -> Syntax:
    tools = None if name is None else FORMATS[name]
    return Syntax(tools, reasoning, inside, channels=name == "harmony")


def read(kind: Syntax, pieces: Sequence[str]) -> Output:
    parser = OutputParser(kind, TOOLS)
    events: list[Event] = []
    for piece in pieces:
        events += parser.feed(piece)
    output = collect(events + parser.finish())
    assert parser.called == any(output.complete)
    return output


def cut(text: str, places: Sequence[int]) -> list[str]:
    """The text cut at places, which are taken modulo its length."""
    inner = sorted({place % (len(text) + 1) for place in places})
    return [text[a:b] for a, b in zip([0, *inner], [*inner, len(text)], strict=True)]
