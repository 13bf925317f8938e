"""The tokenizer, chat template and stop tokens of a GGUF file, as the files of the hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from mixbit.engine.convert.errors import ConvertError
from mixbit.engine.convert.gguf_file import GgufFile
from mixbit.engine.convert.output import write_json


class TokenType(IntEnum):
    """tokenizer.ggml.token_type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Splitting of the text before the merges, as the tokenizer.json of these families on the hub define it.
# Named after tokenizer.ggml.pre.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _llama3(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = _split(_WORDS % "{1,3}")
    tokenizer.model.ignore_merges = True


def _qwen2(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _split(_WORDS % "")


def _smollm(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _gpt2(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


_PRE: Mapping[str, Callable[[Tokenizer], None]] = {
    "smollm": _smollm,
    "qwen2": _qwen2,
    "deepseek-r1-qwen": _qwen2,
    "llama-bpe": _llama3,
    "llama3": _llama3,
    "llama-v3": _llama3,
    "gpt-2": _gpt2,
}
_ADDS_BOS = ("llama-bpe", "llama3", "llama-v3")  # the default where the file does not say

# Other ends of a turn or text than the file's own eos, where the vocabulary has them as control tokens.
_ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")
_PADDING = re.compile(r"\[PAD\d+\]")  # unused entries that fill the vocabulary up to the embedding's rows


def write_tokenizer(file: GgufFile, directory: Path, config: dict[str, Any]) -> None:
    """Write tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json.

    Adds bos_token_id, eos_token_id and pad_token_id to `config`. Raises ConvertError for a tokenizer model
    or pre-tokenizer that cannot be rebuilt exactly.
    """
    tokens, types = _vocabulary(file)
    tokenizer = _build(file, tokens, types)
    ids = _special_ids(file, len(tokens))
    _post_process(file, tokenizer, tokens, ids)
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", _tokenizer_config(file, tokens, types, ids, config))
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    config |= {f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad") if name in ids}
    generation: dict[str, Any] = {f"{n}_token_id": ids[n] for n in ("bos", "pad") if n in ids}
    ends = _end_ids(tokens, types, ids)
    if ends:
        generation["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    write_json(directory / "generation_config.json", generation)


def _vocabulary(file: GgufFile) -> tuple[list[str], list[int]]:
    meta = file.metadata
    model = meta.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise ConvertError(
            f"{file.path}: tokenizer model {model!r} cannot be rebuilt exactly; "
            "only 'gpt2' (byte-level BPE) is supported"
        )
    tokens = meta.get("tokenizer.ggml.tokens")
    types = meta.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not isinstance(meta.get("tokenizer.ggml.merges"), list):
        raise ConvertError(f"{file.path}: tokenizer.ggml.tokens or tokenizer.ggml.merges is missing")
    if not isinstance(types, list) or len(types) != len(tokens):
        raise ConvertError(
            f"{file.path}: {len(tokens)} tokens, but tokenizer.ggml.token_type has {len(types) if types else 0} entries"
        )
    return tokens, types


def _build(file: GgufFile, tokens: list[str], types: list[int]) -> Tokenizer:
    pre = str(file.metadata.get("tokenizer.ggml.pre"))
    if pre not in _PRE:
        raise ConvertError(
            f"{file.path}: pre-tokenizer {pre!r} (tokenizer.ggml.pre) is not supported; known: {', '.join(_PRE)}"
        )
    vocab = {t: i for i, t in enumerate(tokens) if types[i] != TokenType.UNUSED or not _PADDING.fullmatch(t)}
    merges = []
    for line in file.metadata["tokenizer.ggml.merges"]:
        left, _, right = line.partition(" ")
        if not (left in vocab and right in vocab and left + right in vocab):
            raise ConvertError(
                f"{file.path}: tokenizer.ggml.merges: {line!r} joins tokens that are not in the vocabulary"
            )
        merges.append((left, right))
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges))
    tokenizer.decoder = decoders.ByteLevel()
    _PRE[pre](tokenizer)
    # Control and user-defined tokens have their ids from the vocabulary; adding them makes them match as a whole.
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == TokenType.CONTROL, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)
        ]
    )
    return tokenizer


def _special_ids(file: GgufFile, count: int) -> dict[str, int]:
    """Token ids by role: those of bos, eos, pad, unk, eot, eom that the file names."""
    ids = {}
    for role, key in (
        ("bos", "bos"),
        ("eos", "eos"),
        ("pad", "padding"),
        ("unk", "unknown"),
        ("eot", "eot"),
        ("eom", "eom"),
    ):
        value = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if value is not None:
            if not 0 <= value < count:
                raise ConvertError(f"{file.path}: tokenizer.ggml.{key}_token_id is {value}, of {count} tokens")
            ids[role] = int(value)
    return ids


def _adds(file: GgufFile, role: str) -> bool:
    default = role == "bos" and file.metadata.get("tokenizer.ggml.pre") in _ADDS_BOS
    return bool(file.metadata.get(f"tokenizer.ggml.add_{role}_token", default))


def _post_process(file: GgufFile, tokenizer: Tokenizer, tokens: list[str], ids: Mapping[str, int]) -> None:
    byte_level = processors.ByteLevel(trim_offsets=False)
    before = [tokens[ids["bos"]]] if _adds(file, "bos") and "bos" in ids else []
    after = [tokens[ids["eos"]]] if _adds(file, "eos") and "eos" in ids else []
    if not before and not after:
        tokenizer.post_processor = byte_level
        return
    template = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *(f"{t}:1" for t in before), "$B:1", *(f"{t}:1" for t in after)],
        special_tokens=[(token, tokens.index(token)) for token in {*before, *after}],
    )
    tokenizer.post_processor = processors.Sequence([byte_level, template])


def _tokenizer_config(
    file: GgufFile, tokens: list[str], types: list[int], ids: Mapping[str, int], config: Mapping[str, Any]
) -> dict[str, Any]:
    added = {
        str(i): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": kind == TokenType.CONTROL,
        }
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)
    }
    names = {f"{role}_token": tokens[ids[role]] for role in ("bos", "eos", "pad", "unk") if role in ids}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "add_bos_token": _adds(file, "bos"),
        "add_eos_token": _adds(file, "eos"),
        "add_prefix_space": False,
        **names,
        "added_tokens_decoder": added,
    }


def _end_ids(tokens: list[str], types: list[int], ids: Mapping[str, int]) -> list[int]:
    named = [ids[role] for role in ("eos", "eot", "eom") if role in ids]
    known = [
        i for i, (t, kind) in enumerate(zip(tokens, types, strict=True)) if kind == TokenType.CONTROL and t in _ENDS
    ]
    return list(dict.fromkeys([*named, *known]))
