"""Samples for training: documents cut into pieces, half of them cut on and filled in from the middle, as token ids.

    python training/samples.py WORK/ PASS    writes WORK/tokens-PASS.u16 from WORK/train*.jsonl(.xz)

Every pass has an order and holes of its own, which depend on its number alone.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

END, PREFIX, MIDDLE, SUFFIX = "<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"
SPECIAL = (END, "<|im_start|>", "<|im_end|>", PREFIX, MIDDLE, SUFFIX, "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")
PIECE = 6000  # characters: about 1,800 tokens, so that most pieces fit the context
FIM_SHARE = 0.5
SECTION = (400, 4500)  # characters of a sample with a hole: many holes a window, so that finding the place is learnt
BEFORE, AFTER = 2000, 1000  # characters around a hole at most, as editors send

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
    """Where the middle begins and ends: a line, the rest of one, some lines, or any two places.

    But for the last, no hole begins inside an indentation: a cursor stands behind it.
    """
    kind, at = rng.random(), rng.randrange(len(text) + 1)
    line = text.rfind("\n", 0, at) + 1
    end = _line_end(text, at)
    code = end - len(text[line:end].lstrip())
    if kind < 0.3:
        return code, end
    if kind < 0.6:  # as an editor asks at the cursor
        return max(at, code), end
    if kind < 0.85:
        for _ in range(rng.randrange(8)):
            end = _line_end(text, end + 1)
        return code, end
    other = rng.randrange(len(text) + 1)
    return min(at, other), max(at, other)


def _line_end(text: str, at: int) -> int:
    end = text.find("\n", at)
    return len(text) if end < 0 else end


def sections(piece: str, rng: random.Random) -> Iterator[str]:
    """A piece cut at line ends into sections, as many of 400 to 800 characters as of 2,000 to 4,000."""
    least, most = map(math.log, SECTION)
    while piece:
        cut = _line_end(piece, int(math.exp(rng.uniform(least, most)))) + 1
        yield piece[:cut]
        piece = piece[cut:]


def fill_in_the_middle(text: str, rng: random.Random) -> str:
    """The text as prefix, suffix and middle."""
    start, end = holes(text, rng)
    return f"{PREFIX}{text[max(0, start - BEFORE) : start]}{SUFFIX}{text[end : end + AFTER]}{MIDDLE}{text[start:end]}"


def arrange(piece: str, rng: random.Random) -> Iterator[str]:
    """The samples of a piece: the piece as it is or, at FIM_SHARE, its sections with a hole in each."""
    if rng.random() >= FIM_SHARE:
        yield piece
    else:
        yield from (fill_in_the_middle(section, rng) for section in sections(piece, rng))


def write_pass(work: Path, number: int) -> Path:
    """One pass over the training texts as a file of uint16, each piece ended by END. Kept if it is there already."""
    target = work / f"tokens-{number}.u16"
    if target.exists():
        return target
    started, rng = time.monotonic(), random.Random(number)
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    end = tokenizer.token_to_id(END)
    files = sorted(work.glob("train-*.jsonl.xz")) or [work / "train.jsonl"]
    made = [piece for file in files for text in read_texts(file) for piece in pieces(text) if piece.strip()]
    rng.shuffle(made)
    count, unfinished = 0, target.with_suffix(".unfinished")
    with unfinished.open("wb") as out:
        for at in range(0, len(made), 4096):  # on all cores
            samples = [sample for piece in made[at : at + 4096] for sample in arrange(piece, rng)]
            encoded = tokenizer.encode_batch_fast(samples)
            ids = np.fromiter((i for one in encoded for i in (*one.ids, end)), np.uint16)
            count += out.write(ids.tobytes()) // 2
    unfinished.rename(target)
    print(f"pass {number}: {count / 1e6:.1f} M tokens in {time.monotonic() - started:.0f} s", flush=True)
    return target


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("number", type=int, metavar="PASS")
    args = parser.parse_args()
    write_pass(args.work, args.number)


if __name__ == "__main__":
    main()
