"""Our server beside others over HTTP, on the same weights, in one run.

    python bench/serving.py --model DIR --gguf FILE --peer-python PYTHON

Repetitions alternate between the sides, and medians are compared. A peer whose option is missing is left out.
Rows of the worker alone have no peer. See bench/LEDGER.md for figures.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from mixbit.engine.admission import Admission, Limits
from mixbit.engine.build import build
from mixbit.engine.config import EngineConfig
from mixbit.engine.core import EngineCore
from mixbit.engine.protocol import Generate, Sampling
from mixbit.engine.scheduler import Scheduler
from mixbit.engine.tokenizer import load_tokenizer
from mixbit.engine.transport import encode

HERE = Path(__file__).parent
STORY = "Once upon a time, in a land far away, there lived an old king who"


@dataclass
class Side:
    """A server process. model: what requests call it."""

    name: str
    url: str
    process: subprocess.Popen[bytes]
    model: str

    async def stream(self, client: httpx.AsyncClient, prompt: str, tokens: int) -> AsyncIterator[float]:
        """Times at which pieces of text arrive."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": tokens, "stream": True, "temperature": 0}
        if self.name == "ours":
            body["ignore_eos"] = True
        async with client.stream("POST", f"{self.url}/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: {") and any(each.get("text") for each in json.loads(line[6:])["choices"]):
                    yield time.perf_counter()


