"""Grammars that an output must match: compiled once, then a mask over the vocabulary for every token.

The mask of the next token is computed in a thread of its own while the device runs the step that leads
to it; llguidance works without Python's lock.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLTokenizer, regex_to_lark

from mixbit.engine.protocol import Grammar, Schema
from mixbit.engine.tokenizer import Tokenizer

_CACHED = 64  # compiled grammars that are kept: agents send the same tools in every turn

# One space after separators and no other white space: small models would write spaces for ever.
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class GrammarError(Exception):
    """A grammar that cannot be compiled. `param`: the field of the request that is at fault."""

    def __init__(self, param: str, reason: str) -> None:
        super().__init__(f"Invalid '{param}': {reason}")
        self.param = param


class ConstraintError(RuntimeError):
    """A grammar that cannot be followed any further, such as one that has become too complex."""


class Constraint:
    """One request's place in its grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, pool: ThreadPoolExecutor) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._pool = pool
        self._mask = np.zeros(-(-vocab_size // 32), np.int32)  # a bit for each token
        self._computed: Future[npt.NDArray[np.bool_]] = pool.submit(self._compute)

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Which tokens [vocab] may come next. Raises ConstraintError if none can be named."""
        mask = self._computed.result()
        if self._matcher.is_error():
            raise ConstraintError(f"the grammar cannot be followed: {_reason(self._matcher.get_error())}")
        return mask

    def accept(self, token: int) -> bool:
        """Go on by an allowed token; true if nothing may follow. Raises ConstraintError."""
        self._computed.result()
        if not self._matcher.consume_token(token):
            raise ConstraintError(f"the grammar does not take token {token}: {_reason(self._matcher.get_error())}")
        if self._matcher.is_stopped():
            return True
        self._computed = self._pool.submit(self._compute)
        return False

    def _compute(self) -> npt.NDArray[np.bool_]:
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        bits = np.unpackbits(self._mask.view(np.uint8), count=self._vocab_size, bitorder="little")
        return bits.view(np.bool_)


class GrammarCompiler:
    """Compiles grammars for one tokenizer. vocab_size: width of the model's logits. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="masks")
        self._vocabulary: LLTokenizer | None = None
        self._compiled: OrderedDict[bytes, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def prepare(self) -> None:
        """Do what all grammars need, which holds Python's lock for up to seconds: best while nothing runs."""
        with self._lock:
            self._tokens()

    def compile(self, grammar: Grammar) -> Constraint:
        """A constraint at its start. Raises GrammarError, which names the field at fault."""
        key = msgspec.msgpack.encode(grammar)
        with self._lock:
            matcher = self._compiled.get(key)
            if matcher is None:
                matcher = self._build(grammar)
                self._compiled[key] = matcher
                if len(self._compiled) > _CACHED:
                    self._compiled.popitem(last=False)
            else:
                self._compiled.move_to_end(key)
            return Constraint(matcher.deep_copy(), self._vocab_size, self._pool)

    def _build(self, grammar: Grammar) -> LLMatcher:
        lark = "\n".join([grammar.lark, *self._definitions(grammar)])
        matcher = LLMatcher(self._tokens(), LLMatcher.grammar_from_lark(lark), log_level=0)
        if matcher.is_error():
            for schema in grammar.schemas:
                self._check_schema(schema)
            raise GrammarError(grammar.param, _reason(matcher.get_error()))
        return matcher

    def _tokens(self) -> LLTokenizer:
        if self._vocabulary is None:
            eos = sorted(self._tokenizer.eos_ids)
            self._vocabulary = LLTokenizer(self._tokenizer.to_json(), self._vocab_size, eos_token=eos or None)
        return self._vocabulary

    def _definitions(self, grammar: Grammar) -> list[str]:
        lines = [
            f"schema_{place}: %json {json.dumps(_with_settings(json.loads(schema.json), schema.lenient))}"
            for place, schema in enumerate(grammar.schemas)
        ]
        lines += [f"pattern_{place}: /{regex_to_lark(regex)}/" for place, regex in enumerate(grammar.patterns)]
        for place, marker in enumerate(grammar.markers):
            token = self._tokenizer.added_token(marker)
            if token is None:
                lines += [
                    f"marker_{place}: {json.dumps(marker)}",
                    f"until_{place}[lazy]: /(?s:.*){_escaped(marker)}/",
                    f"without_{place}: WITHOUT_{place}",
                    f"WITHOUT_{place}: /(?s:.*)/ & ~/(?s:.*){_escaped(marker)}(?s:.*)/",
                ]
            else:  # text never matches such a token, so all text before it may be anything
                lines += [
                    f"marker_{place}: <[{token}]>",
                    f"until_{place}: UNTIL_{place} <[{token}]>",
                    f"without_{place}: UNTIL_{place}",
                    f"UNTIL_{place}: /(?s:.*)/",
                ]
        return lines

    def _check_schema(self, schema: Schema) -> None:
        """Raise GrammarError if the schema is at fault, with the path of its innermost part that is."""
        error = self._schema_error(schema, root := json.loads(schema.json))
        if error is None:
            return
        definitions = {name: root[name] for name in ("$defs", "definitions") if isinstance(root, dict) and name in root}
        param, part = schema.param, root
        while True:
            for step, inner in _inner_schemas(part):
                value = {**definitions, **inner} if isinstance(inner, dict) else inner
                if (deeper := self._schema_error(schema, value)) is not None:
                    param, part, error = param + step, inner, deeper
                    break
            else:
                raise GrammarError(param, error)

    def _schema_error(self, schema: Schema, value: Any) -> str | None:
        definition = LLMatcher.grammar_from_json_schema(_with_settings(value, schema.lenient))
        matcher = LLMatcher(self._tokens(), definition, log_level=0)
        return _reason(matcher.get_error()) if matcher.is_error() else None


def _with_settings(schema: Any, lenient: bool) -> dict[str, Any]:
    """llguidance reads settings of its own from the schema; the client's are not heard."""
    if not isinstance(schema, dict):  # true and false are schemas too
        schema = {} if schema else {"not": {}}
    return {**schema, "x-guidance": {**_LAYOUT, "lenient": lenient}}


def _inner_schemas(schema: Any) -> list[tuple[str, Any]]:
    """The schemas directly inside, with the steps that lead to them."""
    found: list[tuple[str, Any]] = []
    if not isinstance(schema, dict):
        return found
    for name in ("$defs", "definitions", "properties", "patternProperties"):
        if isinstance(inner := schema.get(name), dict):
            found += [(f".{name}.{key}", value) for key, value in inner.items()]
    for name in ("anyOf", "oneOf", "allOf", "prefixItems"):
        if isinstance(inner := schema.get(name), list):
            found += [(f".{name}[{place}]", value) for place, value in enumerate(inner)]
    found += [(f".{name}", schema[name]) for name in ("items", "additionalProperties") if name in schema]
    return found


def _escaped(text: str) -> str:
    """Text as a regular expression between slashes that matches it alone."""
    return "".join(each if each.isalnum() else f"\\x{{{ord(each):x}}}" for each in text)


def _reason(message: str) -> str:
    """What llguidance says is wrong, without the excerpt of the grammar and the state that follow."""
    lines = message.splitlines()
    end = next((number for number, line in enumerate(lines) if re.match(r"\s*\d+ \| |\s*$", line)), len(lines))
    return " ".join(" ".join(lines[:end]).split())[:300] or "it is not supported"
