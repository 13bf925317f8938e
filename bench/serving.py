"""Our server beside others over HTTP, on the same weights, in one run.

    python bench/serving.py --model DIR --gguf FILE --llama-server PROGRAM --only replay rates

Repetitions alternate between the sides, and medians are compared. A peer whose option is missing is left out. With
--json FILE the figures of several runs are gathered in one file. See bench/LEDGER.md for figures.
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
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.engine_alone import STORY, step_cost, stream_seconds
from bench.streams import Streamed, StreamError, stream, whole
from mixbit.engine.build import build
from mixbit.engine.config import EngineConfig

HERE = Path(__file__).parent
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
TURNS, ANSWER, PAUSE = 10, 32, 0.3  # of an agent: its answers in tokens, the seconds that its tools take


@dataclass(frozen=True)
class Command:
    """How to start a side. model: what requests call it. disk: where it keeps prompts, if it does."""

    name: str
    model: str
    arguments: Sequence[str]
    disk: Path | None = None


@dataclass
class Side:
    """A server process."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    model: str

    def body(self, tokens: int, **fields: Any) -> dict[str, Any]:
        return {"model": self.model, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **fields}


@contextlib.contextmanager
def serving(command: Command) -> Iterator[Side]:
    """The side's process, from when it answers."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    filled = [part.format(port=port) for part in command.arguments]
    process = subprocess.Popen(filled, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ))
    try:
        deadline = time.monotonic() + 60
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command.name} did not start: {' '.join(filled)}")
            with contextlib.suppress(httpx.HTTPError):
                path = "/v1/models" if "python" in command.name or "mlx" in command.name else "/health"
                if httpx.get(f"http://127.0.0.1:{port}{path}").status_code == 200:
                    break
            time.sleep(0.1)
        yield Side(command.name, port, process, command.model)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:  # a peer in the middle of a long prompt
            process.kill()
            process.wait()


# --- what is measured ---


def system_prompt(words: int) -> str:
    """What an agent begins with: rules and, in the text, so that every side sees the same tokens, its tools."""
    tools = [
        {
            "name": name,
            "description": f"To {name.replace('_', ' ')} in the workspace. Call it once for each path.",
            "parameters": {"type": "object", "properties": {"path": {"type": "string"}, "text": {"type": "string"}}},
        }
        for name in ("read_file", "write_file", "list_files", "search_text", "run_command", "apply_patch")
    ]
    rules = "Think before you act, keep changes small, and test what you wrote. "
    text = f"You are a coding agent. Your tools:\n{json.dumps(tools, indent=1)}\n"
    return text + rules * max(0, (words - len(text.split())) // len(rules.split()))


@dataclass(frozen=True)
class Replay:
    """An agent's conversation, side requests left out. shares: of each warm prompt, from the cache."""

    cold: float
    warm: float  # median seconds to the first token of turns 2 ..
    prompt: int  # tokens of the first turn
    share: float  # of the warm prompts' tokens
    messages: list[dict[str, str]]


async def replay(side: Side, words: int) -> Replay:
    """Ten turns; after every third another request with another system prompt."""
    messages = [{"role": "system", "content": system_prompt(words)}]
    answers: list[Streamed] = []
    for turn in range(TURNS):
        messages.append({"role": "user", "content": f"Now look at file number {turn}, please."})
        answers.append(await whole(side.port, CHAT, side.body(ANSWER, messages=messages)))
        messages.append({"role": "assistant", "content": answers[-1].text})
        if turn % 3 == 2:
            title = [{"role": "system", "content": "Write a title of a few words for what follows. " * 20}]
            title.append({"role": "user", "content": f"We looked at {turn} files."})
            await whole(side.port, CHAT, side.body(8, messages=title))
        await asyncio.sleep(PAUSE)
    cold, *warm = answers
    share = sum(each.cached for each in warm) / sum(each.prompt for each in warm)
    return Replay(cold.first, statistics.median(each.first for each in warm), cold.prompt, share, messages)


