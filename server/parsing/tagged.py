"""Arguments between tags, each value as bare text: what Qwen3-Coder, GLM and MiniMax have in common.

A closing tag inside a value is part of it unless what must follow a value follows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from mixbit.server.parsing.coerce import as_json, kinds, properties
from mixbit.server.parsing.reader import SPACE, MalformedError, Pattern, Reader, Sink, Steps
from mixbit.server.parsing.tools import MAX_NAME, Calls, Rules, Tool, either, literal
from mixbit.server.parsing.values import escaped

_TEXT = frozenset({"string"})


@dataclass(frozen=True)
class Tags:
    """A format's tags: before, key, after, opening, value, closing.

    newlines: whether one stands at each end of a value and is not part of it.
    """

    before: str
    after: str
    opening: str
    closing: str
    newlines: bool

    def next_key(self, schema: Any) -> Pattern:
        """The tag of a further argument: of one that the tool has, if it says which."""
        known: tuple[Pattern, ...] = tuple(f"{self.before}{key}{self.after}" for key in properties(schema))
        return known or self.before


def arguments(reader: Reader, calls: Calls, name: str, tags: Tags, ending: Pattern) -> Steps[None]:
    """Read all arguments of the open call, up to `ending`, which is not read."""
    schema = calls.schema(name)
    known = properties(schema)
    following: Pattern = [SPACE, (tags.next_key(schema), ending)]
    comma = "{"
    while True:
        yield from reader.space()
        if not (yield from reader.accept(tags.before)):
            break
        key = (yield from reader.line((tags.after,), MAX_NAME))[0].strip()
        if tags.opening:
            yield from reader.space()
            yield from reader.expect(tags.opening)
        calls.arguments(f"{comma}{json.dumps(key, ensure_ascii=False)}: ")
        comma = ", "
        yield from _value(reader, calls.arguments, tags, kinds(known.get(key, {}), schema), following)
    if not (yield from reader.looking_at(ending)):
        raise MalformedError
    calls.arguments("{}" if comma == "{" else "}")


def _value(reader: Reader, sink: Sink, tags: Tags, permitted: frozenset[str], following: Pattern) -> Steps[None]:
    """Read a value and its closing tag. Text goes on at once; other types when they are whole."""
    if tags.newlines:
        yield from reader.accept("\n")
    closings = (f"\n{tags.closing}", tags.closing) if tags.newlines else (tags.closing,)
    if permitted == _TEXT:
        sink('"')
        closed = yield from reader.until(closings, lambda text: sink(escaped(text)), following)
        if closed:
            sink('"')
    else:
        pieces: list[str] = []
        closed = yield from reader.until(closings, pieces.append, following)
        if closed:
            sink(as_json("".join(pieces), permitted))
    if not closed:
        raise MalformedError


def argument_rules(rules: Rules, tool: Tool, tags: Tags) -> str:
    """All arguments of a tool in the order of its schema, those that are not required optional; in Lark."""
    required = tool.parameters.get("required")
    parts = []
    for key, schema in properties(tool.parameters).items():
        opening = f"{literal(chr(10))} {rules.marker(tags.opening)}" if tags.opening else ""
        head = f"{_tag(rules, tags.before)} {literal(key)} {_tag(rules, tags.after)} {opening}"
        part = f'{head} {_value_rule(rules, tool, key, schema, tags)} "\\n"'
        parts.append(f"({part})" if isinstance(required, list) and key in required else f"({part})?")
    return " ".join(parts)


def _tag(rules: Rules, text: str) -> str:
    return rules.marker(text) if text[0] == "<" and text[-1] == ">" else literal(text)


def _value_rule(rules: Rules, tool: Tool, key: str, schema: Any, tags: Tags) -> str:
    """A value and its closing tag. Of bare text, enum, const and the length are enforced."""
    edge = '"\\n"' if tags.newlines else ""
    closing = f"{edge} {rules.marker(tags.closing)}"
    schema = schema if isinstance(schema, dict) else {}
    if "string" not in kinds(schema, tool.parameters):
        shared = {name: tool.parameters[name] for name in ("$defs", "definitions") if name in tool.parameters}
        param = f"{tool.param}.parameters.properties.{key}"
        return f"{edge} {rules.schema({**shared, **schema}, param, lenient=not tool.strict)} {closing}"
    texts = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(texts, list) and texts:
        bare = [literal(each if isinstance(each, str) else json.dumps(each)) for each in texts]
        return f"{edge} {either(bare)} {closing}"
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    if least or most != "":
        return f"{edge} {rules.pattern(f'[^<]{{{least},{most}}}')} {closing}"
    return f"{edge} {rules.until(tags.closing)}"
