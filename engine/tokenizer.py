"""Text to tokens and back, from a checkpoint's tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as BaseTokenizer

from mixbit.engine.checkpoint import read_json
from mixbit.engine.errors import UserError


class TokenizerError(UserError):
    """A tokenizer that is missing, broken or of an unknown kind; the message names the file."""


def _byte_level_alphabet() -> dict[str, int]:
    """The printable stand-in of each byte in byte-level BPE vocabularies (GPT-2): character -> byte.

    Printable Latin-1 characters stand for themselves; the others, in order, for 256, 257, ...
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


def _byte_level(token: str) -> bytes:
    try:
        return bytes(_ALPHABET[character] for character in token)
    except KeyError:  # an added token, written as it is
        return token.encode()


def _byte_fallback(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


class Tokenizer:
    """A tokenizer whose every token is a fixed byte string, so that text can be put together piece by piece.

    Thread-safe: encoding may run beside a step.
    """

    def __init__(self, base: BaseTokenizer, eos_ids: frozenset[int] = frozenset()) -> None:
        base.no_truncation()
        base.no_padding()
        self._base = base
        self.eos_ids = eos_ids
        self.vocab_size: int = base.get_vocab_size(with_added_tokens=True)
        self._added = {token.content: number for number, token in base.get_added_tokens_decoder().items()}
        self._special = {number for number, token in base.get_added_tokens_decoder().items() if token.special}
        self._to_bytes = _byte_level if "ByteLevel" in _decoders(base) else _byte_fallback
        self._bytes: dict[int, bytes] = {}

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Tokens of a text. Special tokens written in it are parsed as such."""
        ids: list[int] = self._base.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, tokens: list[int], *, skip_special_tokens: bool = False) -> str:
        """Text of tokens."""
        text: str = self._base.decode(tokens, skip_special_tokens=skip_special_tokens)
        return text

    def added_token(self, text: str) -> int | None:
        """The token that is exactly this text, if the tokenizer was given one; None for ordinary text."""
        return self._added.get(text)

    def to_json(self) -> str:
        """The contents of tokenizer.json."""
        text: str = self._base.to_str()
        return text

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to the text; may be part of a UTF-8 character. Empty for an unused id."""
        found = self._bytes.get(token)
        if found is None:
            name = self._base.id_to_token(token)
            found = self._bytes[token] = b"" if name is None else self._to_bytes(name)
        return found

    def visible_bytes(self, token: int) -> bytes:
        """As `token_bytes`, but empty for special tokens, which are not shown."""
        return b"" if token in self._special else self.token_bytes(token)


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a checkpoint directory, with the tokens that end its output.

    Raises TokenizerError, or CheckpointError for a broken JSON file.
    """
    base = _load_base(path)
    return Tokenizer(base, _eos_ids(path, base))


def _load_base(path: Path) -> BaseTokenizer:
    file = path / "tokenizer.json"
    if file.is_file():
        try:
            return BaseTokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exceptions
            raise TokenizerError(f"{file}: not a tokenizer: {error}") from None
    known = ("tokenizer.model", "vocab.json", "tokenizer_config.json", "vocab.txt", "tekken.json")
    if not any((path / name).is_file() for name in known):
        raise TokenizerError(f"{path}: no tokenizer.json; the model's text cannot be tokenized without it")
    try:
        from transformers import AutoTokenizer  # slow to import, rarely needed

        loaded: Any = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False, local_files_only=True)
        base = loaded.backend_tokenizer
    except Exception as error:  # whatever the conversion raises, the cure is the same
        raise TokenizerError(
            f"{path}: no tokenizer.json, and it cannot be made from the other files: {error}"
        ) from None
    if not isinstance(base, BaseTokenizer):
        raise TokenizerError(f"{path}: no tokenizer.json, and the tokenizer has no form that could replace it")
    return base


def _decoders(base: BaseTokenizer) -> set[str]:
    """The kinds of the tokenizer's decoders. Raises TokenizerError unless tokens are fixed byte strings."""
    state = json.loads(base.decoder.__getstate__()) if base.decoder is not None else {"type": "none"}
    kinds = {part["type"] for part in state.get("decoders", [state])}
    if not kinds & {"ByteLevel", "ByteFallback", "Metaspace"}:
        raise TokenizerError(
            f"tokenizer.json: decoder {'+'.join(sorted(kinds))} is not supported; "
            "supported: ByteLevel, ByteFallback and Metaspace"
        )
    return kinds


def _eos_ids(path: Path, base: BaseTokenizer) -> frozenset[int]:
    """Every token that any of the checkpoint's files calls the end: bases and chat models differ in where."""
    configs = {name: _read(path / name) for name in ("generation_config.json", "config.json", "tokenizer_config.json")}
    text_config = configs["config.json"].get("text_config")
    claims = [
        configs["generation_config.json"].get("eos_token_id"),
        configs["config.json"].get("eos_token_id"),
        text_config.get("eos_token_id") if isinstance(text_config, dict) else None,
    ]
    token = configs["tokenizer_config.json"].get("eos_token")
    if isinstance(token, dict):
        token = token.get("content")
    if isinstance(token, str):
        claims.append(base.token_to_id(token))
    ids: set[int] = set()
    for claim in claims:
        ids.update(entry for entry in (claim if isinstance(claim, list) else [claim]) if isinstance(entry, int))
    return frozenset(ids)


def _read(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}