async def replays(args: argparse.Namespace, commands: list[Command], report: Report) -> None:
    """The conversation on every side, from a cold start; then ours goes on after a restart."""
    found: dict[str, Replay] = {}
    for command in commands:
        with serving(command) as side, contextlib.suppress(StreamError):
            await whole(side.port, TEXT, side.body(8, prompt=STORY))
            found[side.name] = await replay(side, args.words)
            each = found[side.name]
            print(f"{side.name}: {each.prompt} tokens, {each.cold:.3f} s, warm {each.warm:.3f} s", file=sys.stderr)
            if command.disk is not None:
                await _written(command.disk)

    def row(name: str, target: str, form: str, value: Callable[[Replay], float]) -> None:
        report.row(f"replay: {name}", target, {side: value(each) for side, each in found.items()}, form)

    row("prompt, tokens", "6,000", "d", lambda each: each.prompt)
    row("share from the cache", "0.99", ".4f", lambda each: each.share)
    row("first turn, s", "", ".3f", lambda each: each.cold)
    row("first token of turns 2-10, s", "0.6 x", ".3f", lambda each: each.warm)
    ours = found["ours"]
    assert commands[0].disk is not None
    for file in commands[0].disk.rglob("*"):  # what a restart of the machine would leave in memory: nothing
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with serving(commands[0]) as side:
        await whole(side.port, TEXT, side.body(8, prompt=STORY))
        messages = [*ours.messages, {"role": "user", "content": "And now?"}]
        again = await whole(side.port, CHAT, side.body(ANSWER, messages=messages))
    report.row("replay: first token after a restart, s", "", {"ours": again.first}, ".3f")
    report.row("replay: restart / cold", "0.15", {"ours": again.first / ours.cold}, ".3f")


async def _written(directory: Path) -> None:
    """Wait until no more is written there."""
    size = -1
    while size != (size := sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())):
        await asyncio.sleep(1)


async def rate(side: Side, clients: int, tokens: int, salt: int) -> float:
    """Tokens per second of some streams together, from the last first piece to the first last one."""

    async def one(number: int) -> list[float]:
        body = side.body(tokens, prompt=f"({salt}.{number}) {STORY}")
        return (await whole(side.port, TEXT, body)).times

    times = await asyncio.gather(*(one(number) for number in range(clients)))
    start, end = max(each[0] for each in times), min(each[-1] for each in times)
    if end <= start:  # one after another
        start, end = min(each[0] for each in times), max(each[-1] for each in times)
    return sum(start < at <= end for each in times for at in each) / (end - start)


