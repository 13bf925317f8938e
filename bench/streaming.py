"""A model larger than memory: Mixbit's streamed experts beside llama.cpp with mmap, on one shape and one machine.

    python -m bench.streaming --peer-python PYTHON --models DIR [--layers 48] [--limit 22GB] [--skew 70:20]

With --limit both sides run in a memory cgroup of that size (version 1, as root), their pages in the page cache
included, so that fewer layers stand for a machine that is as much too small for them. The sides take turns. What
the page cache holds of a model is dropped before it is started.

start: from the start of the process until the first tokens are out, loading included. decode: a pause (--settle), and
what loading left in the page cache is dropped; then as many tokens cold; then some that are not counted; then the
steady state. prefill: a prompt, after such a pause and drop.

A map is read ahead around each page that is not in memory, by as much as the disk is set to; while the peer runs, it is
set to --peer-read-ahead, the kernel's own default. More has it read much that it does not need.

Before and after each row, and every few tokens within decoded ones, the disk is measured by random reads of the
side's own files past the page cache: its rate wanders from second to second. The floor is what the misses of that
row, or the bytes that the peer had read, take at that rate; our cold tokens' second floor has to read the dense part
too. What was read ahead in vain is no part of our floor. A side's share of the disk is what it had read, over what
the disk would have given in that time.

Where the disk has no room for both sides' files, or a quiet time does not hold everything: --only and --work choose
what is measured in one call, --json gathers the calls, --delete ends a side's files with it, and with --reroute a
skewed model is made out of the even one, in place.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.machine import Disk, Memory, Peak, bytes_from_disk, forget, read_ahead
from bench.models import our_qwen3_next, their_qwen3_next
from bench.sides import Side, SideError
from mixbit.engine.loader import load
from mixbit.engine.synth import Skew
from mixbit.kernels.experts import expert_bytes, streamable
from mixbit.server.cli.memory import parse_size

CONTEXT = 4096
FIRST, BEFORE, STEADY, PROMPT = 24, 100, 24, 2048  # tokens
STRETCH = 6  # tokens between two measurements of the disk
_PATIENCE = 1800  # seconds for one command
WORKS = ("start", "decode", "prefill")
TITLES = {
    "start": f"start to token {FIRST}",
    "cold": f"tokens 1-{FIRST}, caches dropped",
    "steady": f"decode after {BEFORE}",
    "prefill": f"prefill {PROMPT}",
}
Row = dict[str, Any]
Rows = dict[str, list[Row]]


@dataclass(frozen=True)
class Contender:
    """One side. counts: whether it can tell what streaming has come to. Bytes: dense part, one expert; 0: unknown.

    read_ahead: kilobytes, see bench.machine.
    """

    start: Callable[[], Side]
    model: Path
    counts: bool
    read_ahead: int | None = None
    dense: int = 0
    expert: float = 0

    @property
    def files(self) -> list[Path]:
        """That weights are read from."""
        return sorted(self.model.glob("*.safetensors")) if self.model.is_dir() else [self.model]

    def delete(self) -> None:
        """Free the disk."""
        if self.model.is_dir():
            shutil.rmtree(self.model)
        else:
            self.model.unlink()


def measure(side: Contender, memory: Memory, work: str, settle: float) -> Rows:
    """Rows of one work, in a process of its own."""
    forget(side.files)
    memory.empty()
    with read_ahead(side.files[0], side.read_ahead):
        return _rows(side, memory, work, settle)


def _rows(side: Contender, memory: Memory, work: str, settle: float) -> Rows:
    disk, found = Disk(side.files), {}
    first, began = disk.rate(), time.perf_counter()
    with memory.inside():
        running = side.start()
    ready = time.perf_counter() - began
    peak = Peak(running.pid)
    peak.start()

    def row(name: str, count: int, stretches: int = 1, *, since_start: bool = False, **command: Any) -> None:
        """count: tokens, of all the stretches in which the command is given."""
        nonlocal first
        before = running.ask(do="experts") if side.counts else {}
        seconds, from_disk, rates = 0.0, 0, [first]
        for _ in range(stretches):
            read = 0 if since_start else bytes_from_disk(running.pid)
            start = began if since_start else time.perf_counter()
            running.ask(timeout=_PATIENCE, **command)
            seconds += time.perf_counter() - start
            from_disk += bytes_from_disk(running.pid) - read
            rates.append(first := disk.rate())
        found[name] = one = {
            "tokens": count,
            "seconds": seconds,
            "rate": count / seconds,
            "from disk": from_disk,
            "cached": memory.cached(),
            "disk": statistics.harmonic_mean(rates),
        }
        after = running.ask(do="experts") if side.counts else {}
        one |= {key: after[key] - (0 if since_start else before[key]) for key in after}
        needed = one["misses"] * side.expert if side.counts else one["from disk"]
        one["floor"] = count / (max(needed, 1) / one["disk"])
        if side.counts and name in ("start", "cold"):
            one["floor with dense"] = count / ((needed + side.dense) / one["disk"])

    try:
        # A context of one token is decoded before those that are asked for.
        if work != "start":
            time.sleep(settle)
            memory.empty()
            first = disk.rate()
        if work == "start":
            row("start", FIRST, since_start=True, do="decode", tokens=FIRST - 1, context=1, sequences=1)
        elif work == "decode":
            decode = {"do": "decode", "tokens": STRETCH - 1, "context": 1, "sequences": 1}
            row("cold", FIRST, FIRST // STRETCH, **decode)
            running.ask(timeout=_PATIENCE, do="decode", tokens=BEFORE - FIRST - 1, context=1, sequences=1)
            first = disk.rate()
            row("steady", STEADY, STEADY // STRETCH, **decode)
        else:
            row("prefill", PROMPT, do="prefill", tokens=PROMPT)
    finally:
        running.close()
        most = peak.stop()
    return {name: [{**one, "ready": ready, "peak": most}] for name, one in found.items()}


def ours(args: argparse.Namespace) -> Contender:
    """Mixbit, with the experts streamed."""
    model = our_qwen3_next(args.models, args.layers, args.skew, reroute=args.reroute)
    loaded = load(model)
    layers, experts = list(streamable(loaded.program)), expert_bytes(loaded.program)
    print(f"{loaded.weight_bytes / 1e9:.2f} GB, of them {experts / 1e9:.2f} GB of experts in {len(layers)} layers")
    return Contender(
        lambda: Side(
            sys.executable,
            "ours.py",
            model=str(model),
            threads=args.threads,
            context=CONTEXT,
            memory=args.memory,
            precision="fast",
            access="direct" if args.limit else None,  # what lies beside the limit is not seen by the plan
        ),
        model,
        counts=True,
        dense=loaded.weight_bytes - experts,
        expert=experts / sum(node.spec.router.out_dim for node in layers),
    )


def theirs(args: argparse.Namespace) -> Contender:
    """llama.cpp, with the weights where they are mapped."""
    model = their_qwen3_next(args.models, args.layers, args.skew, reroute=args.reroute)
    options = {"threads": args.threads, "context": CONTEXT, "repack": False}
    return Contender(
        lambda: Side(args.peer_python, "peer_llama_cpp.py", model=str(model), **options),
        model,
        counts=False,
        read_ahead=args.peer_read_ahead,
    )


def show(results: dict[str, Rows], budget: int | None) -> None:
    """Medians of both sides, and what they are of one another."""
    console, table = Console(width=150), Table("work", "side", "tok/s", "of the floor", "disk GB/s", "share of it")
    for column in ("MB from disk a token", "page cache GB", "in memory", "guessed", "ready s", "ratio"):
        table.add_column(column)
    for name, title in TITLES.items():
        for side in ("ours", "theirs"):
            if rows := results.get(side, {}).get(name):
                other = results.get("theirs", {}).get(name)
                ratio = f"{_middle(rows, 'rate') / _middle(other, 'rate'):.2f} x" if other and side == "ours" else ""
                table.add_row(title, f"{side}, {len(rows)}", *_cells(rows), ratio)
    console.print(table)
    if budget and (mine := results.get("ours")):
        peak = max(row["peak"] for rows in mine.values() for row in rows)
        console.print(f"ours: private and locked {peak / 1e9:.2f} GB, {peak / budget:.3f} of the budget")


def _middle(rows: Sequence[Row], key: str) -> float:
    return statistics.median(row[key] for row in rows)


def _cells(rows: Sequence[Row]) -> list[str]:
    derived = [
        {
            **row,
            "of": row["rate"] / row["floor"],
            "of dense": row["rate"] / row["floor with dense"] if "floor with dense" in row else 0,
            "share": row["from disk"] / row["seconds"] / row["disk"],
            "per token": row["from disk"] / row["tokens"],
            "hits": row["hits"] / (row["hits"] + row["misses"]) if "hits" in row else 0,
            "guessed": row["ahead"] / max(1, row["ahead"] + row["unused"]) if "hits" in row else 0,
        }
        for row in rows
    ]
    of, dense = _middle(derived, "of"), _middle(derived, "of dense")
    counted = "hits" in rows[0]
    return [
        f"{_middle(rows, 'rate'):.2f}",
        f"{of:.0%}" + (f", {dense:.0%}" if dense else "") if counted else "",
        f"{_middle(rows, 'disk') / 1e9:.2f}",
        f"{_middle(derived, 'share'):.0%}",
        f"{_middle(derived, 'per token') / 1e6:.0f}",
        f"{_middle(rows, 'cached') / 1e9:.2f}",
        f"{_middle(derived, 'hits'):.0%}" if counted else "",
        f"{_middle(derived, 'guessed'):.0%}" if counted else "",
        f"{_middle(rows, 'ready'):.1f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="directory for the models")
    parser.add_argument("--peer-python", help="python of the peer's environment (see `make bench`)")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--memory", type=parse_size, help="our --memory")
    parser.add_argument("--limit", type=parse_size, help="memory of either side, page cache included")
    parser.add_argument("--peer-read-ahead", type=int, default=128, help="KB")
    parser.add_argument("--skew", help="such as 70:20")
    parser.add_argument("--reroute", action="store_true", help="the skewed model takes the place of the even one")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--settle", type=float, default=0, help="seconds between ready and what follows, but for start")
    parser.add_argument("--only", choices=["ours", "theirs"])
    parser.add_argument("--work", nargs="*", default=WORKS, choices=WORKS, help="none: only make the files")
    parser.add_argument("--delete", action="store_true", help="each side's files once it is done")
    parser.add_argument("--json", type=Path, help="what was measured, added to what it holds")
    args = parser.parse_args()
    args.threads = args.threads or len(os.sched_getaffinity(0))
    args.skew = Skew(*(int(part) / 100 for part in args.skew.split(":"))) if args.skew else None
    args.models.mkdir(parents=True, exist_ok=True)
    results = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    sides = {name: side(args) for name, side in (("ours", ours), ("theirs", theirs)) if args.only in (None, name)}
    memory = Memory(args.limit)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # with sides closed, and the disk as it was
    try:
        for _ in range(args.rounds):
            for work in args.work:
                for name, side in sides.items():
                    for row, found in measure(side, memory, work, args.settle).items():
                        results.setdefault(name, {}).setdefault(row, []).extend(found)
    except SideError as error:
        sys.exit(str(error))
    finally:
        if args.json:
            args.json.write_text(json.dumps(results, indent=1))
        if args.delete:
            for side in sides.values():
                side.delete()
    show(results, args.memory)


if __name__ == "__main__":
    main()
