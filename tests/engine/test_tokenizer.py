"""Tokenizers of checkpoint directories."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as BaseTokenizer
from tokenizers import decoders, models, pre_tokenizers

from mixbit.engine.errors import UserError
from mixbit.engine.tokenizer import TokenizerError, load_tokenizer
from tests.engine.tokenizers_for_tests import byte_level


def write(directory: Path, **files: object) -> Path:
    byte_level()._base.save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def test_text_survives_a_round_trip_and_special_tokens_are_parsed(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path))
    tokens = tokenizer.encode("the straße <eos>日本", add_special_tokens=True)
    assert 0 in tokens
    assert tokenizer.decode(tokens) == "the straße <eos>日本"
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "the straße 日本"
    assert tokenizer.token_bytes(100_000) == b""


def test_saved_truncation_and_padding_are_not_applied(tmp_path: Path) -> None:
    base = byte_level()._base
    base.enable_truncation(3)
    base.enable_padding(length=50)
    base.save(str(tmp_path / "tokenizer.json"))
    text = "the cat and the hat, größer"
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, set()),
        ({"config": {"eos_token_id": 5}}, {5}),
        ({"config": {"text_config": {"eos_token_id": [6, 7]}}}, {6, 7}),
        ({"generation_config": {"eos_token_id": [8]}, "config": {"eos_token_id": 5}}, {5, 8}),
        ({"tokenizer_config": {"eos_token": "<eos>"}, "config": {"eos_token_id": None}}, {0}),
        ({"tokenizer_config": {"eos_token": {"content": "<eos>"}}}, {0}),
        ({"tokenizer_config": {"eos_token": "<unknown>"}}, set()),
    ],
)
def test_every_file_has_a_say_in_what_ends_the_output(
    tmp_path: Path, files: dict[str, object], expected: set[int]
) -> None:
    assert load_tokenizer(write(tmp_path, **files)).eos_ids == expected


def test_a_directory_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_broken_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: not a tokenizer"):
        load_tokenizer(tmp_path)


def test_broken_json_beside_the_tokenizer_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config\.json"):
        load_tokenizer(tmp_path)


def test_other_files_are_converted_where_possible(tmp_path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: number for number, character in enumerate([*alphabet, "<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("größer", add_special_tokens=False)) == "größer"


def test_a_decoder_that_does_more_than_join_bytes_is_refused(tmp_path: Path) -> None:
    base = BaseTokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    base.decoder = decoders.WordPiece()
    base.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="decoder WordPiece is not supported"):
        load_tokenizer(tmp_path)