async def disturbance(side: Side, words: int, salt: int) -> tuple[float, float]:
    """Median seconds between pieces of a stream, and the 99th percentile while a long prompt is computed."""
    times: list[float] = []
    enough, over = asyncio.Event(), asyncio.Event()

    async def watch() -> None:
        async for answer in stream(side.port, TEXT, side.body(4000, prompt=f"({salt}) {STORY}")):
            times.append(answer.times[-1])
            if len(times) == 100:
                enough.set()
            if over.is_set():
                return

    watcher = asyncio.create_task(watch())
    await enough.wait()
    long = f"({salt}) " + " ".join(f"word{number % 10}" for number in range(words * 5 // 8))
    start = time.perf_counter()
    answer = await whole(side.port, TEXT, side.body(1, prompt=long))
    end = time.perf_counter()
    over.set()
    await watcher
    gaps = [(after, after - before) for before, after in itertools.pairwise(times)]
    quiet = [gap for at, gap in gaps if at < start]
    loud = sorted(gap for at, gap in gaps if at >= start and at - gap <= end)
    print(f"{side.name}: {answer.prompt} tokens in {end - start:.2f} s", file=sys.stderr)
    return statistics.median(quiet), loud[math.ceil(0.99 * len(loud)) - 1]


async def churn(side: Side, requests: int) -> float:
    """Memory of the processes after all requests, over that after the first tenth."""
    processes = [psutil.Process(side.process.pid), *psutil.Process(side.process.pid).children(recursive=True)]
    sizes: list[int] = []
    waiting = asyncio.Semaphore(8)

    async def one(number: int) -> None:
        async with waiting:
            prompt = f"{number * 7919 % 1009} {STORY} " * (1 + number % 4)
            await whole(side.port, TEXT, side.body(1 + number % 8, prompt=prompt))

    done = 0
    for share in (requests // 10, requests - requests // 10):
        await asyncio.gather(*(one(done + number) for number in range(share)))
        done += share
        sizes.append(sum(process.memory_full_info().uss for process in processes))
    print(f"{side.name}: {[f'{size / 1e6:.1f} MB' for size in sizes]}", file=sys.stderr)
    return sizes[1] / sizes[0]


# --- the run ---


class Report:
    """Figures by row and side, kept in a file between runs if one is given."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._rows: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file and file.exists() else {}

    def row(self, name: str, target: str, values: dict[str, float], form: str) -> None:
        """Add or replace a row; ours first."""
        self._rows[name] = {"target": target, "values": values, "form": form}
        if self._file is not None:
            self._file.write_text(json.dumps(self._rows, indent=1))

    def print(self) -> None:
        """As a table, with our value over each other."""
        sides = list(dict.fromkeys(side for row in self._rows.values() for side in row["values"]))
        table = Table("work", *sides, "at least")
        for name, row in self._rows.items():
            values, cells = row["values"], []
            for side in sides:
                value = values.get(side)
                ratio = f" ({values['ours'] / value:.2f} x)" if value and side != "ours" else ""
                cells.append("-" if value is None else f"{value:{row['form']}}{ratio}")
            table.add_row(name, *cells, row["target"])
        Console(width=150).print(table)


def commands(args: argparse.Namespace, disk: Path) -> Iterator[Command]:
    """Each side that can run."""
    threads = str(args.threads)
    ours = [sys.executable, "-m", "mixbit.server.cli.main", "serve", "--model", args.model, "--threads", threads]
    ours += ["--port", "{port}", "--disk-cache", str(disk), *args.ours]
    yield Command("ours", Path(args.model).resolve().name, ours, disk)
    if args.gguf and args.llama_server:
        peer = [args.llama_server, "-m", args.gguf, "--port", "{port}", "-t", threads, "-tb", threads]
        yield Command("llama-server", "any", [*peer, "-np", "8", "-c", "65536", "--no-webui"])
    if args.gguf and args.peer_python:
        peer = [args.peer_python, "-m", "llama_cpp.server", "--model", args.gguf, "--port", "{port}"]
        options = {"n_ctx": 8192, "n_threads": threads, "n_threads_batch": threads, "flash_attn": True, "cache": True}
        options["interrupt_requests"] = False  # else a second request ends the first
        filled = [str(part) for key in options for part in (f"--{key}", options[key])]
        yield Command("llama-cpp-python", "any", [*peer, *filled])
    if args.mlx:
        script = str(HERE / "peer_mlx_server.py")
        yield Command("mlx-lm", args.model, [sys.executable, script, "--model", args.model, "--port", "{port}"])


async def compare(
    sides: list[Side], args: argparse.Namespace, measure: Callable[[Side, int], Awaitable[Any]]
) -> dict[str, list[Any]]:
    """Results of each side, taken in turns; a side that fails or takes too long has none."""
    found: dict[str, list[Any]] = {side.name: [] for side in sides}
    for turn in range(args.repeat):
        for side in sides:
            try:
                found[side.name].append(await asyncio.wait_for(measure(side, turn), args.limit))
                print(f"{side.name}: {found[side.name][-1]}", file=sys.stderr, flush=True)
            except (StreamError, OSError, ValueError, IndexError, TimeoutError) as error:
                print(f"{side.name}: {type(error).__name__}: {error}", file=sys.stderr)
    return {name: values for name, values in found.items() if values}


async def rates(args: argparse.Namespace, sides: list[Side], report: Report) -> None:
    """Streams alone and together."""
    for clients in (1, 8):

        async def together(side: Side, turn: int, clients: int = clients) -> float:
            return await rate(side, clients, args.tokens, 10 * turn + clients)

        found = await compare(sides, args, together)
        medians = {name: statistics.median(values) for name, values in found.items()}
        report.row(f"{clients} clients together, tok/s", "2 x" if clients == 8 else "", medians, ".1f")


async def gaps(args: argparse.Namespace, sides: list[Side], report: Report) -> None:
    """A stream beside a long prompt."""
    found = await compare(sides, args, lambda side, turn: disturbance(side, args.words, turn))
    quiet = {name: statistics.median(quiet for quiet, _ in values) * 1e3 for name, values in found.items()}
    loud = {name: statistics.median(loud for _, loud in values) * 1e3 for name, values in found.items()}
    ratios = {name: statistics.median(loud / quiet for quiet, loud in values) for name, values in found.items()}
    report.row("gap in a stream, median, ms", "", quiet, ".2f")
    report.row("its 99th percentile beside a long prompt, ms", "", loud, ".1f")
    report.row("the latter over the former", "6", ratios, ".1f")


async def run(args: argparse.Namespace, report: Report) -> None:
    """The parts that were asked for."""
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        found = list(commands(args, Path(directory)))
        if "replay" in args.only:
            await replays(args, found, report)
        if {"rates", "gaps"} & set(args.only):
            sides = [stack.enter_context(serving(command)) for command in found]
            if "rates" in args.only:
                await rates(args, sides, report)
            if "gaps" in args.only:
                await gaps(args, sides, report)
        if "churn" in args.only:
            # Caches that are full before the first tenth ends: what grows after that is a leak.
            full = replace(found[0], arguments=(*found[0].arguments, "--cache-memory", "400MB"))
            with serving(full) as side:
                growth = await churn(side, args.churn)
            report.row(f"memory after {args.churn:,} requests / a tenth", "1.1", {"ours": growth}, ".3f")
        if "engine" in args.only:
            with serving(found[0]) as side:
                http = statistics.median([await rate(side, 1, args.tokens, turn) for turn in range(args.repeat)])
            core = build(EngineConfig(model=args.model, threads=args.threads), lambda stage, done, total: None).core
            engine = (args.tokens - 1) / stream_seconds(core, args.tokens - 1)
            report.row("streaming over HTTP / the engine alone", "", {"ours": http / engine}, ".2f")
        if "cost" in args.only:
            cost, sampling = step_cost(args.model, 8, 500)
            report.row("step of 8 without model and sampling, ms", "0.5", {"ours": cost * 1e3}, ".3f")
            report.row("its greedy sampling, ms", "", {"ours": sampling * 1e3}, ".3f")


def main() -> None:
    parts = ("replay", "rates", "gaps", "churn", "engine", "cost")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint directory in MLX format")
    parser.add_argument("--gguf", help="the same weights for llama.cpp")
    parser.add_argument("--llama-server", help="llama.cpp's server")
    parser.add_argument("--peer-python", help="Python that has llama-cpp-python with its server")
    parser.add_argument("--mlx", action="store_true", help="beside mlx_lm.server, in float32")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="parts of the run")
    parser.add_argument(
        "--ours", nargs="*", default=[], help="further arguments of our server, such as =--precision=int8"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--limit", type=float, default=600, help="seconds for one measurement of one side")
    parser.add_argument("--tokens", type=int, default=128, help="of a stream")
    parser.add_argument("--words", type=int, default=4800, help="of the long prompts: about 6,000 tokens")
    parser.add_argument("--churn", type=int, default=5000, help="short requests")
    parser.add_argument("--json", type=Path, help="gather the figures here")
    args = parser.parse_args()
    args.ours = [each.removeprefix("=") for each in args.ours]
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # the servers end with us
    report = Report(args.json)
    try:
        asyncio.run(run(args, report))
    finally:
        report.print()


if __name__ == "__main__":
    main()
