"""Drives Mixbit's engine (loader, backend, executor; no server) as one side of a benchmark.

A child process (see bench/commands.py). The peer's script knows the same commands, so that bench/cpu.py can alternate
between them.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgspec

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.commands import drive
from bench.engine_alone import stream_seconds
from mixbit.engine.benchmark import BLOCK_SIZE, STEP_TOKENS, Driver
from mixbit.engine.build import build
from mixbit.engine.config import EngineConfig
from mixbit.engine.loader import load
from mixbit.engine.memory_plan import plan_memory
from mixbit.engine.sizing import cache_bytes
from mixbit.kernels.executor import CacheConfig, ExecutorOptions
from mixbit.kernels.registry import choose


class Engine:
    """options: further ones of the executor; `memory` and `expert_memory` as `mixbit serve` has them, in bytes.

    access: how streamed experts come from their files; None leaves it to the plan.
    """

    def __init__(self, model: str, threads: int, context: int, sequences: int = 1, **options: Any) -> None:
        private, start = private_memory(), time.perf_counter()
        self.path, self.threads, self.core = model, threads, None
        self.model = load(Path(model))
        memory, experts = options.pop("memory", None), options.pop("expert_memory", None)
        access = options.pop("access", None)
        executor = ExecutorOptions(max_tokens=STEP_TOKENS, threads=threads, **options)
        if memory or experts:
            executor = self._planned(executor, context, sequences, memory, experts)
        if executor.experts is not None and access is not None:
            executor = replace(executor, experts=replace(executor.experts, access=access))
        self.driver = Driver("cpu", self.model.program, self.model.vocab_size, context, sequences, executor)
        if executor.experts is None:
            self.driver.step(1, 1, 0)
        self.loaded = {"seconds": time.perf_counter() - start, "private": private_memory() - private}

    def _planned(
        self, options: ExecutorOptions, context: int, sequences: int, memory: int | None, experts: int | None
    ) -> ExecutorOptions:
        """As `mixbit serve` plans, with caches as large as the driver's."""
        program, backend = self.model.program, choose("cpu").backend
        config = EngineConfig(model=self.path, max_running=1, memory_bytes=memory, expert_bytes=experts)
        pools = cache_bytes(program, CacheConfig(-(-context // BLOCK_SIZE), BLOCK_SIZE, sequences), config, backend)
        config = msgspec.structs.replace(config, cache_bytes=2 * pools)  # some go to states for the prefix cache
        plan = plan_memory(program, self.model.weight_bytes, config, context, backend, options)
        print(plan.explanation, file=sys.stderr, flush=True)
        return replace(options, max_tokens=plan.step_tokens, experts=plan.experts)

    def experts(self) -> dict[str, Any]:
        """What streaming has come to since the start."""
        counts = [asdict(layer) for layer in self.driver.executor.expert_counts()]
        return {name: sum(layer[name] for layer in counts) for name in counts[0]} if counts else {}

    def stream(self, tokens: int) -> float:
        """Seconds for `tokens` tokens of one request through scheduler, sampler and detokenizer."""
        if self.core is None:
            config = EngineConfig(model=self.path, threads=self.threads)
            self.core = build(config, lambda stage, done, total: None).core
        return stream_seconds(self.core, tokens)

    def answer(self, do: str, **command: Any) -> dict[str, Any]:
        match do:
            case "prefill":
                return {"seconds": self.driver.prefill(**command)}
            case "decode":
                return {"seconds": self.driver.decode(**command)}
            case "stream":
                return {"seconds": self.stream(**command)}
            case "experts":
                return self.experts()
            case "facts":
                return {"weights": self.model.weight_bytes, "kv_token_bytes": self.driver.kv_token_bytes}
        raise ValueError(f"no such command: {do}")


def private_memory() -> int:
    """Bytes in memory that belong to this process alone; mapped files do not count."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    drive(Engine)
