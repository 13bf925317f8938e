"""Samples for training: documents cut into pieces, half of them turned into fill-in-the-middle, as token ids."""

from __future__ import annotations

import json
import lzma
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

END, PREFIX, MIDDLE, SUFFIX = "<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"
SPECIAL = (END, "<|im_start|>", "<|im_end|>", PREFIX, MIDDLE, SUFFIX, "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")
PIECE = 6000  # characters: about 1,800 tokens, so that most pieces fit the context
FIM_SHARE = 0.5

# Words with a leading space, single digits, runs of other signs, line ends with indentation: as Qwen splits, but
# indentation stays together with its line end, which code repeats so often.
_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\n+[ \t]*|[ \t]+(?!\S)|\s+"


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer with Qwen's names for special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=24,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def read_texts(path: Path) -> Iterator[str]:
    """The texts of a .jsonl or .jsonl.xz file."""
    with (lzma.open if path.suffix == ".xz" else open)(path, "rt") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def pieces(text: str) -> Iterator[str]:
    """A document cut at line ends into pieces of at most PIECE characters, at definitions where there are any."""
    while len(text) > PIECE:
        window = text[:PIECE]
        cut = max(
            window.rfind("\ndef ", PIECE // 2),
            window.rfind("\nclass ", PIECE // 2),
            window.rfind("\n    def ", PIECE // 2),
        )
        if cut < 0:
            cut = window.rfind("\n", PIECE // 2)
        cut = PIECE if cut < 0 else cut + 1
        yield text[:cut]
        text = text[cut:]
    yield text


def holes(text: str, rng: random.Random) -> tuple[int, int]:
    """Where the middle begins and ends: the rest of a line, whole lines, or any two places."""
    kind, at = rng.random(), rng.randrange(len(text) + 1)
    if kind < 0.4:  # the rest of the line, as an editor asks at the cursor
        end = text.find("\n", at)
        return at, len(text) if end < 0 else end
    if kind < 0.75:  # some lines
        start = text.rfind("\n", 0, at) + 1
        start = min(at, start + rng.choice((0, 0, 4, 8)))
        end = at
        for _ in range(rng.randint(1, 8)):
            end = text.find("\n", end + 1)
            if end < 0:
                return start, len(text)
        return start, end
    other = rng.randrange(len(text) + 1)
    return min(at, other), max(at, other)


def arrange(text: str, rng: random.Random) -> str:
    """The text as it is or, at FIM_SHARE, as prefix, suffix, middle."""
    if rng.random() >= FIM_SHARE or len(text) < 20:
        return text
    start, end = holes(text, rng)
    return f"{PREFIX}{text[:start]}{SUFFIX}{text[end:]}{MIDDLE}{text[start:end]}"


def encode(tokenizer: str, texts: list[str], seed: int) -> npt.NDArray[np.uint16]:
    """All pieces of the texts, arranged, each ended by END, one after another."""
    coder, rng = Tokenizer.from_str(tokenizer), random.Random(seed)
    arranged = [arrange(piece, rng) for text in texts for piece in pieces(text) if piece.strip()]
    rng.shuffle(arranged)
    end = coder.token_to_id(END)
    return np.array([i for one in coder.encode_batch(arranged) for i in (*one.ids, end)], np.uint16)


def write_epoch(tokenizer: Tokenizer, texts: list[str], seed: int, target: Path, workers: int) -> int:
    """One pass over the texts as a file of uint16; returns how many tokens."""
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    parts = [[texts[i] for i in order[w :: workers * 8]] for w in range(workers * 8)]
    count = 0
    with ProcessPoolExecutor(workers) as pool, target.open("wb") as out:
        seeds = [seed * 10_000 + i for i in range(len(parts))]
        for ids in pool.map(partial(encode, tokenizer.to_str()), parts, seeds):
            out.write(ids.tobytes())
            count += len(ids)
    return count
