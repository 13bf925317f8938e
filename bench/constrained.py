"""What a grammar costs: decode of one engine with and without, in alternating runs.

    python bench/constrained.py [--model PATH] [--tokens N] [--rounds N] [--batch N] [--stall]

Prints milliseconds per step, the median over rounds, and the ratio to the free runs of the same session; and, for
machines that others use too, the processor time that choosing one token takes of the thread that runs the steps,
and of the others, which work while the device does. With --stall instead: how long a running stream of a new worker
pauses at most, before and after the first grammar comes.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import statistics
import time
from typing import Any

import msgspec
import numpy as np

from mixbit.engine.build import build
from mixbit.engine.client import EngineClient
from mixbit.engine.config import EngineConfig
from mixbit.engine.core import EngineCore
from mixbit.engine.demo import ensure_demo
from mixbit.engine.protocol import Finished, Generate, Grammar, Sampling, Schema

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "tags": {"type": "array"}},
    "required": ["name", "age", "tags"],
}


def schema(value: Any) -> Grammar:
    return Grammar(lark="start: schema_0", param="f", schemas=[Schema(json=json.dumps(value), param="f")])


CASES: dict[str, Grammar | None] = {
    "free": None,
    "any text": Grammar(lark="start: pattern_0", param="f", patterns=["(?s:.*)"]),
    "schema": schema({"type": "array", "items": PERSON, "minItems": 100}),
    "any JSON": schema({"type": "array", "minItems": 1000}),
}


def run(core: EngineCore, case: str, batch: int, tokens: int) -> float:
    """Milliseconds of the median step that decodes."""
    for place in range(batch):
        message = Generate(
            request_id=str(place),
            prompt="Write a list of people as JSON: ",
            add_special_tokens=False,
            sampling=Sampling(temperature=0.7, seed=place),
            max_tokens=tokens,
            ignore_eos=True,
            grammar=CASES[case],
        )
        core.add(core.admission.admit(message))
    core.step()
    times = []
    while not core.idle:
        start = time.perf_counter()
        core.step()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1000


def processor_time(core: EngineCore, vocab_size: int, case: str, tokens: int) -> tuple[float, float]:
    """Microseconds to choose a token from random logits: of this thread, of others."""
    message = Generate(
        request_id="0",
        prompt="x",
        add_special_tokens=False,
        sampling=Sampling(temperature=0.7, seed=0),
        max_tokens=None,
        grammar=CASES[case],
    )
    generation = core.admission.admit(message)
    rows = np.random.default_rng(0).normal(0, 3, (8, vocab_size)).astype(np.float32)
    here, all_threads = time.thread_time(), time.process_time()
    for place in range(tokens):
        if generation.sampler.choose(rows[place % len(rows)]).last:
            break
    here, all_threads = time.thread_time() - here, time.process_time() - all_threads
    core.admission.end(generation)
    return here / tokens * 1e6, (all_threads - here) / tokens * 1e6


async def stall(model: str) -> None:
    """Print the longest pause between texts of a stream, before a first grammar and from then on."""
    async with EngineClient(EngineConfig(model=model)) as engine:
        await engine.wait_ready()
        await asyncio.sleep(3)
        free = Generate(
            request_id="free",
            prompt="A long story: ",
            add_special_tokens=False,
            sampling=Sampling(temperature=0.7, seed=0),
            max_tokens=400,
            ignore_eos=True,
        )
        shaped = msgspec.structs.replace(free, request_id="shaped", max_tokens=20, grammar=CASES["schema"])
        times: list[float] = []
        began = math.inf
        async with await engine.generate(free) as stream:
            async for event in stream:
                times.append(time.perf_counter())
                if len(times) == 150:
                    began = times[-1]
                    other = asyncio.create_task(read(engine, shaped))
                if isinstance(event, Finished):
                    break
        await other
    pauses = list(itertools.pairwise(times))
    for when, chosen in (
        ("before", [b - a for a, b in pauses[5:] if b <= began]),
        ("after", [b - a for a, b in pauses if b > began]),
    ):
        print(f"{when:7s} longest {max(chosen) * 1000:7.1f} ms   median {statistics.median(chosen) * 1000:7.1f} ms")


async def read(engine: EngineClient, message: Generate) -> None:
    async with await engine.generate(message) as stream:
        async for _ in stream:
            pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--stall", action="store_true")
    arguments = parser.parse_args()
    model = arguments.model or str(ensure_demo(lambda *_: None))
    if arguments.stall:
        asyncio.run(stall(model))
        return
    built = build(EngineConfig(model=model), lambda *_: None)
    core = built.core
    for case in CASES:
        run(core, case, arguments.batch, 16)
    times: dict[str, list[float]] = {case: [] for case in CASES}
    for _ in range(arguments.rounds):
        for case in CASES:
            times[case].append(run(core, case, arguments.batch, arguments.tokens))
    for case, values in times.items():
        ratio = statistics.median(value / free for value, free in zip(values, times["free"], strict=True))
        here, others = processor_time(core, built.ready.vocab_size, case, 500)
        print(
            f"{case:10s} {statistics.median(values):8.3f} ms a step   x {ratio:.3f}   "
            f"choosing {here:5.0f} us here, {others:5.0f} us beside"
        )


if __name__ == "__main__":
    main()
