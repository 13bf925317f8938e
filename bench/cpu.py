"""Mixbit on the CPU beside llama.cpp, with the same weights and threads, in one run: `make bench`.

    python -m bench.cpu --peer-python PYTHON --rates build/bench/rates [--rows 'smollm2-*'] [--json FILE]

Each side is a child process. Repetitions alternate between the sides and medians are compared, so that a machine
whose speed drifts drifts for all; a repetition waits a while for other processes to be done. A floor is what the
bytes that a step must move take at the bandwidth measured in the run, or its operations at the measured rates,
whichever takes longer (bench/floors.py).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from bench.floors import measure
from bench.models import Pair, qwen3_next, smollm2, warm
from bench.sides import Asked, Side, SideError, served
from mixbit.engine.demo import cache_directory
from mixbit.engine.loader import load
from mixbit.engine.step_cost import step_cost

MODES = ("fast", "exact")


@dataclass(frozen=True)
class Work:
    """A command to a side. Of `tokens` steps of `sequences` each; prefill: of one step of `tokens`."""

    do: str
    tokens: int
    context: int = 0
    sequences: int = 1

    @property
    def command(self) -> dict[str, Any]:
        """As sides read it."""
        places = {"context": self.context, "sequences": self.sequences} if self.do == "decode" else {}
        return {"do": self.do, "tokens": self.tokens, **places}

    def rate(self, seconds: float) -> float:
        """Tokens per second, of all sequences together."""
        return self.tokens * self.sequences / seconds


@dataclass(frozen=True)
class Row:
    """ours on `side` ("engine" or "http"), over `base` on `against` ("peer", "engine" or "core").

    least, aim: of the ratio of the rates.
    """

    name: str
    title: str
    model: str
    work: Work
    least: float
    aim: float
    side: str = "engine"
    against: str = "peer"
    base: Work | None = None


SMOLLM2, QWEN3 = "SmolLM2-135M", "Qwen3-Next sizes"
SHORT, LONG = Work("decode", 64, 128), Work("decode", 32, 4096)
ROWS = (
    Row("smollm2-decode", f"{SMOLLM2}, decode at 128", "smollm2", SHORT, 1.8, 2.2),
    Row("smollm2-prefill", f"{SMOLLM2}, prefill 512", "smollm2", Work("prefill", 512), 6.5, 9),
    Row("smollm2-decode-4096", f"{SMOLLM2}, decode at 4096", "smollm2", LONG, 1.5, 2),
    Row(
        "smollm2-batch",
        f"{SMOLLM2}, 8 requests decoding / 1",
        "smollm2",
        Work("decode", 32, 128, 8),
        3,
        6,
        against="engine",
        base=SHORT,
    ),
    Row(
        "smollm2-http",
        f"{SMOLLM2}, HTTP stream / engine alone",
        "smollm2",
        Work("stream", 192),
        0.9,
        0.97,
        side="http",
        against="core",
    ),
    Row("qwen3-decode", f"{QWEN3}, decode at 128", "qwen3-next", SHORT, 1.3, 1.45),
    Row("qwen3-prefill", f"{QWEN3}, prefill 512", "qwen3-next", Work("prefill", 512), 3.6, 6),
    Row(
        "qwen3-decode-4096",
        f"{QWEN3}, decode at 4096 / at 128",
        "qwen3-next",
        Work("decode", 32, 4096),
        0.9,
        0.95,
        against="engine",
        base=Work("decode", 32, 128),
    ),
)


@dataclass
class Result:
    """rates: tokens per second of each repetition, by column ("fast", "exact", "base"). floor: of the fast mode;
    0 where there is none. problems: why a column is empty."""

    row: Row
    rates: dict[str, list[float]] = field(default_factory=dict)
    busy: list[float] = field(default_factory=list)  # share of the processors that others used, before each repetition
    floor: float = 0
    problems: list[str] = field(default_factory=list)

    def median(self, column: str) -> float | None:
        """Of a column's repetitions."""
        found = self.rates.get(column)
        return statistics.median(found) if found else None

    @property
    def ratio(self) -> float | None:
        """Of ours, in the first mode, over the base: the median over repetitions, each with its neighbour."""
        ours, base = self.rates.get(MODES[0]), self.rates.get("base")
        return statistics.median(a / b for a, b in zip(ours, base, strict=True)) if ours and base else None


