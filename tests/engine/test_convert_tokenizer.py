"""The tokenizer from GGUF metadata, against a naive byte-level BPE and against its own properties."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import pytest
import regex  # type: ignore[import-untyped]
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from mixbit.engine.convert.gguf_file import read_gguf
from mixbit.engine.convert.gguf_import import import_gguf
from mixbit.engine.demo import demo_gguf
from tests.engine.gguf_models import TinyGguf, byte_alphabet

TEXTS = [
    "Hello, world!",
    "The year 2024 had 366 days; pi is 3.14159.",
    "  leading spaces,\ttabs\n\nand   runs  ",
    "don't, we'll, I'VE, it's",
    "naïve café — “quotes” … ½ ²",
    "日本語のテキスト와 한국어, русский текст",
    "🎉👩‍👩‍👧 emoji\u200d joined",
    "def f(x: int) -> int:\n\treturn x**2  # comment\r\n",
    "\x00\x01\x7f control bytes",
    "",
]
# GPT-2's pattern, as published with it.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def naive_bpe(text: str, vocab: dict[str, int], ranks: dict[tuple[str, str], int]) -> list[int]:
    """Byte-level BPE by definition: single digits, GPT-2's words, then the best merge until there is none."""
    alphabet = byte_alphabet()
    ids = []
    for piece in regex.findall(r"\p{N}|[^\p{N}]+", text):
        for word in regex.findall(GPT2, piece):
            parts = [alphabet[byte] for byte in word.encode()]
            while len(parts) > 1:
                pairs = list(pairwise(parts))
                best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
                if best not in ranks:
                    break
                at = pairs.index(best)
                parts[at : at + 2] = [parts[at] + parts[at + 1]]
            ids += [vocab[part] for part in parts]
    return ids


@pytest.fixture(scope="module")
def smollm2(demo_checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_file(str(demo_checkpoint / "tokenizer.json"))


def test_smollm2_matches_a_naive_bpe_over_the_gguf_vocabulary(smollm2: Tokenizer) -> None:
    with demo_gguf(lambda stage, done, total: None) as path:
        meta = read_gguf(path).metadata
    vocab = {token: i for i, token in enumerate(meta["tokenizer.ggml.tokens"])}
    merges = [tuple(line.split(" ", 1)) for line in meta["tokenizer.ggml.merges"]]
    ranks = {(left, right): i for i, (left, right) in enumerate(merges)}
    for text in TEXTS:
        assert smollm2.encode(text).ids == naive_bpe(text, vocab, ranks), text
    assert smollm2.get_vocab() == vocab


def test_smollm2_round_trips_and_keeps_special_tokens_whole(smollm2: Tokenizer) -> None:
    for text in TEXTS:
        assert smollm2.decode(smollm2.encode(text).ids, skip_special_tokens=False) == text
    ids = smollm2.encode("<|im_start|>user\n42<|im_end|>").ids
    assert (ids[0], ids[-1]) == (1, 2)
    assert smollm2.encode("42").tokens == ["4", "2"]
    assert smollm2.decode(ids) == "user\n42"


def test_smollm2_template_renders_and_stop_tokens_are_listed(demo_checkpoint: Path) -> None:
    template = jinja2.Environment(autoescape=False).from_string((demo_checkpoint / "chat_template.jinja").read_text())
    text = template.render(messages=[{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    generation = json.loads((demo_checkpoint / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "pad_token_id": 2, "eos_token_id": [2, 0]}
    config = json.loads((demo_checkpoint / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert config["added_tokens_decoder"]["2"]["special"] is True


def test_transformers_reads_the_same_tokenizer(demo_checkpoint: Path, smollm2: Tokenizer) -> None:
    theirs = AutoTokenizer.from_pretrained(demo_checkpoint)
    for text in TEXTS:
        assert theirs.encode(text) == smollm2.encode(text).ids
    assert theirs.eos_token_id == 2


def tiny(tmp_path: Path, **change: Any) -> tuple[Tokenizer, Path]:
    out = tmp_path / "out"
    import_gguf(TinyGguf(**change).write(tmp_path / "in.gguf"), out, progress=lambda stage, done, total: None)
    return Tokenizer.from_file(str(out / "tokenizer.json")), out


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["ab", "1", "2", "3", "4", "'S", "Ġ(", "x", ")"]),
        ("qwen2", ["ab", "1", "2", "3", "4", "'S", "Ġ(", "x", ")"]),
        ("llama-bpe", ["ab", "123", "4", "'S", "Ġ(", "x", ")"]),
        ("gpt-2", ["ab", "1234", "'", "S", "Ġ(", "x", ")"]),
    ],
)
def test_each_pre_tokenizer_splits_its_way(pre: str, pieces: list[str], tmp_path: Path) -> None:
    tokenizer, _ = tiny(tmp_path, pre=pre)
    split = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("ab1234'S (x)")]
    if pre == "smollm":  # GPT-2's contractions are lower case only
        pieces = [*pieces[:5], "'", "S", *pieces[6:]]
    assert split == pieces


def test_token_kinds(tmp_path: Path) -> None:
    tokenizer, out = tiny(tmp_path, pre="qwen2")
    assert tokenizer.encode("<think>hello world<|im_end|>").tokens[:3] == ["<think>", "hello", "Ġw"]
    ids = tokenizer.encode("<think>hello<|im_end|>").ids
    assert tokenizer.decode(ids) == "<think>hello"  # user-defined tokens are text, control tokens are not
    assert tokenizer.token_to_id("[PAD265]") is None
    assert tokenizer.encode("e\u0301").ids == tokenizer.encode("\u00e9").ids  # Qwen normalises to NFC
    config = json.loads((out / "tokenizer_config.json").read_text())
    kinds = {token["content"]: token["special"] for token in config["added_tokens_decoder"].values()}
    assert kinds == {"<|endoftext|>": True, "<|im_start|>": True, "<|im_end|>": True, "<think>": False}


def test_bos_is_added_where_the_file_or_its_family_says_so(tmp_path: Path) -> None:
    for number, (pre, metadata, expected) in enumerate(
        [
            ("llama-bpe", {}, [1]),
            ("llama-bpe", {"tokenizer.ggml.add_bos_token": False}, []),
            ("qwen2", {}, []),
            ("qwen2", {"tokenizer.ggml.add_bos_token": True}, [1]),
        ]
    ):
        directory = tmp_path / str(number)
        directory.mkdir()
        tokenizer, _ = tiny(directory, pre=pre, metadata=metadata)
        hello = tokenizer.token_to_id("hello")
        assert tokenizer.encode("hello").ids == [*expected, hello]
        assert tokenizer.encode("hello", add_special_tokens=False).ids == [hello]


def test_no_template_means_no_template_file(tmp_path: Path) -> None:
    _, out = tiny(tmp_path, chat_template=None)
    assert not (out / "chat_template.jinja").exists()
