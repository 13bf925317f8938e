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

from mixbit.engine.build import build
from mixbit.engine.config import EngineConfig
from mixbit.engine.loader import load
from mixbit.engine.protocol import Generate, Sampling
from mixbit.engine.sizing import slot_bytes
from mixbit.kernels.executor import Batch, CacheConfig, ExecutorOptions
from mixbit.kernels.registry import choose

BLOCK = 32
CHUNK = 512


class Engine:
    """One model; up to `sequences` sequences share room for `context` tokens, and 512 for each further one."""

    def __init__(self, model: str, threads: int, context: int, sequences: int, options: dict[str, Any]) -> None:
        private, start = private_memory(), time.perf_counter()
        self.blocks = -(-context // BLOCK) + (sequences - 1) * CHUNK // BLOCK
        self.sequences, self.threads, self.path = sequences, threads, model
        self.model = load(Path(model))
        device = options.pop("device", "auto")
        self.executor = choose(device).backend.compile(
            self.model.program,
            CacheConfig(self.blocks, BLOCK, sequences),
            ExecutorOptions(max_tokens=CHUNK, threads=threads, **options),
        )
        self.rng = np.random.default_rng(0)
        self.filled: tuple[int, int] | None = None
        self.core: Any = None
        self.step(1, 1, 0)
        self.loaded = {"seconds": time.perf_counter() - start, "private": private_memory() - private}

    def step(self, sequences: int, tokens: int, context: int) -> None:
        """Run `tokens` new tokens at position `context` of each of the first `sequences` sequences."""
        count, room = sequences * tokens, self.blocks // sequences
        starts = np.arange(0, count + 1, tokens, dtype=np.int32)
        self.executor.run(
            Batch(
                tokens=self.rng.integers(0, self.model.vocab_size, count).astype(np.int32),
                query_starts=starts,
                context_lengths=np.full(sequences, context, np.int32),
                block_tables=np.arange(sequences * room, dtype=np.int32).reshape(sequences, room),
                state_slots=np.arange(sequences, dtype=np.int32),
                logit_rows=starts[1:] - 1,
            )
        )

    def fill(self, sequences: int, context: int) -> None:
        """Fill each cache up to `context` tokens."""
        chunk = CHUNK // sequences
        for start in range(0, context, chunk):
            self.step(sequences, min(chunk, context - start), start)
        self.filled = (sequences, context)

    def prefill(self, tokens: int) -> float:
        """Seconds for a prompt of `tokens`."""
        start = time.perf_counter()
        self.fill(1, tokens)
        return time.perf_counter() - start

    def decode(self, tokens: int, context: int, sequences: int) -> float:
        """Seconds for `tokens` steps of every sequence after `context` tokens; filling is not counted."""
        if self.filled != (sequences, context):  # what lies behind the context is written anew
            self.fill(sequences, context)
        start = time.perf_counter()
        for i in range(tokens):
            self.step(sequences, 1, context + i)
        return time.perf_counter() - start

    def stream(self, tokens: int) -> float:
        """Seconds for `tokens` tokens of one request through scheduler, sampler and detokenizer."""
        if self.core is None:
            config = EngineConfig(model=self.path, threads=self.threads)
            self.core = build(config, lambda stage, done, total: None).core
        request = Generate(
            request_id="alone",
            prompt="Once upon a time, in a land far away, there lived an old king who",
            add_special_tokens=False,
            sampling=Sampling(temperature=0),
            max_tokens=tokens + 1,
            ignore_eos=True,
        )
        self.core.add(self.core.admission.admit(request))
        self.core.step()
        start = time.perf_counter()
        while not self.core.idle:
            self.core.step()
        return time.perf_counter() - start

    def facts(self) -> dict[str, float]:
        """Bytes: of weights, of the keys and values of one token, allocated now."""
        states = slot_bytes(self.model.program) * self.sequences
        kv = (self.executor.cache_bytes - states) / (self.blocks * BLOCK)
        return {"weights": self.model.weight_bytes, "kv_token_bytes": kv, "resident": private_memory()}


def private_memory() -> int:
    """Bytes in memory that belong to this process alone; mapped files do not count."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def main() -> None:
    options = json.loads(sys.argv[1])
    engine = Engine(
        options.pop("model"),
        options.pop("threads"),
        options.pop("context"),
        options.pop("sequences", 1),
        options,
    )
    reply(engine.loaded)
    for line in sys.stdin:
        command = json.loads(line)
        match command.pop("do"):
            case "prefill":
                reply({"seconds": engine.prefill(**command)})
            case "decode":
                reply({"seconds": engine.decode(**command)})
            case "stream":
                reply({"seconds": engine.stream(**command)})
            case "facts":
                reply(engine.facts())


def reply(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
