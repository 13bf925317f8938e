"""The one machine that holds text back until it is known what it is: reasoning, answer, or a call.

parser = OutputParser(syntax, tools)
events = parser.feed(text) + parser.feed(more) + parser.finish()
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mixbit.server.parsing import harmony
from mixbit.server.parsing.events import Event, ReasoningDelta, TextDelta, joined
from mixbit.server.parsing.reader import MalformedError, Reader, Sink, Steps
from mixbit.server.parsing.tools import Calls, Tool, ToolFormat, call_id


@dataclass(frozen=True)
class ReasoningMarkers:
    """What surrounds the thinking."""

    open: str
    close: str


@dataclass(frozen=True)
class Syntax:
    """What is to be told apart in an output.

    tools: None if calls are not looked for. inside: the prompt has opened the thinking already.
    """

    tools: ToolFormat | None = None
    reasoning: ReasoningMarkers | None = None
    inside: bool = False
    channels: bool = False  # messages on channels, as harmony.py describes

    @property
    def plain(self) -> bool:
        """Whether all is text."""
        return self.tools is None and self.reasoning is None and not self.channels

    @property
    def markers(self) -> list[str]:
        """Special tokens that must be part of the text."""
        found = [*(self.tools.markers if self.tools else ()), *(harmony.HARMONY.markers if self.channels else ())]
        if self.reasoning is not None:
            found += [self.reasoning.open, self.reasoning.close]
        return list(dict.fromkeys(found))


class OutputParser:
    """Reads one output. What it says, joined, does not depend on how the text was cut."""

    def __init__(self, syntax: Syntax, tools: Mapping[str, Tool]) -> None:
        self._syntax = syntax
        self._reader = Reader()
        self._calls = Calls(self._reader, tools, syntax.tools.new_id if syntax.tools else call_id)
        self._run: Steps[None] = self._harmony() if syntax.channels else self._all()

    @property
    def called(self) -> bool:
        """Whether a complete call has been read."""
        return self._calls.completed > 0

    def feed(self, text: str) -> list[Event]:
        """What more text makes known."""
        if self._syntax.plain:
            return [TextDelta(text)] if text else []
        self._reader.feed(text)
        return self._advance()

    def finish(self) -> list[Event]:
        """What is left when the output has ended."""
        if self._syntax.plain:
            return []
        self._reader.end()
        return self._advance()

    def _advance(self) -> list[Event]:
        next(self._run, None)
        events = joined(self._calls.events)
        self._calls.events.clear()
        return events

    def _say(self, text: str) -> None:
        self._calls.events.append(TextDelta(text))

    def _think(self, text: str) -> None:
        self._calls.events.append(ReasoningDelta(text))

    def _all(self) -> Steps[None]:
        space = yield from self._reasoning()
        tools = self._syntax.tools
        if tools is None:
            self._say(space)
            yield from self._reader.until((), self._say)
            return
        if tools.at_start:
            opener = yield from self._reader.accept(*tools.openers)
            if opener is None:
                self._say(space)
                yield from self._reader.until((), self._say)
                return
            space = yield from self._call(tools, opener, space)
        text = _Trimmed(self._say, space)
        while (opener := (yield from self._reader.until(tools.openers, text.add))) is not None:
            text.space = yield from self._call(tools, opener, text.space)
        text.flush()

    def _call(self, tools: ToolFormat, opener: str, space: str) -> Steps[str]:
        """Read a call after its opener. Returns white space that is not said yet: none after a call."""
        self._reader.mark()
        completed = self._calls.completed
        try:
            yield from tools.read(self._reader, self._calls, opener)
        except MalformedError:
            self._calls.abandon()
            if completed == self._calls.completed:
                self._say(space + opener)
            self._say(self._reader.since_mark())
        return ""

    def _reasoning(self) -> Steps[str]:
        """Read thinking at the start. Returns the white space before the answer, if it was not thinking."""
        reader, markers = self._reader, self._syntax.reasoning
        if markers is None:
            return ""
        if not self._syntax.inside:
            space = yield from reader.space()
            if not (yield from reader.accept(markers.open)):
                return space
        yield from reader.space()
        thought = _Trimmed(self._think)
        if (yield from reader.until((markers.close,), thought.add)) is not None:
            yield from reader.space()
        return ""

    def _harmony(self) -> Steps[None]:
        """Read messages. Text without a header is said as it is."""
        reader = self._reader
        while (yield from reader.peek()):
            reader.mark()
            yield from reader.accept(harmony.START)
            header: list[str] = []
            if reader.since_mark() or (yield from reader.looking_at(harmony.CHANNEL)):
                found = yield from reader.until((harmony.MESSAGE, *harmony.ENDS), header.append)
                if found != harmony.MESSAGE:
                    if found is None:
                        self._say("".join(header))
                    continue
            head = "".join(header)
            name = harmony.recipient(head)
            if name is not None and self._syntax.tools is not None:
                try:
                    yield from harmony.read(reader, self._calls, name)
                except MalformedError:
                    self._calls.abandon()
                    self._say(reader.since_mark())
            else:
                sink = self._think if harmony.is_reasoning(head) else self._say
                yield from reader.until(harmony.ENDS, sink)


class _Trimmed:
    """Passes text on, without white space that nothing has followed yet."""

    def __init__(self, sink: Sink, space: str = "") -> None:
        self._sink = sink
        self.space = space

    def add(self, text: str) -> None:
        """More text."""
        text = self.space + text
        body = text.rstrip()
        self.space = text[len(body) :]
        self._sink(body)

    def flush(self) -> None:
        """Nothing follows: the white space is part of the text."""
        self._sink(self.space)
