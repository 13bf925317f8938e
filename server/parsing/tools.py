"""What the tool formats share: the tools of a request, calls as they are read, and rules of their grammars."""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mixbit.engine.protocol import Grammar, Schema
from mixbit.server.parsing.events import ArgumentsDelta, Event, ToolCallEnd, ToolCallStart
from mixbit.server.parsing.reader import MalformedError, Reader, Steps

MAX_NAME = 128  # characters
_NAME = frozenset(string.ascii_letters + string.digits + "_.-/:")


def call_id() -> str:
    """A new id, as OpenAI's look."""
    return f"call_{secrets.token_hex(12)}"


def short_call_id() -> str:
    """Nine letters and digits: the only form that Mistral's templates take."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


@dataclass(frozen=True)
class Tool:
    """A function that may be called. parameters: the JSON schema of its arguments. param: its place in the request."""

    name: str
    parameters: Mapping[str, Any]
    strict: bool = False
    param: str = "tools"


class Calls:
    """Turns what a format reads into events. One call is open at a time."""

    def __init__(self, reader: Reader, tools: Mapping[str, Tool], new_id: Callable[[], str]) -> None:
        self.tools = tools
        self.events: list[Event] = []
        self.completed = 0
        self._reader, self._new_id = reader, new_id
        self._started = 0
        self._open = False

    def start(self, name: str) -> None:
        """A call has been recognised. Raises MalformedError unless `name` can be a function's."""
        if not 0 < len(name) <= MAX_NAME or not _NAME.issuperset(name):
            raise MalformedError
        self._open = True
        self.events.append(ToolCallStart(self._started, self._new_id(), name))
        self._started += 1

    def arguments(self, text: str) -> None:
        """More JSON of the open call's arguments."""
        self.events.append(ArgumentsDelta(self._started - 1, text))

    def end(self) -> None:
        """The open call is complete."""
        self._close(complete=True)
        self.completed += 1
        self._reader.mark()

    def abandon(self) -> None:
        """What was being read is malformed."""
        if self._open:
            self._close(complete=False)

    def schema(self, name: str) -> Mapping[str, Any]:
        """The parameters of a tool; nothing is known of one that was not offered."""
        tool = self.tools.get(name)
        return {} if tool is None else tool.parameters

    def _close(self, *, complete: bool) -> None:
        self._open = False
        self.events.append(ToolCallEnd(self._started - 1, complete))


@dataclass
class Rules:
    """A grammar being written, in the terms of `mixbit.engine.protocol.Grammar`."""

    param: str
    schemas: list[Schema] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)
    markers: list[str] = field(default_factory=list)

    def schema(self, schema: Any, param: str, *, lenient: bool) -> str:
        """JSON that fits a schema."""
        self.schemas.append(Schema(json=json.dumps(schema), param=param, lenient=lenient))
        return f"schema_{len(self.schemas) - 1}"

    def arguments(self, tool: Tool) -> str:
        """JSON of a tool's arguments: none but its own, unless it says otherwise."""
        closed = {"additionalProperties": False} if "properties" in tool.parameters else {}
        schema = {**closed, **tool.parameters, "type": "object"}
        return self.schema(schema, f"{tool.param}.parameters", lenient=not tool.strict)

    def pattern(self, regex: str) -> str:
        """Text that fits a regular expression."""
        if regex not in self.patterns:
            self.patterns.append(regex)
        return f"pattern_{self.patterns.index(regex)}"

    def marker(self, text: str) -> str:
        """A marker, which may be one token."""
        return f"marker_{self._marker(text)}"

    def until(self, text: str) -> str:
        """Any text, then the marker."""
        return f"until_{self._marker(text)}"

    def without(self, text: str) -> str:
        """Any text that does not hold the marker."""
        return f"without_{self._marker(text)}"

    def grammar(self, start: str) -> Grammar:
        """The grammar whose whole is `start`."""
        return Grammar(
            lark=f"start: {start}",
            param=self.param,
            schemas=self.schemas,
            patterns=self.patterns,
            markers=self.markers,
        )

    def _marker(self, text: str) -> int:
        if text not in self.markers:
            self.markers.append(text)
        return self.markers.index(text)


def literal(text: str) -> str:
    """Exactly this text, in Lark."""
    return json.dumps(text, ensure_ascii=False)


def either(expressions: Sequence[str]) -> str:
    """One of several, in Lark."""
    return f"({' | '.join(expressions)})"


def several(one: str, separator: str, most: int) -> str:
    """One to `most` of the same, in Lark."""
    return one if most == 1 else f"{one} ({separator} {one}){{0,{most - 1}}}"


@dataclass(frozen=True)
class ToolFormat:
    """How a family of models writes calls.

    openers: a call begins with one of these. read: reads a call whose opener has been read, or raises
    MalformedError. grammar: what follows the opener `openers[0]` for up to so many calls of some tools, in
    Lark. markers: all that may be a special token. at_start: openers count only where the output begins.
    """

    name: str
    openers: tuple[str, ...]
    markers: tuple[str, ...]
    read: Callable[[Reader, Calls, str], Steps[None]]
    grammar: Callable[[Rules, Sequence[Tool], int], str]
    new_id: Callable[[], str] = call_id
    at_start: bool = False
