"""Drives Mixbit's engine (loader, backend, executor; no server) as one side of a benchmark.

A child process: reads one JSON command a line on standard input, answers with one JSON line. The peer
scripts speak the same commands, so that bench/cpu.py can alternate between them.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from mixbit.engine.loader import load
from mixbit.kernels.executor import Batch, CacheConfig, ExecutorOptions
from mixbit.kernels.registry import choose

BLOCK = 32


class Engine:
    def __init__(self, model: str, threads: int, context: int, sequences: int, device: str) -> None:
        self.blocks = -(-context // BLOCK)
        self.model = load(Path(model))
        self.chunk = 512
        self.executor = choose(device).backend.compile(
            self.model.program,
            CacheConfig(self.blocks * sequences, BLOCK, sequences),
            ExecutorOptions(max_tokens=self.chunk, threads=threads),
        )
        self.rng = np.random.default_rng(0)

    def step(self, sequences: int, tokens: int, context: int) -> None:
        """Run `tokens` new tokens at position `context` of each of the first `sequences` sequences."""
        count = sequences * tokens
        tables = np.arange(sequences * self.blocks, dtype=np.int32).reshape(sequences, self.blocks)
        starts = np.arange(0, count + 1, tokens, dtype=np.int32)
        self.executor.run(
            Batch(
                tokens=self.rng.integers(0, self.model.vocab_size, count).astype(np.int32),
                query_starts=starts,
                context_lengths=np.full(sequences, context, np.int32),
                block_tables=tables,
                state_slots=np.arange(sequences, dtype=np.int32),
                logit_rows=starts[1:] - 1,
            )
        )

    def fill(self, sequences: int, context: int) -> None:
        """Fill each cache up to `context` tokens."""
        chunk = self.chunk // sequences
        for start in range(0, context, chunk):
            self.step(sequences, min(chunk, context - start), start)

    def prefill(self, tokens: int) -> float:
        """Seconds for a prompt of `tokens`."""
        start = time.perf_counter()
        self.fill(1, tokens)
        return time.perf_counter() - start

    def decode(self, tokens: int, context: int, sequences: int) -> float:
        """Seconds for `tokens` steps of every sequence after `context` tokens; filling is not counted."""
        self.fill(sequences, context)
        start = time.perf_counter()
        for i in range(tokens):
            self.step(sequences, 1, context + i)
        return time.perf_counter() - start


def main() -> None:
    options = json.loads(sys.argv[1])
    start = time.perf_counter()
    engine = Engine(
        options["model"],
        options["threads"],
        options["context"],
        options.get("sequences", 1),
        options.get("device", "auto"),
    )
    reply({"load_seconds": time.perf_counter() - start})
    for line in sys.stdin:
        command = json.loads(line)
        match command.pop("do"):
            case "prefill":
                reply({"seconds": engine.prefill(**command)})
            case "decode":
                reply({"seconds": engine.decode(**command)})
            case "memory":
                memory = psutil.Process().memory_full_info()
                reply({"private": memory.uss, "weights": engine.model.weight_bytes})


def reply(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
