"""Text that is still arriving, read by generators: each waits, with a bare `yield`, until there is more.

What a reader decides depends on the text alone and never on where it was cut: a choice is made only when
no further text could change it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from typing import Final, TypeAlias, TypeVar

T = TypeVar("T")
Steps: TypeAlias = Generator[None, None, T]  # waits at each yield, returns a T
Sink = Callable[[str], None]

NO: Final = -1
UNDECIDED: Final = -2
SPACE: Final = object()  # any white space, or none
END: Final = object()  # the end of all text

# What may follow: literals, SPACE and END in sequence (a list), or the first that fits of several (a tuple).
Pattern: TypeAlias = "str | object | list[Pattern] | tuple[Pattern, ...]"

_SPACES = re.compile(r"\s*")


class MalformedError(Exception):
    """The text does not have the form of a call."""


def match(pattern: Pattern, text: str, at: int, ended: bool) -> int:
    """Where `pattern` ends if it stands at `at`, NO, or UNDECIDED if that takes more text."""
    if isinstance(pattern, str):
        if text.startswith(pattern, at):
            return at + len(pattern)
        return UNDECIDED if not ended and pattern.startswith(text[at : at + len(pattern)]) else NO
    if isinstance(pattern, list):
        for part in pattern:
            at = match(part, text, at, ended)
            if at < 0:
                return at
        return at
    if isinstance(pattern, tuple):
        found = (match(each, text, at, ended) for each in pattern)
        return next((end for end in found if end != NO), NO)
    after = _spaces_end(text, at)
    if after == len(text) and not ended:
        return UNDECIDED if pattern is SPACE or at == after else NO
    if pattern is SPACE:
        return after
    return at if at == len(text) else NO


class Reader:
    """A text with a place in it."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._ended = False
        self._taken: list[str] = []

    def feed(self, text: str) -> None:
        """Add text at the end."""
        self._text = self._text[self._at :] + text
        self._at = 0

    def end(self) -> None:
        """Nothing more will come."""
        self._ended = True

    def mark(self) -> None:
        """Begin anew to remember what is read."""
        self._taken.clear()

    def since_mark(self) -> str:
        """All that was read since the mark."""
        return "".join(self._taken)

    def take(self, count: int) -> str:
        """Read what has already been looked at."""
        text = self._text[self._at : self._at + count]
        self._at += len(text)
        self._taken.append(text)
        return text

    def peek(self, count: int = 1) -> Steps[str]:
        """The next characters; fewer only at the end."""
        while len(self._text) - self._at < count and not self._ended:
            yield
        return self._text[self._at : self._at + count]

    def looking_at(self, pattern: Pattern) -> Steps[bool]:
        """Whether `pattern` comes next."""
        while (end := match(pattern, self._text, self._at, self._ended)) == UNDECIDED:
            yield
        return end != NO

    def accept(self, *literals: str) -> Steps[str | None]:
        """Read one of the literals, the first that fits, if it comes next."""
        for literal in literals:
            if (yield from self.looking_at(literal)):
                return self.take(len(literal))
        return None

    def expect(self, *literals: str) -> Steps[str]:
        """As `accept`; raises MalformedError if none comes."""
        found = yield from self.accept(*literals)
        if found is None:
            raise MalformedError
        return found

    def space(self) -> Steps[str]:
        """Read white space; returns it."""
        pieces: list[str] = []
        while (yield from self.peek()).isspace():
            pieces.append(self.take(_spaces_end(self._text, self._at) - self._at))
        return "".join(pieces)

    def run(self, stop: re.Pattern[str], sink: Sink) -> Steps[str]:
        """Pass text to `sink` up to a character that `stop` finds, which is not read; "" at the end."""
        while True:
            found = stop.search(self._text, self._at)
            sink(self.take((found.start() if found else len(self._text)) - self._at))
            if found or self._ended:
                return found[0] if found else ""
            yield

    def until(self, literals: tuple[str, ...], sink: Sink, then: Pattern = "") -> Steps[str | None]:
        """Pass text to `sink` up to the first literal that `then` follows; read the literal, return it.

        `then` is not read. None at the end of the text, all of which has then gone to `sink`.
        """
        start = self._at  # of what has not been searched
        while True:
            place, literal, after = self._search(literals, then, start)
            sink(self.take(place - self._at))
            if literal is not None and after >= 0:
                return self.take(len(literal))
            if self._ended:
                return None
            yield
            start = self._at

    def line(self, literals: tuple[str, ...], limit: int) -> Steps[tuple[str, str]]:
        """Read a short text up to one of the literals, and it. Raises MalformedError after `limit` characters."""
        while True:
            place, literal, after = self._search(literals, "", self._at)
            if literal is not None and after >= 0 and place - self._at <= limit:
                return self.take(place - self._at), self.take(len(literal))
            if place - self._at > limit or self._ended:
                raise MalformedError
            yield

    def _search(self, literals: tuple[str, ...], then: Pattern, start: int) -> tuple[int, str | None, int]:
        """The first place at or after `start` where a literal with `then` stands or might; else the text's end."""
        text = self._text
        while True:
            place, literal = _first(text, literals, start, self._ended)
            if literal is not None:
                after = match(then, text, place + len(literal), self._ended)
                if after == NO:
                    start = place + 1
                    continue
                return place, literal, after
            return place, None, UNDECIDED


def _first(text: str, literals: tuple[str, ...], start: int, ended: bool) -> tuple[int, str | None]:
    """The first literal in the text, the earlier listed if two stand at one place. Without any: None, and where
    the beginning of one might stand at the end of the text."""
    found = [(place, rank) for rank, each in enumerate(literals) if (place := text.find(each, start)) >= 0]
    place, rank = min(found, default=(len(text), -1))
    for each in () if ended else literals:
        for length in range(min(len(each) - 1, len(text) - start), 0, -1):
            if text.endswith(each[:length]):
                if len(text) - length < place:  # it might become an earlier one
                    place, rank = len(text) - length, -1
                break
    return place, None if rank < 0 else literals[rank]


def _spaces_end(text: str, at: int) -> int:
    found = _SPACES.match(text, at)
    return found.end() if found else at
