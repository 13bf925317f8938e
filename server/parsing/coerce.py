"""Types of arguments that a format writes as bare text, by the tool's JSON schema. Nothing is evaluated."""

from __future__ import annotations

import json
import re
from typing import Any

_ALL = frozenset({"string", "number", "integer", "boolean", "null", "object", "array"})
_MAX_DEPTH = 16
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_WHOLE = re.compile(r"(-?(?:0|[1-9][0-9]*))\.0+")


def properties(schema: Any) -> dict[str, Any]:
    """The properties of a tool's parameters."""
    inner = _resolved(schema, schema).get("properties")
    return inner if isinstance(inner, dict) else {}


def kinds(schema: Any, root: Any, depth: int = 0) -> frozenset[str]:
    """The JSON types that a schema permits. root: the schema that its references point into."""
    schema = _resolved(schema, root)
    if depth > _MAX_DEPTH:
        return _ALL
    found = _ALL
    if isinstance(named := schema.get("type"), str | list):
        found &= _widened([named] if isinstance(named, str) else [each for each in named if isinstance(each, str)])
    if isinstance(values := schema.get("enum", [schema["const"]] if "const" in schema else None), list):
        found &= frozenset(_kind(each) for each in values)
    for name in ("anyOf", "oneOf"):
        if isinstance(inner := schema.get(name), list) and inner:
            found &= frozenset().union(*(kinds(each, root, depth + 1) for each in inner))
    if isinstance(inner := schema.get("allOf"), list):
        for each in inner:
            found &= kinds(each, root, depth + 1)
    return found or _ALL


def as_json(text: str, permitted: frozenset[str]) -> str:
    """The text as JSON of a permitted type; as a string where it has the form of none."""
    bare = text.strip()
    if "null" in permitted and bare in {"null", "None"} and not (bare == "None" and "string" in permitted):
        return "null"
    if "boolean" in permitted and bare.lower() in {"true", "false"}:
        return bare.lower()
    if permitted & {"number", "integer"} and _NUMBER.fullmatch(bare):
        if "number" in permitted or re.fullmatch(r"-?[0-9]+", bare):
            return bare
        if whole := _WHOLE.fullmatch(bare):
            return whole[1]
    if (bare[:1] == "{" and "object" in permitted) or (bare[:1] == "[" and "array" in permitted):
        try:
            value = json.loads(bare, parse_constant=_refuse, parse_float=_Literal, parse_int=_Literal)
            return _dump(value)
        except (ValueError, RecursionError):
            pass
    return json.dumps(text, ensure_ascii=False)


def _widened(names: list[str]) -> frozenset[str]:
    """A number may be an integer."""
    return frozenset([*names, "integer"] if "number" in names else names)


class _Literal(str):
    """A number as it was written: no digit is lost."""

    __slots__ = ()


def _dump(value: Any) -> str:
    if isinstance(value, _Literal):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k, ensure_ascii=False)}: {_dump(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_dump, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _refuse(name: str) -> None:
    raise ValueError(name)


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        return "integer"
    names = {str: "string", float: "number", dict: "object", list: "array"}
    return names.get(type(value), "null")


def _resolved(schema: Any, root: Any) -> dict[str, Any]:
    """The schema that a local reference means."""
    for _ in range(_MAX_DEPTH):
        if not isinstance(schema, dict):
            return {}
        reference = schema.get("$ref")
        if not isinstance(reference, str) or not reference.startswith("#/"):
            return schema
        target = root
        for step in reference[2:].split("/"):
            target = target.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(target, dict) else None
        schema = target
    return {}
