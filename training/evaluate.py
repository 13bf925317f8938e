"""How good is a checkpoint on held-out code?

    python training/evaluate.py bits WORK/held_out.jsonl CHECKPOINT ... [--misread]
                                bits per byte; --misread also reads the first one's 8-bit routers as if they had 4 bits
    python training/evaluate.py fim WORK/held_out.jsonl CHECKPOINT
                                fills in single lines: exact matches, and how many results parse

Runs on this project's engine, exact float32 on the CPU. Bits per byte compare across tokenizers: the summed -log2 of
the probability of each token, over the bytes of the text.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.progress import track
from tokenizers import Tokenizer

from mixbit.engine.loader import load
from mixbit.kernels.executor import Batch, CacheConfig, Executor, ExecutorOptions
from mixbit.kernels.ops import Program
from mixbit.kernels.registry import choose

WINDOW = 1024  # tokens of context at most
BLOCK = 64


@dataclass(frozen=True, eq=False)
class Model:
    """A checkpoint, ready to be asked."""

    tokenizer: Tokenizer
    executor: Executor

    @classmethod
    def open(cls, path: Path, program: Program | None = None) -> Model:
        """program: instead of the checkpoint's own."""
        cache = CacheConfig(blocks=WINDOW // BLOCK, block_size=BLOCK, state_slots=1)
        executor = choose("cpu").backend.compile(
            program or load(path).program, cache, ExecutorOptions(max_tokens=WINDOW)
        )
        return cls(Tokenizer.from_file(str(path / "tokenizer.json")), executor)

    def logits(self, tokens: list[int], start: int, rows: list[int]) -> np.ndarray:
        """float32 [rows, vocab] after tokens[start:], the ones before being in the cache."""
        return self.executor.run(
            Batch(
                tokens=np.array(tokens[start:], np.int32),
                query_starts=np.array([0, len(tokens) - start], np.int32),
                context_lengths=np.array([start], np.int32),
                block_tables=np.arange(WINDOW // BLOCK, dtype=np.int32)[None],
                state_slots=np.zeros(1, np.int32),
                logit_rows=np.array(rows, np.int32),
            )
        )

    def bits(self, text: str, first: int | None) -> float:
        """-log2 of the text's probability, in windows. first: a token put before each window, None for none (then the
        window's first token is not counted)."""
        ids, total = self.tokenizer.encode(text, add_special_tokens=False).ids, 0.0
        for at in range(0, len(ids), WINDOW - 1):
            window = ids[at : at + WINDOW - 1]
            tokens = window if first is None else [first, *window]
            x = self.logits(tokens, 0, list(range(len(tokens)))).astype(np.float64)[:-1]
            x -= x.max(1, keepdims=True)
            x -= np.log(np.exp(x).sum(1, keepdims=True))
            total -= float(x[np.arange(len(tokens) - 1), tokens[1:]].sum()) / np.log(2)
        return total

    def greedy(self, prompt: list[int], most: int, stop: set[int]) -> list[int]:
        """The likeliest continuation, up to `most` tokens or one of `stop`, which is left out."""
        tokens, start, out = list(prompt), 0, []
        while len(out) < most and len(tokens) < WINDOW:
            best = int(self.logits(tokens, start, [len(tokens) - start - 1])[0].argmax())
            if best in stop:
                break
            start = len(tokens)
            tokens.append(best)
            out.append(best)
        return out


def documents(path: Path, characters: int) -> Iterator[str]:
    """Beginnings of held-out files, in a fixed random order, `characters` in all."""
    texts = [json.loads(line)["text"][:4000] for line in path.open()]
    random.Random(1).shuffle(texts)
    for text in texts:
        if characters <= 0:
            return
        characters -= len(text)
        yield text


def report_bits(held_out: Path, checkpoints: list[Path], characters: int, *, misread: bool) -> None:
    """Print bits per byte of each checkpoint."""
    texts = list(documents(held_out, characters))
    size = sum(len(text.encode()) for text in texts)
    models: list[tuple[str, Path, Program | None]] = [(path.name, path, None) for path in checkpoints]
    if misread:
        sys.path.insert(0, str(Path(__file__).parents[1]))
        from tests.parity.test_fault import with_routers_read_as

        models.append(
            ("8-bit routers misread as 4-bit", checkpoints[0], with_routers_read_as(load(checkpoints[0]).program, 4))
        )
    for name, path, program in models:
        model = Model.open(path, program)
        first = model.tokenizer.token_to_id("<|endoftext|>")
        total = sum(model.bits(text, first) for text in track(texts, name, transient=True))
        print(f"{name}: {total / size:.4f} bits per byte ({size / 1e3:.0f} kB)", flush=True)


def report_fim(held_out: Path, checkpoint: Path, count: int) -> None:
    """Print how often a removed line comes back."""
    model, rng = Model.open(checkpoint), random.Random(2)
    ids = {name: model.tokenizer.token_to_id(f"<|{name}|>") for name in ("fim_prefix", "fim_suffix", "fim_middle")}
    stop = {model.tokenizer.token_to_id("<|endoftext|>")}
    exact = parses = asked = 0
    for text in track(list(documents(held_out, 10**9)), "fill in", transient=True):
        lines = text.splitlines(keepends=True)
        inner = [i for i, line in enumerate(lines) if len(line.strip()) > 8 and not line.strip().startswith(("#", '"'))]
        if len(inner) < 5 or asked == count:
            continue
        at = rng.choice(inner[1:])
        indent = len(lines[at]) - len(lines[at].lstrip())
        before, after = "".join(lines[:at]) + lines[at][:indent], "\n" + "".join(lines[at + 1 :])
        wanted = lines[at].strip("\n")[indent:]
        prompt = [ids["fim_prefix"], *model.tokenizer.encode(before[-1800:]).ids]
        prompt += [ids["fim_suffix"], *model.tokenizer.encode(after[:900]).ids, ids["fim_middle"]]
        got = model.tokenizer.decode(model.greedy(prompt, 64, stop), skip_special_tokens=False).split("\n")[0]
        asked += 1
        exact += got.rstrip() == wanted.rstrip()
        parses += _parses(before + got + after) or not _parses(before + wanted + after)
    print(f"{checkpoint.name}: {exact} of {asked} lines exactly, {parses} parse as before", flush=True)


def _parses(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


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
        report_bits(args.held_out, args.checkpoints, args.characters, misread=args.misread)
    else:
        report_fim(args.held_out, args.checkpoints[0], args.count)


if __name__ == "__main__":
    main()
