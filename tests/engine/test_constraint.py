"""Grammars: what a constrained request may write, alone and among others, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixbit.engine import constraint
from mixbit.engine.admission import RefusedError
from mixbit.engine.constraint import Constraint, ConstraintError, GrammarCompiler, GrammarError
from mixbit.engine.core import EngineCore
from mixbit.engine.protocol import Failed, Grammar, Sampling, Schema
from tests.engine.test_core import TOKENIZER, ScriptedModel, encode, ending, engine, finish, message, run, text_of
from tests.engine.tokenizers_for_tests import EOS

COMPILER = GrammarCompiler(TOKENIZER, TOKENIZER.vocab_size)
TOOL = TOKENIZER.added_token("<tool call>")


def schema_grammar(schema: Any, *, lenient: bool = False) -> Grammar:
    return Grammar(
        lark="start: schema_0", param="f", schemas=[Schema(json=json.dumps(schema), param="f", lenient=lenient)]
    )


def pattern(regex: str) -> Grammar:
    return Grammar(lark="start: pattern_0", param="f", patterns=[regex])


def core_of(script: list[int]) -> EngineCore:
    return engine(ScriptedModel(script))


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_a_schema_shapes_what_a_model_writes_that_would_not() -> None:
    said = run(core_of(encode("the cat")), message(grammar=schema_grammar(PERSON), max_tokens=60))
    assert set(json.loads(text_of(said))) == {"name", "age"}
    assert finish(said).reason == "stop"


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.booleans())
def test_any_sampled_text_is_valid(seed: int, ignore_eos: bool) -> None:
    sampling = Sampling(temperature=50.0, seed=seed)
    request = message(grammar=schema_grammar(PERSON), sampling=sampling, max_tokens=90, ignore_eos=ignore_eos)
    value = json.loads(text_of(run(core_of([5]), request)))
    assert len(value["name"]) <= 5
    assert isinstance(value["age"], int)


def test_several_grammars_and_free_text_in_one_batch() -> None:
    messages = [
        message("a", grammar=pattern("[0-9]{4}")),
        message("b"),
        message("c", grammar=pattern("(yes|no)")),
        message("d", grammar=pattern("[0-9]{4}")),
    ]
    script = encode("hat")
    said = run(core_of(script), *messages)
    assert text_of(said, "a") == text_of(said, "d")
    assert text_of(said, "a").isdigit()
    assert text_of(said, "b") == text_of(run(core_of(script), message("b")), "b")
    assert text_of(said, "c") in {"yes", "no"}


def test_after_preparation_the_vocabulary_is_not_built_again(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = GrammarCompiler(TOKENIZER, TOKENIZER.vocab_size)
    compiler.prepare()
    monkeypatch.setattr(constraint, "LLTokenizer", None)
    compiler.prepare()
    assert compiler.compile(pattern("[ab]")).allowed().any()


def test_a_finished_grammar_ends_the_request_and_the_end_token_is_permitted_where_it_may_end() -> None:
    said = run(core_of(encode("a")), message(grammar=pattern("aaa")))
    assert (text_of(said), finish(said).reason, finish(said).usage.completion_tokens) == ("aaa", "stop", 3)
    said = run(core_of([*encode("aa"), EOS]), message(grammar=pattern("a+")))
    assert (text_of(said), finish(said).reason) == ("aa", "stop")


def test_an_end_token_that_comes_too_early_is_not_chosen() -> None:
    said = run(core_of([EOS]), message(grammar=pattern("cat")))
    assert text_of(said) == "cat"


def test_a_request_that_is_computed_again_goes_on_in_its_grammar() -> None:
    model = ScriptedModel(encode("a"))

    def fault(chunks: Any) -> None:
        if model.steps == 3:
            raise MemoryError("once")

    model.fault = fault
    said = run(engine(model), message("a", grammar=pattern("[0-9]{8}")), message("b"))
    assert len(text_of(said)) == 8


def test_markers_are_tokens_where_the_tokenizer_has_them_and_text_where_it_has_not() -> None:
    assert TOOL is not None
    grammar = Grammar(lark="start: until_0 pattern_0", param="f", markers=["<tool call>"], patterns=["x"])
    said = run(core_of([*encode("cat"), TOOL, 5]), message(grammar=grammar))
    assert text_of(said) == "cat<tool call>x"
    constraint = COMPILER.compile(grammar)
    assert constraint.allowed()[TOOL]
    assert not COMPILER.compile(pattern("(?s:.*)")).allowed()[TOOL]
    absent = Grammar(lark="start: until_0 pattern_0", param="f", markers=["cat/\n]"], patterns=["x"])
    said = run(core_of(encode("the cat/\n]the")), message(grammar=absent, max_tokens=40))
    assert text_of(said) == "the cat/\n]x"


def test_logprobs_are_the_models_own_and_penalties_still_count() -> None:
    sampling = Sampling(temperature=0, presence_penalty=1.0)
    said = run(core_of(encode("hat")), message(grammar=pattern("[0-9]{4}"), sampling=sampling, logprobs=3))
    assert len(set(text_of(said))) == 4  # the script wants no digit: each penalized one gives way to another


@pytest.mark.parametrize(
    ("schema", "path", "words"),
    [
        ({"properties": {"a": {"items": {"type": "strin"}}}}, "f.properties.a.items", "strin"),
        ({"anyOf": [{"type": "string"}, {"pattern": "("}]}, "f.anyOf[1]", "unclosed group"),
        ({"properties": {"a": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"not": {}}}}, "f.$defs.x", "not"),
        ({"$ref": "#/nowhere"}, "f", "nowhere"),
        ({"properties": 3}, "f", "properties"),
        ({"minimum": 5, "maximum": 1, "type": "integer"}, "f", "minimum"),
        (False, "f", "not"),
    ],
)
def test_a_bad_schema_is_refused_by_its_path(schema: Any, path: str, words: str) -> None:
    core = core_of([5])
    with pytest.raises(RefusedError, match=words) as raised:
        core.admission.admit(message(grammar=schema_grammar(schema)))
    assert (raised.value.code, raised.value.param) == ("invalid_value", path)
    run(core, message())  # the id is free again


def test_lenient_leaves_aside_what_cannot_be_enforced() -> None:
    schema = {"type": "integer", "not": {"const": 5}, "minimum": 7, "maximum": 7}
    with pytest.raises(GrammarError, match="not"):
        COMPILER.compile(schema_grammar(schema))
    assert text_of(run(core_of([5]), message(grammar=schema_grammar(schema, lenient=True)))) == "7"


def test_settings_inside_a_schema_are_not_heard() -> None:
    schema = {"type": "array", "items": {"const": 1}, "minItems": 2, "maxItems": 2}
    unheard = {**schema, "x-guidance": {"item_separator": " , ", "whitespace_flexible": True}}
    assert text_of(run(core_of([5]), message(grammar=schema_grammar(unheard)))) == "[1, 1]"


@pytest.mark.parametrize(
    "grammar",
    [
        pattern("("),
        Grammar(lark="start: nothing", param="f"),
        Grammar(lark="", param="f"),
        Grammar(lark="%", param="f"),
    ],
)
def test_a_bad_pattern_or_grammar_is_refused(grammar: Grammar) -> None:
    with pytest.raises(GrammarError) as raised:
        COMPILER.compile(grammar)
    assert raised.value.param == "f"
    assert "\n" not in str(raised.value)


def test_a_token_that_was_not_allowed_is_an_error() -> None:
    constraint = COMPILER.compile(pattern("cat"))
    assert np.flatnonzero(constraint.allowed()).size
    with pytest.raises(ConstraintError):
        constraint.accept(encode("h")[0])


def test_a_grammar_that_cannot_be_followed_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Constraint) -> None:
        raise ConstraintError("the grammar is too complex")

    monkeypatch.setattr(Constraint, "allowed", fail)
    said = run(core_of(encode("hat")), message("a", grammar=pattern("cat")), message("b"))
    failed = ending(said, "a")
    assert isinstance(failed, Failed)
    assert "too complex" in failed.message
    assert finish(said, "b").reason == "length"
