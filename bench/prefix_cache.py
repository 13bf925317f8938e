"""What the prefix cache saves: an agent's conversation replayed over the engine's worker process, without HTTP.

Ten turns over a system prompt of 6,000 tokens; after every third a side request with another system prompt, as
editors send them. Then the worker is started again, and the next turn begins from the disk. Tokens are random:
their values do not matter to the time. The last column: how far log-probabilities (of the last warm turn, of the
restarted one) are from those of a run without a cache. Run it as `.venv/bin/python bench/prefix_cache.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.engine_alone import greedy
from mixbit.engine.client import EngineClient
from mixbit.engine.config import EngineConfig
from mixbit.engine.demo import ensure_demo
from mixbit.engine.protocol import Delta, Finished
from mixbit.engine.tokenizer import load_tokenizer
from tests.checkpoints import write_checkpoint

SYSTEM, SIDE, QUESTION, ANSWER, TURNS = 6000, 800, 24, 32, 10
HYBRID = {
    "num_hidden_layers": 8,
    "full_attention_interval": 4,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class Answer:
    """One request. first: seconds to the first token. tokens: of the answer. likely: log-probabilities by token."""

    first: float
    tokens: list[int]
    likely: list[dict[int, float]]
    prompt: int
    cached: int


@dataclass(frozen=True)
class Replay:
    """cold: the first turn. warm: the others. restarted: the turn after the restart.

    differences: of the last warm turn and of the restarted one from runs of the same prompts without any cache.
    """

    cold: Answer
    warm: list[Answer]
    restarted: Answer
    differences: list[float]


def difference(one: Answer, other: Answer) -> float:
    """The largest between the log-probabilities of the likely tokens; infinite if others were chosen."""
    if one.tokens != other.tokens:
        return float("inf")
    pairs = [(a[token], b[token]) for a, b in zip(one.likely, other.likely, strict=True) for token in a.keys() & b]
    return max(abs(a - b) for a, b in pairs)


async def ask(client: EngineClient, prompt: list[int], name: str) -> Answer:
    request = greedy(name, prompt, ANSWER, logprobs=20)
    start, first, tokens, likely = time.perf_counter(), 0.0, list[int](), list[dict[int, float]]()
    async with await client.generate(request) as events:
        async for event in events:
            if isinstance(event, Delta):
                first = first or time.perf_counter() - start
                tokens += [each.chosen.token_id for each in event.logprobs]
                likely += [{token.token_id: token.logprob for token in each.top} for each in event.logprobs]
            elif isinstance(event, Finished):
                return Answer(first, tokens, likely, event.usage.prompt_tokens, event.usage.cached_tokens)
    raise RuntimeError("the engine ended without an answer")


async def replay(model: Path, disk: Path, threads: int, precision: Literal["exact", "fast"]) -> Replay:
    rng = np.random.default_rng(0)
    tokenizer = load_tokenizer(model)
    end = min(tokenizer.eos_ids)
    low = end + 1 if end < 64 else 3  # beyond the special tokens

    def text(count: int) -> list[int]:
        return [int(token) for token in rng.integers(low, tokenizer.vocab_size - 64, count)]

    def config(disk_cache: Path | None) -> EngineConfig:
        kept = None if disk_cache is None else str(disk_cache)
        return EngineConfig(
            model=str(model), threads=threads, precision=precision, max_running=4, cache_bytes=2 << 30, disk_cache=kept
        )

    talk, side = [*text(SYSTEM), end], [*text(SIDE), end]
    answers = []
    async with EngineClient(config(disk)) as client:
        await client.wait_ready()
        for turn in range(TURNS):
            talk += [*text(QUESTION), end]
            last = list(talk)
            answers.append(await ask(client, talk, f"turn {turn}"))
            talk += [*answers[-1].tokens, end]
            if turn % 3 == 2:
                await ask(client, [*side, *text(200), end], f"side {turn}")
        size = -1
        while size != (size := sum(path.stat().st_size for path in disk.rglob("*") if path.is_file())):
            await asyncio.sleep(0.5)
    talk += [*text(QUESTION), end]
    async with EngineClient(config(disk)) as client:
        await client.wait_ready()
        restarted = await ask(client, talk, "restarted")
    differences = []
    for prompt, answer in ((last, answers[-1]), (talk, restarted)):
        async with EngineClient(config(None)) as client:
            await client.wait_ready()
            differences.append(difference(answer, await ask(client, prompt, "alone")))
    return Replay(answers[0], answers[1:], restarted, differences)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--precision", choices=("exact", "fast"), default="fast", help="as mixbit serve has it")
    parser.add_argument("--only", choices=("dense", "hybrid"), help="one of the two models")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    table = Table(
        "model",
        "share from cache",
        "cold s",
        "warm s",
        "warm/cold",
        "restart s",
        "restart/cold",
        "off by",
    )
    figures = {}
    with tempfile.TemporaryDirectory() as directory:
        hybrid = write_checkpoint(Path(directory) / "hybrid", "qwen3_next", config=HYBRID)
        models = {"dense": ("SmolLM2", ensure_demo(lambda *_: None)), "hybrid": ("random qwen3_next", hybrid)}
        for kind, (name, model) in models.items():
            if args.only not in (None, kind):
                continue
            result = asyncio.run(replay(model, Path(directory) / f"disk-{name}", args.threads, args.precision))
            cold, warm = result.cold.first, statistics.median(each.first for each in result.warm)
            share = sum(each.cached for each in result.warm) / sum(each.prompt for each in result.warm)
            again = result.restarted.first
            figures[name] = {"share": share, "cold": cold, "warm": warm, "restart": again, "off": result.differences}
            row = (share, cold, warm, warm / cold, again, again / cold)
            table.add_row(
                name, *(f"{value:.4f}" for value in row), ", ".join(f"{each:.1e}" for each in result.differences)
            )
    Console(width=140).print(table)
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
