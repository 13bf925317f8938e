"""Speed of one model's steps on this machine, without scheduler, sampler or server: for `mixbit bench`."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from mixbit.engine.errors import UserError
from mixbit.engine.loader import load
from mixbit.engine.sizing import slot_bytes
from mixbit.engine.step_cost import step_cost
from mixbit.kernels.executor import Batch, CacheConfig, Executor, ExecutorOptions, Precision
from mixbit.kernels.ops import Program
from mixbit.kernels.registry import choose

BLOCK_SIZE = 32
STEP_TOKENS = 512

Progress = Callable[[str, int, int], None]


class BenchmarkError(UserError):
    """Something that cannot be measured as asked; the message says why."""


class Driver:
    """Runs steps of random tokens on an executor.

    Up to `sequences` sequences share room for `context` tokens, and a step's tokens for each after the first.
    """

    def __init__(
        self, device: str, program: Program, vocab_size: int, context: int, sequences: int, options: ExecutorOptions
    ) -> None:
        self._vocab_size = vocab_size
        self._chunk = options.max_tokens
        self._sequences = sequences
        self._blocks = _blocks(context) + (sequences - 1) * _blocks(options.max_tokens)
        self._random = np.random.default_rng(0)
        self._filled: tuple[int, int] | None = None
        self._states = slot_bytes(program) * sequences
        cache = CacheConfig(self._blocks, BLOCK_SIZE, sequences)
        self.executor: Executor = choose(device).backend.compile(program, cache, options)

    @property
    def kv_token_bytes(self) -> float:
        """Bytes of the keys and values of one token in all layers."""
        return (self.executor.cache_bytes - self._states) / (self._blocks * BLOCK_SIZE)

    def step(self, sequences: int, tokens: int, context: int) -> None:
        """Run `tokens` new tokens at position `context` of each of the first `sequences` sequences."""
        count, room = sequences * tokens, self._blocks // sequences
        starts = np.arange(0, count + 1, tokens, dtype=np.int32)
        self.executor.run(
            Batch(
                tokens=self._random.integers(0, self._vocab_size, count).astype(np.int32),
                query_starts=starts,
                context_lengths=np.full(sequences, context, np.int32),
                block_tables=np.arange(sequences * room, dtype=np.int32).reshape(sequences, room),
                state_slots=np.arange(sequences, dtype=np.int32),
                logit_rows=starts[1:] - 1,
            )
        )

    def prefill(self, tokens: int, sequences: int = 1) -> float:
        """Seconds for a prompt of `tokens` in each sequence."""
        chunk = self._chunk // sequences
        start = time.perf_counter()
        for done in range(0, tokens, chunk):
            self.step(sequences, min(chunk, tokens - done), done)
        self._filled = (sequences, tokens)
        return time.perf_counter() - start

    def decode(self, tokens: int, context: int, sequences: int) -> float:
        """Seconds for `tokens` steps of every sequence after `context` tokens; filling is not counted."""
        if self._filled != (sequences, context):  # else what lies behind the context is written anew
            self.prefill(context, sequences)
        start = time.perf_counter()
        for done in range(tokens):
            self.step(sequences, 1, context + done)
        return time.perf_counter() - start


@dataclass(frozen=True)
class BenchmarkOptions:
    """prompt: tokens of the prefill. contexts: where decoding is measured; the first also with `batches`
    sequences together. tokens: decoding steps of a repetition. The rest as ExecutorOptions has it."""

    prompt: int
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    tokens: int
    repeat: int
    device: str = "auto"
    threads: int = 0
    isa: str | None = None
    dtype: str | None = None
    precision: Precision = "fast"

    @property
    def executor(self) -> ExecutorOptions:
        """How the program is run."""
        dtype = cast(Any, self.dtype)  # the backend refuses others
        return ExecutorOptions(
            max_tokens=STEP_TOKENS, threads=self.threads, isa=self.isa, dtype=dtype, precision=self.precision
        )


@dataclass(frozen=True)
class Measurement:
    """work: "prefill" or "decode". context: tokens before; for prefill the prompt's. Rates: the median repetition.

    tokens_per_second: of all sequences together. bytes_per_second: of what the steps had to move, decoding only.
    """

    work: str
    context: int
    sequences: int
    tokens_per_second: float
    bytes_per_second: float | None


@dataclass(frozen=True)
class Benchmark:
    """bandwidth: bytes a second of a plain read. load_seconds: until the first token, from files in the page cache."""

    model: str
    backend: str
    load_seconds: float
    bandwidth: float
    measurements: tuple[Measurement, ...]

    def as_json(self) -> dict[str, Any]:
        """Everything."""
        return asdict(self)


def run_benchmark(path: Path, options: BenchmarkOptions, progress: Progress) -> Benchmark:
    """Measure the model directory at `path`. Raises UserError, BackendError or SpecError."""
    choice = choose(options.device)
    start = time.perf_counter()
    model = load(path, progress=progress)
    room = max(options.prompt, *options.contexts) + options.tokens
    if room > model.context_length:
        raise BenchmarkError(f"{room} tokens are to be measured; the model was made for {model.context_length}")
    if max(options.batches) * options.contexts[0] > room + (max(options.batches) - 1) * STEP_TOKENS:
        raise BenchmarkError(
            f"{max(options.batches)} sequences together are measured at the first context, {options.contexts[0]}: "
            f"put one of up to {STEP_TOKENS} tokens first"
        )
    driver = Driver(options.device, model.program, model.vocab_size, room, max(options.batches), options.executor)
    driver.step(1, 1, 0)
    load_seconds = time.perf_counter() - start
    works = _works(options)
    measured = []
    for place, (work, context, sequences) in enumerate(works):
        progress("measuring", place * options.repeat, len(works) * options.repeat)
        seconds = []
        for turn in range(options.repeat):
            run = driver.prefill(context) if work == "prefill" else driver.decode(options.tokens, context, sequences)
            seconds.append(run)
            progress("measuring", place * options.repeat + turn + 1, len(works) * options.repeat)
        steps = context if work == "prefill" else options.tokens
        rate = steps * sequences / statistics.median(seconds)
        moved = None
        if work == "decode":
            cost = step_cost(model.program, sequences, 1, context + steps // 2, driver.kv_token_bytes)
            moved = cost.bytes * rate / sequences
        measured.append(Measurement(work, context, sequences, rate, moved))
    return Benchmark(
        model=str(path),
        backend=str(choice),
        load_seconds=load_seconds,
        bandwidth=read_bandwidth(options.threads or os.cpu_count() or 1),
        measurements=tuple(measured),
    )


def _works(options: BenchmarkOptions) -> Sequence[tuple[str, int, int]]:
    """(work, context, sequences), the prefill first."""
    first = options.contexts[0]
    return [
        ("prefill", options.prompt, 1),
        *(("decode", context, 1) for context in options.contexts),
        *(("decode", first, sequences) for sequences in options.batches if sequences > 1),
    ]


def read_bandwidth(threads: int) -> float:
    """Bytes a second of a plain read by NumPy on `threads` threads: best of five."""
    arrays = [np.ones(16 << 20, np.uint64) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(np.max, arrays))
            best = max(best, sum(array.nbytes for array in arrays) / (time.perf_counter() - start))
    return best


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_SIZE)
