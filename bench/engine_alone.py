"""The engine without a server: requests of benches, a stream of one, and what a step costs beside the model."""

from __future__ import annotations

import socket
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from mixbit.engine.admission import Admission, Limits
from mixbit.engine.core import EngineCore
from mixbit.engine.protocol import Generate, Sampling
from mixbit.engine.runner import batch_of
from mixbit.engine.scheduler import Scheduler
from mixbit.engine.tokenizer import load_tokenizer
from mixbit.engine.transport import WorkerSocket

STORY = "Once upon a time, in a land far away, there lived an old king who"


def greedy(request_id: str, prompt: str | list[int], tokens: int, *, logprobs: int | None = None) -> Generate:
    """A request for exactly so many tokens."""
    return Generate(
        request_id=request_id,
        prompt=prompt,
        add_special_tokens=False,
        sampling=Sampling(temperature=0),
        max_tokens=tokens,
        ignore_eos=True,
        logprobs=logprobs,
    )


def stream_seconds(core: EngineCore, tokens: int) -> float:
    """Of `tokens` tokens of one request after its first, through scheduler, sampler and detokenizer."""
    core.add(core.admission.admit(greedy("alone", STORY, tokens + 1)))
    core.step()
    start = time.perf_counter()
    while not core.idle:
        core.step()
    return time.perf_counter() - start


def step_cost(model: str, requests: int, steps: int) -> tuple[float, float]:
    """Seconds of a step that computes nothing: scheduling, arrays, detokenizing and sending; and sampling."""
    tokenizer = load_tokenizer(Path(model))
    logits = np.random.default_rng(0).standard_normal((requests, tokenizer.vocab_size)).astype(np.float32)
    scheduler = Scheduler(blocks=4096, block_size=32, max_running=16, step_tokens=512)
    limits = Limits(8192, scheduler.capacity, tokenizer.vocab_size, 64)

    def compute(chunks: Any, moves: Any) -> Any:
        batch_of(chunks)
        return logits

    core = EngineCore(compute, scheduler, Admission(tokenizer, limits))
    ours, theirs = socket.socketpair()
    connection = WorkerSocket(ours)
    generations = [core.admission.admit(greedy(str(number), STORY, 8000)) for number in range(requests)]
    for generation in generations:
        core.add(generation)
    core.step()
    full, sampling = [], []
    for _ in range(steps):
        start = time.perf_counter()
        connection.send(core.step())
        full.append(time.perf_counter() - start)
        theirs.recv(1 << 20)
        start = time.perf_counter()
        for generation, row in zip(generations, logits, strict=True):
            generation.sampler.choose(row)
        sampling.append(time.perf_counter() - start)
    return statistics.median(full) - statistics.median(sampling), statistics.median(sampling)
