"""Reads one value in JSON or in Python's notation, and writes it as JSON while it is still arriving.

It is data and is never evaluated. What models get wrong most is forgiven: line breaks and unknown escapes
inside strings. Anything else that is not in order raises MalformedError.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from mixbit.server.parsing.reader import MalformedError, Reader, Sink, Steps

MAX_DEPTH = 64
_MAX_WORD = 400  # characters of a number

_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_WORD_END = re.compile(r"[^-+.0-9A-Za-z_]")
_JSON_WORDS = {"true": "true", "false": "false", "null": "null"}
_PYTHON_WORDS = {**_JSON_WORDS, "True": "true", "False": "false", "None": "null"}
_SIMPLE = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "/": "/", '"': '"', "'": "'", "\\": "\\"}
_PYTHON_SIMPLE = {**_SIMPLE, "a": "\a", "v": "\v", "0": "\0", "\n": ""}
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}


def escaped(text: str) -> str:
    """Text as it stands inside a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


@dataclass(frozen=True, slots=True)
class Notation:
    """A way to write values."""

    words: dict[str, str]
    quotes: str
    simple: dict[str, str]
    hex: str  # letters of escapes that name a code point
    closing_comma: bool


JSON = Notation(_JSON_WORDS, '"', _SIMPLE, "u", closing_comma=False)
PYTHON = Notation(_PYTHON_WORDS, "\"'", _PYTHON_SIMPLE, "xuU", closing_comma=True)


def value(reader: Reader, sink: Sink, notation: Notation = JSON, depth: int = 0) -> Steps[None]:
    """Read a value, white space before it too, and pass its JSON to `sink` piece by piece."""
    if depth > MAX_DEPTH:
        raise MalformedError
    yield from reader.space()
    first = yield from reader.peek()
    if first == "{":
        yield from _items(reader, sink, notation, depth, "{", "}")
    elif first == "[":
        yield from _items(reader, sink, notation, depth, "[", "]")
    elif first and first in notation.quotes:
        yield from string(reader, sink, notation)
    else:
        sink((yield from _word(reader, notation)))


def _items(reader: Reader, sink: Sink, notation: Notation, depth: int, opening: str, closing: str) -> Steps[None]:
    sink(reader.take(1))
    first = True
    while True:
        yield from reader.space()
        if (first or notation.closing_comma) and (yield from reader.accept(closing)):
            break
        if not first:
            sink(", ")
        if opening == "{":
            if (yield from reader.peek()) not in tuple(notation.quotes):
                raise MalformedError
            yield from string(reader, sink, notation)
            yield from reader.space()
            yield from reader.expect(":")
            sink(": ")
        yield from value(reader, sink, notation, depth + 1)
        yield from reader.space()
        first = False
        if (yield from reader.expect(",", closing)) == closing:
            break
    sink(closing)


def string(reader: Reader, sink: Sink, notation: Notation = JSON) -> Steps[None]:
    """Read a string at its opening quote."""
    quote = reader.take(1)
    stop = re.compile(rf"[{quote}\\]")
    sink('"')
    while (found := (yield from reader.run(stop, lambda text: sink(escaped(text))))) != quote:
        if not found:
            raise MalformedError
        sink((yield from _escape(reader, notation)))
    reader.take(1)
    sink('"')


def _escape(reader: Reader, notation: Notation) -> Steps[str]:
    letter = (yield from reader.peek(2))[1:]
    digits = _HEX_DIGITS[letter] if letter and letter in notation.hex else 0
    if digits:
        code = (yield from reader.peek(2 + digits))[2:]
        if not re.fullmatch(rf"[0-9a-fA-F]{{{digits}}}", code) or int(code, 16) > 0x10FFFF:
            raise MalformedError
        reader.take(2 + digits)
        # Four digits may be half of a pair: left as they are.
        return f"\\u{code}" if letter == "u" else escaped(chr(int(code, 16)))
    if not letter:
        raise MalformedError
    reader.take(2)
    meant = notation.simple.get(letter)
    return escaped("\\" + letter if meant is None else meant)


def _word(reader: Reader, notation: Notation) -> Steps[str]:
    pieces: list[str] = []
    yield from reader.run(_WORD_END, pieces.append)
    word = "".join(pieces)
    if word in notation.words:
        return notation.words[word]
    if len(word) > _MAX_WORD or not _NUMBER.fullmatch(word):
        raise MalformedError
    return word
