"""How good is a checkpoint on held-out code? Tables as in the README, for any checkpoint.

    python training/evaluate.py bits WORK/held_out.jsonl CHECKPOINT ... [--misread]
                                bits per byte; --misread also reads the first one's 8-bit routers as if they had 4 bits
    python training/evaluate.py fim WORK/held_out.jsonl CHECKPOINT
                                single lines filled in, in the forms of request that editors use

Bits per byte are computed exactly (float32, CPU), and compare across tokenizers: the summed -log2 of the probability of
each token, over the bytes of the text. Fill-in runs through `mixbit serve`.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fim import FORMS, fill, find_holes, serve
from rich.progress import track
from tokenizers import Tokenizer

from mixbit.engine.loader import load
from mixbit.kernels.executor import Batch, CacheConfig, Executor, ExecutorOptions
from mixbit.kernels.ops import Program
from mixbit.kernels.registry import choose

WINDOW = 1024  # tokens of context at most
BLOCK = 64
MOST = 4000  # characters of a file


@dataclass(frozen=True, eq=False)
class Model:
    """A checkpoint, ready to be asked."""

    tokenizer: Tokenizer
    executor: Executor

    @classmethod
    def open(cls, path: Path, program: Program | None = None) -> Model:
        """program: instead of the checkpoint's own."""
        cache = CacheConfig(blocks=WINDOW // BLOCK, block_size=BLOCK, state_slots=1)
        options = ExecutorOptions(max_tokens=WINDOW)
        executor = choose("cpu").backend.compile(program or load(path).program, cache, options)
        return cls(Tokenizer.from_file(str(path / "tokenizer.json")), executor)

    def logits(self, tokens: list[int]) -> np.ndarray:
        """float32 [tokens, vocab] of a sequence that begins here."""
        return self.executor.run(
            Batch(
                tokens=np.array(tokens, np.int32),
                query_starts=np.array([0, len(tokens)], np.int32),
                context_lengths=np.zeros(1, np.int32),
                block_tables=np.arange(WINDOW // BLOCK, dtype=np.int32)[None],
                state_slots=np.zeros(1, np.int32),
                logit_rows=np.arange(len(tokens), dtype=np.int32),
            )
        )

    def bits(self, text: str, first: int | None) -> float:
        """-log2 of the text's probability, in windows. first: a token put before each window, None for none (then the
        window's first token is not counted)."""
        ids, total = self.tokenizer.encode(text, add_special_tokens=False).ids, 0.0
        for at in range(0, len(ids), WINDOW - 1):
            window = ids[at : at + WINDOW - 1]
            tokens = window if first is None else [first, *window]
            x = self.logits(tokens).astype(np.float64)[:-1]
            x -= x.max(1, keepdims=True)
            x -= np.log(np.exp(x).sum(1, keepdims=True))
            total -= float(x[np.arange(len(tokens) - 1), tokens[1:]].sum()) / np.log(2)
        return total


def files(held_out: Path) -> Iterator[str]:
    """Held-out files in a fixed random order."""
    texts = [json.loads(line)["text"] for line in held_out.open()]
    random.Random(1).shuffle(texts)
    return iter(texts)


def beginnings(held_out: Path, characters: int) -> list[str]:
    """Beginnings of held-out files, `characters` in all."""
    chosen = []
    for text in files(held_out):
        if characters <= 0:
            break
        chosen.append(text[:MOST])
        characters -= len(chosen[-1])
    return chosen


def bits_per_byte(path: Path, texts: list[str], program: Program | None = None, name: str = "") -> float:
    """Of a checkpoint, or of another program with its tokenizer."""
    model = Model.open(path, program)
    first = model.tokenizer.token_to_id("<|endoftext|>")
    total = sum(model.bits(text, first) for text in track(texts, name or path.name, transient=True))
    return total / sum(len(text.encode()) for text in texts)


def misread(path: Path) -> Program:
    """The checkpoint with its 8-bit routers taken for 4-bit ones: the fault that this project exists for."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.parity.test_fault import with_routers_read_as

    return with_routers_read_as(load(path).program, 4)


def report_bits(checkpoints: list[Path], texts: list[str], *, with_misread: bool) -> str:
    """A Markdown table."""
    rows = [(path.name, path, None) for path in checkpoints]
    if with_misread:
        rows.append(("8-bit routers misread as 4-bit", checkpoints[0], misread(checkpoints[0])))
    lines = ["| weights | bits per byte |", "|---|---|"]
    for name, path, program in rows:
        lines.append(f"| {name} | {bits_per_byte(path, texts, program, name):.3f} |")
    return "\n".join(lines)


def report_fim(checkpoint: Path, held_out: Path, count: int) -> str:
    """A Markdown table."""
    holes = find_holes(files(held_out), count)
    lines = [f"| form of request ({len(holes)} lines) | exactly the line | parses |", "|---|---|---|"]
    context = load(checkpoint).context_length
    with serve(checkpoint) as client:
        for name, form in FORMS.items():
            done = fill(client, holes, form, context)
            lines.append(f"| {name} | {done.exact / done.asked:.1%} | {done.parses / done.asked:.1%} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("bits", "fim"))
    parser.add_argument("held_out", type=Path)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--misread", action="store_true")
    parser.add_argument("--characters", type=int, default=300_000)
    parser.add_argument("--count", type=int, default=200)
    args = parser.parse_args()
    if args.what == "bits":
        texts = beginnings(args.held_out, args.characters)
        print(report_bits(args.checkpoints, texts, with_misread=args.misread))
    else:
        print("\n\n".join(report_fim(path, args.held_out, args.count) for path in args.checkpoints))


if __name__ == "__main__":
    main()