@contextlib.contextmanager
def serving(name: str, model: str, command: Sequence[str]) -> Iterator[Side]:
    """`command` with {port} filled in, until it answers."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    filled = [part.format(port=port) for part in command]
    process = subprocess.Popen(filled, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ))
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{name} did not start: {' '.join(filled)}")
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health" if name == "ours" else f"{url}/v1/models").status_code == 200:
                    break
            time.sleep(0.2)
        yield Side(name, url, process, model)
    finally:
        process.terminate()
        process.wait(20)


# --- what is measured ---


async def rate(side: Side, clients: int, tokens: int, salt: int) -> float:
    """Tokens per second of some streams together, from the last first piece to the first last one."""
    async with httpx.AsyncClient(timeout=600) as client:

        async def one(number: int) -> list[float]:
            return [at async for at in side.stream(client, f"({salt}.{number}) {STORY}", tokens)]

        times = await asyncio.gather(*(one(number) for number in range(clients)))
    start, end = max(each[0] for each in times), min(each[-1] for each in times)
    if end <= start:  # one after another
        start, end = min(each[0] for each in times), max(each[-1] for each in times)
    return sum(start < at <= end for each in times for at in each) / (end - start)


async def disturbance(side: Side, words: int, salt: int) -> tuple[float, float]:
    """Median seconds between pieces of a stream, and the 99th percentile while a long prompt is computed."""
    async with httpx.AsyncClient(timeout=600) as client:
        times: list[float] = []
        enough, over = asyncio.Event(), asyncio.Event()

        async def watch() -> None:
            async for at in side.stream(client, f"({salt}) {STORY}", 4000):
                times.append(at)
                if len(times) == 50:
                    enough.set()
                if over.is_set():
                    return

        watcher = asyncio.create_task(watch())
        await enough.wait()
        long = f"({salt}) " + " ".join(f"word{number % 10}" for number in range(words))
        start = time.perf_counter()
        async for _ in side.stream(client, long, 1):
            pass
        end = time.perf_counter()
        over.set()
        await watcher
    gaps = [(after, after - before) for before, after in itertools.pairwise(times)]
    quiet = [gap for at, gap in gaps if at < start]
    loud = sorted(gap for at, gap in gaps if at >= start and at - gap <= end)
    return statistics.median(quiet), loud[math.ceil(0.99 * len(loud)) - 1]


async def churn(side: Side, requests: int) -> float:
    """Memory of the processes after all requests, over that after the first tenth."""
    processes = [psutil.Process(side.process.pid), *psutil.Process(side.process.pid).children(recursive=True)]
    sizes: list[int] = []
    async with httpx.AsyncClient(timeout=600) as client:
        waiting = asyncio.Semaphore(8)

        async def one(number: int) -> None:
            async with waiting:
                prompt = f"{number * 7919 % 1009} {STORY} " * (1 + number % 4)
                async for _ in side.stream(client, prompt, 1 + number % 8):
                    pass

        for share in (requests // 10, requests - requests // 10):
            await asyncio.gather(*(one(share + number) for number in range(share)))
            sizes.append(sum(process.memory_full_info().uss for process in processes))
    return sizes[1] / sizes[0]


def alone(model: str, tokens: int, threads: int) -> float:
    """Tokens per second of the engine in this process, without sockets or HTTP."""
    core = build(EngineConfig(model=model, threads=threads), lambda stage, done, total: None).core
    core.add(core.admission.admit(_generate("alone", STORY, tokens)))
    core.step()
    start = time.perf_counter()
    while not core.idle:
        core.step()
    return (tokens - 1) / (time.perf_counter() - start)


def step_cost(model: str, requests: int, steps: int) -> tuple[float, float]:
    """Seconds of a step that computes nothing: scheduling, detokenizing and framing; and sampling."""
    tokenizer = load_tokenizer(Path(model))
    logits = np.random.default_rng(0).standard_normal((requests, tokenizer.vocab_size)).astype(np.float32)
    scheduler = Scheduler(blocks=4096, block_size=32, max_running=16, step_tokens=512)
    limits = Limits(8192, scheduler.capacity, tokenizer.vocab_size, 64)
    core = EngineCore(lambda chunks, moves: logits, scheduler, Admission(tokenizer, limits))
    generations = [core.admission.admit(_generate(str(number), STORY, 8000)) for number in range(requests)]
    for generation in generations:
        core.add(generation)
    core.step()
    whole, sampling = [], []
    for _ in range(steps):
        start = time.perf_counter()
        for message in core.step():
            encode(message)
        whole.append(time.perf_counter() - start)
        start = time.perf_counter()
        for generation, row in zip(generations, logits, strict=True):
            generation.sampler.choose(row)
        sampling.append(time.perf_counter() - start)
    return statistics.median(whole) - statistics.median(sampling), statistics.median(sampling)


def _generate(request_id: str, prompt: str, tokens: int) -> Generate:
    return Generate(
        request_id=request_id,
        prompt=prompt,
        add_special_tokens=False,
        sampling=Sampling(temperature=0),
        max_tokens=tokens,
        ignore_eos=True,
    )


# --- the run ---


def commands(args: argparse.Namespace) -> Iterator[tuple[str, str, list[str]]]:
    """(name, model, command) of each side that can run."""
    threads = str(args.threads)
    ours = [sys.executable, "-m", "mixbit.server.cli.main", "serve", "--model", args.model, "--threads", threads]
    yield "ours", Path(args.model).resolve().name, [*ours, "--port", "{port}"]
    if args.gguf and args.peer_python:
        peer = [args.peer_python, "-m", "llama_cpp.server", "--model", args.gguf, "--port", "{port}"]
        options = {"n_ctx": 8192, "n_threads": threads, "n_threads_batch": threads, "flash_attn": True}
        options["interrupt_requests"] = False  # else a second request ends the first
        yield "llama-cpp-python", "any", [*peer, *(str(part) for key in options for part in (f"--{key}", options[key]))]
    if args.mlx:
        script = str(HERE / "peer_mlx_server.py")
        yield "mlx-lm", args.model, [sys.executable, script, "--model", args.model, "--port", "{port}"]


async def compare(sides: list[Side], repeat: int, measure: Callable[[Side, int], Awaitable[Any]]) -> dict[str, Any]:
    """Results of each side, taken in turns; a side that fails has none."""
    found: dict[str, Any] = {side.name: [] for side in sides}
    for turn in range(repeat):
        for side in sides:
            try:
                result = await measure(side, turn)
                found[side.name].append(result)
                print(f"{side.name}: {result}", file=sys.stderr, flush=True)
            except (httpx.HTTPError, ValueError, IndexError) as error:
                print(f"{side.name}: {type(error).__name__}: {error}", file=sys.stderr)
    return found


async def run(args: argparse.Namespace, sides: list[Side], table: Table) -> None:
    """All rows."""

    def row(name: str, target: str, ours: list[float], others: dict[str, list[float]], form: str) -> None:
        mine = statistics.median(ours)
        cells = [name, format(mine, form)]
        for side in sides[1:]:
            peer = statistics.median(others[side.name]) if others[side.name] else None
            cells.append("-" if peer is None else f"{peer:{form}} ({mine / peer:.2f} x)")
        table.add_row(*cells, target)

    rates: dict[int, dict[str, list[float]]] = {}
    for clients in (1, 8):

        async def together(side: Side, turn: int, clients: int = clients) -> float:
            return await rate(side, clients, args.tokens, turn)

        rates[clients] = await compare(sides, args.repeat, together)
        target = "" if clients == 1 else "2 x"
        row(f"{clients} clients, tok/s", target, rates[clients]["ours"], rates[clients], ".1f")
    found = await compare(sides, args.repeat, lambda side, turn: disturbance(side, args.words, turn))
    ratios = {name: [loud / quiet for quiet, loud in values] for name, values in found.items()}
    row("gap p99 beside a long prefill / quiet median", "6", ratios["ours"], ratios, ".1f")
    engine = alone(args.model, args.tokens, args.threads)
    http = statistics.median(rates[1]["ours"])
    table.add_row("HTTP streaming over the engine alone", f"{http / engine:.2f}", *["-"] * (len(sides) - 1), "")
    cost, sampling = step_cost(args.model, 8, 300)
    text = f"{cost * 1e3:.2f} ms (sampling {sampling * 1e3:.2f} ms)"
    table.add_row("step of 8 without the model", text, *["-"] * (len(sides) - 1), "0.5 ms")
    growth = await churn(sides[0], args.churn)
    table.add_row(f"memory after {args.churn:,} requests / a tenth", f"{growth:.3f}", *["-"] * (len(sides) - 1), "1.1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint directory in MLX format")
    parser.add_argument("--gguf", help="the same weights for llama.cpp")
    parser.add_argument("--peer-python", help="Python that has llama-cpp-python with its server")
    parser.add_argument("--mlx", action="store_true", help="beside mlx_lm.server, in float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128, help="of a stream")
    parser.add_argument("--words", type=int, default=3000, help="of the long prompt, about two tokens each")
    parser.add_argument("--churn", type=int, default=5000, help="short requests")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # the servers end with us
    with contextlib.ExitStack() as stack:
        sides = [stack.enter_context(serving(*side)) for side in commands(args)]
        table = Table("work", *(side.name for side in sides), "at least")
        try:
            asyncio.run(run(args, sides, table))
        finally:
            Console(width=140).print(table)


if __name__ == "__main__":
    main()