class Bench:
    """One model's rows."""

    def __init__(self, args: argparse.Namespace, model: str, rows: Sequence[Row]) -> None:
        self.args, self.model, self.rows = args, model, rows
        self.facts: dict[str, Any] = {}
        self.machine = measure(args.rates, args.threads)
        self.sides: dict[str, Asked] = {}

    def run(self, pair: Pair, stack: contextlib.ExitStack) -> Iterator[Result]:
        """Start the sides, measure row after row."""
        longest = max((work.context for row in self.rows for work in (row.work, row.base or row.work)), default=0)
        context = max(longest, 512) + 512  # decoding goes on from there
        sequences = max(row.work.sequences for row in self.rows)
        options = {"threads": self.args.threads, "context": context}
        if any(row.against == "peer" for row in self.rows) and self.args.peer_python:
            self._start_peer(stack, model=str(pair.gguf), **options)
        warm(pair.ours)  # after the peer, which copies its weights into another order and may push ours out
        ours = {"model": str(pair.ours), "sequences": sequences, **options}
        for mode in MODES:
            self._start(stack, mode, sys.executable, "ours.py", precision=mode, **ours)
        if any(row.side == "http" for row in self.rows):
            self.sides["http"] = stack.enter_context(served(pair.ours, self.args.threads))
        program = load(pair.ours).program
        facts = self._ask(MODES[0], do="facts")
        self.facts |= facts
        for row in self.rows:
            result = self._measure(row)
            self.machine = self.machine.best(measure(self.args.rates, self.args.threads))
            work = row.work
            tokens, steps = (work.tokens, 1) if work.do == "prefill" else (1, work.tokens)
            cost = step_cost(program, work.sequences, tokens, work.context + steps // 2, facts["kv_token_bytes"])
            result.floor = work.sequences * tokens / self.machine.floor(cost, exact=False)
            yield result

    def _start_peer(self, stack: contextlib.ExitStack, **options: Any) -> None:
        """llama.cpp as it is; if that ends (with AMX: by an illegal instruction), without repacked weights."""
        for repack in (True, False):
            self._start(stack, "peer", self.args.peer_python, "peer_llama_cpp.py", repack=repack, **options)
            try:
                self._ask("peer", do="prefill", tokens=64)
            except SideError as error:
                print(f"peer: {error}{'; once more, without repacked weights' if repack else ''}", file=sys.stderr)
                continue
            self.facts["peer"]["repacked"] = repack
            return

    def _start(self, stack: contextlib.ExitStack, name: str, python: str, script: str, **options: Any) -> None:
        try:
            side = Side(python, script, **options)
        except SideError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return
        stack.callback(side.close)
        self.sides[name] = side
        self.facts[name] = side.loaded

    def _ask(self, side: str, **command: Any) -> dict[str, Any]:
        if side not in self.sides:
            raise SideError(f"{side} has not started")
        return self.sides[side].ask(**command)

    def _measure(self, row: Row) -> Result:
        """Alternate between the columns; the first time round warms up."""
        result = Result(row)
        columns = {mode: (mode, row.work) for mode in MODES}
        if row.side == "http":
            columns = {MODES[0]: ("http", row.work)}
        base = {"peer": "peer", "engine": MODES[0], "core": MODES[0]}[row.against]
        columns["base"] = (base, row.base or row.work)
        for turn in range(self.args.repeat + 1):
            result.busy.append(wait_until_quiet(self.args.patience))
            for column, (side, work) in list(columns.items()):
                try:
                    rate = work.rate(self._ask(side, **work.command)["seconds"])
                except (SideError, ValueError, OSError) as error:
                    result.problems.append(f"{row.name}, {column}: {error}")
                    del columns[column]
                    continue
                if turn:
                    result.rates.setdefault(column, []).append(rate)
            print(f"{row.name} {turn}/{self.args.repeat}", file=sys.stderr, flush=True)
        return result


def wait_until_quiet(patience: float, enough: float = 0.1) -> float:
    """Wait until other processes use less than `enough` of the processors, `patience` seconds at most; their share."""
    deadline = time.monotonic() + patience
    while True:
        busy = float(psutil.cpu_percent(0.2)) / 100
        if busy < enough or time.monotonic() > deadline:
            return busy


# --- output ---


def show(results: Sequence[Result], benches: Sequence[Bench], console: Console) -> None:
    """The table, then load time and memory."""
    table = Table("work", *(f"ours {mode}" for mode in MODES), "beside", "ratio", "at least", "aim", "floor", "of it")
    for name in table.columns[1:]:
        name.justify = "right"
    for result in results:
        row, ratio, ours = result.row, result.ratio, result.median(MODES[0])
        colour = "red" if ratio is None or ratio < row.least else "green" if ratio >= row.aim else "yellow"
        table.add_row(
            row.title,
            *(_number(result.median(mode)) for mode in MODES),
            _number(result.median("base")),
            "-" if ratio is None else f"[{colour}]{ratio:.2f} x[/]",
            f"{row.least} x",
            f"{row.aim} x",
            _number(result.floor or None),
            f"{ours / result.floor:.0%}" if ours and result.floor else "-",
        )
    console.print(table)
    console.print("tokens per second, medians; beside: llama.cpp, or what the row says")
    for bench in benches:
        rates, facts = bench.machine, bench.facts
        console.print(
            f"{bench.model}: read {rates.read / 1e9:.1f} GB/s, int8 {rates.int8 / 1e12:.2f} TOP/s, "
            f"float32 {rates.float32 / 1e12:.3f} TFLOP/s, {bench.args.threads} threads"
        )
        for mode in (*MODES, "peer"):
            loaded = facts.get(mode)
            if loaded:
                memory = ""
                if "private" in loaded and "weights" in facts:
                    share = loaded["private"] / facts["weights"]
                    memory = f", {loaded['private'] / 2**20:.0f} MiB private ({share:.1%} of the weights)"
                plain = "" if loaded.get("repacked", True) else "; without repacked weights, with which it ended"
                console.print(f"  {mode}: first token {loaded['seconds']:.2f} s after start of loading{memory}{plain}")
    for result in results:
        if result.busy and statistics.median(result.busy) > 0.2:
            share = f"others used {statistics.median(result.busy):.0%} of the processors"
            console.print(f"{result.row.name}: {share}; measure it again", style="red")
    for problem in (problem for result in results for problem in result.problems):
        console.print(f"problem: {problem}", style="red", markup=False)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def document(results: Sequence[Result], benches: Sequence[Bench]) -> dict[str, Any]:
    """Everything measured."""
    rows = [
        {
            "name": result.row.name,
            "work": result.row.title,
            "tokens_per_second": result.rates,
            "medians": {column: result.median(column) for column in result.rates},
            "busy": result.busy,
            "ratio": result.ratio,
            "at_least": result.row.least,
            "aim": result.row.aim,
            "floor": result.floor,
            "problems": result.problems,
        }
        for result in results
    ]
    models = {bench.model: {"machine": asdict(bench.machine), **bench.facts} for bench in benches}
    return {"time": time.strftime("%Y-%m-%dT%H:%M:%S"), "rows": rows, "models": models}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peer-python", help="Python that has llama-cpp-python; without it, rows beside it have no ratio"
    )
    parser.add_argument("--rates", type=Path, required=True, help="bench/rates.cpp, compiled")
    parser.add_argument("--rows", action="append", metavar="GLOB", help="rows by name; repeatable (default: all)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument(
        "--patience", type=float, default=10, metavar="SECONDS", help="to wait for other processes, each repetition"
    )
    parser.add_argument("--layers", type=int, default=8, help="of the Qwen3-Next sizes; 8 take 8 GB twice")
    parser.add_argument("--cache", type=Path, default=cache_directory() / "bench", help="folder for the models")
    parser.add_argument("--keep", action="store_true", help="keep the large models there for the next run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to FILE")
    args = parser.parse_args()
    names = args.rows or ["*"]
    rows = [row for row in ROWS if any(fnmatchcase(row.name, glob) for glob in names)]
    if not rows:
        parser.error(f"no row is called {', '.join(names)}; there are: {', '.join(row.name for row in ROWS)}")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # the sides end with us
    args.cache.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    benches: list[Bench] = []
    try:
        for model in dict.fromkeys(row.model for row in rows):
            pair = smollm2(args.cache) if model == "smollm2" else qwen3_next(args.cache, args.layers)
            bench = Bench(args, model, [row for row in rows if row.model == model])
            benches.append(bench)
            with contextlib.ExitStack() as stack:
                if pair.temporary and not args.keep:
                    stack.callback(pair.delete)
                results.extend(bench.run(pair, stack))
    finally:  # also after Ctrl-C: what there is
        show(results, benches, Console(width=140))
        if args.json:
            args.json.write_text(json.dumps(document(results, benches), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
