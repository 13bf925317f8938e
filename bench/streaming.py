"""A model larger than memory: Mixbit's streamed experts beside llama.cpp with mmap, on one shape and one machine.

    python -m bench.streaming --peer-python PYTHON --models DIR [--layers 48] [--limit 22GB] [--skew 70:20]

With --limit both sides run in a memory cgroup of that size (version 1, as root), their pages in the page cache
included, so that fewer layers stand for a machine that is as much too small for them. The pages of the model's files
are dropped before it is started. Beside each row the disk is measured by reading random experts past the page cache:
the floor is what the misses of that row take at that rate; the cold tokens' second floor has to read the dense part
too. What was read ahead in vain is no part of a floor.

Where the disk has no room for both sides' files, or a quiet time does not hold everything: --only and --work choose
what is measured in one call, --json gathers the calls, --delete ends a side's files with it, and with --reroute a
skewed model is made out of the even one, in place.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.models import our_qwen3_next, their_qwen3_next
from bench.sides import Side, SideError
from mixbit.engine.loader import load
from mixbit.engine.synth import Skew
from mixbit.kernels.cpu.backend import CpuBackend
from mixbit.kernels.experts import expert_bytes, streamable
from mixbit.server.cli.memory import parse_size

CONTEXT = 4096
COLD, BEFORE, STEADY, PROMPT = 24, 100, 24, 2048  # tokens
_CGROUP = Path("/sys/fs/cgroup/memory/mixbit-bench")
_RATE_EXPERTS = 300
_PATIENCE = 1800  # seconds for one command
WORKS = ("decode", "prefill")
TITLES = {"cold": f"decode, tokens 1-{COLD}", "steady": f"decode after {BEFORE}", "prefill": f"prefill {PROMPT}"}


class Machine:
    """Drops caches, bounds memory, and measures the disk and what a process takes."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit

    @contextlib.contextmanager
    def bounded(self) -> Iterator[None]:
        """Children that are started here live in a cgroup of `limit` bytes."""
        if self.limit is None:
            yield
            return
        _CGROUP.mkdir(exist_ok=True)
        (_CGROUP / "memory.limit_in_bytes").write_text(str(self.limit))
        (_CGROUP / "tasks").write_text(str(os.getpid()))
        try:
            yield
        finally:
            (_CGROUP.parent / "tasks").write_text(str(os.getpid()))
            with contextlib.suppress(OSError):
                (_CGROUP / "memory.force_empty").write_text("0")

    @staticmethod
    def forget(model: Path) -> None:
        """Drop the pages of the model's files."""
        for file in model.glob("*.safetensors") if model.is_dir() else [model]:
            descriptor = os.open(file, os.O_RDONLY)
            os.fdatasync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


class Peak(threading.Thread):
    """The most private and locked memory that a process has had while this runs."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._status, self._over, self.bytes = Path(f"/proc/{pid}/status"), threading.Event(), 0

    def run(self) -> None:
        while not self._over.wait(0.02):
            with contextlib.suppress(OSError):
                fields = dict(line.split(":", 1) for line in self._status.read_text().splitlines() if ":" in line)
                count = sum(int(fields[name].split()[0]) for name in ("RssAnon", "VmLck") if name in fields)
                self.bytes = max(self.bytes, 1024 * count)

    def stop(self) -> int:
        self._over.set()
        self.join()
        return self.bytes


def _bytes_from_disk(pid: int) -> int:
    """What a process has had read, by faults of a map too."""
    fields = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(fields["read_bytes"])


def measure(
    start: Callable[[], Side], forget: Callable[[], None], works: Sequence[str], disk: Callable[[], float] | None
) -> dict[str, Any]:
    """The rows of one side. disk: what it gives now, for a side that can tell what it read."""
    found: dict[str, Any] = {}

    def row(name: str, side: Side, **command: Any) -> None:
        before, first = side.ask(do="experts") if disk else {}, disk() if disk else 0
        from_disk = _bytes_from_disk(side.pid)
        tokens, seconds = command["tokens"], side.ask(timeout=_PATIENCE, **command)["seconds"]
        from_disk = _bytes_from_disk(side.pid) - from_disk
        found[name] = {"tokens": tokens, "rate": tokens / seconds, "seconds": seconds, "from disk": from_disk}
        if disk:
            after = side.ask(do="experts")
            found[name]["disk"] = (first + disk()) / 2
            found[name] |= {key: after[key] - before[key] for key in after}

    for work in works:
        forget()
        started = time.perf_counter()
        side = start()
        peak = Peak(side.pid)
        peak.start()
        try:
            found[f"{work} ready"] = {
                "seconds": time.perf_counter() - started,
                "load": side.loaded["seconds"],
                "from disk": _bytes_from_disk(side.pid),
            }
            if work == "decode":
                row("cold", side, do="decode", tokens=COLD, context=1, sequences=1)
                side.ask(timeout=_PATIENCE, do="decode", tokens=BEFORE - COLD, context=1, sequences=1)
                row("steady", side, do="decode", tokens=STEADY, context=1, sequences=1)
            else:
                row("prefill", side, do="prefill", tokens=PROMPT)
        finally:
            side.close()
            found[f"{work} ready"]["peak"] = peak.stop()
    return found


def ours(args: argparse.Namespace, machine: Machine) -> dict[str, Any]:
    model = our_qwen3_next(args.models, args.layers, args.skew, reroute=args.reroute)
    loaded = load(model)
    program, backend = loaded.program, CpuBackend()
    layers, experts = list(streamable(program)), expert_bytes(program)
    print(
        f"{loaded.weight_bytes / 1e9:.2f} GB, of them {experts / 1e9:.2f} GB of experts in {len(layers)} layers",
        flush=True,
    )
    try:
        with machine.bounded():
            found = measure(
                lambda: Side(
                    sys.executable,
                    "ours.py",
                    model=str(model),
                    threads=args.threads,
                    context=CONTEXT,
                    memory=args.memory,
                    precision="fast",
                    direct=True if args.limit else None,  # what lies beside the limit is not seen by the plan
                ),
                lambda: machine.forget(model),
                args.work,
                lambda: backend.read_rate(program, direct=True, count=_RATE_EXPERTS),
            )
    finally:
        if args.delete:
            shutil.rmtree(model)
    one = experts / sum(node.spec.router.out_dim for node in layers)
    for name in found.keys() & TITLES.keys():
        row = found[name]
        tokens = row["tokens"] + (name == "cold")  # the context's token is counted in what is read, not in the time
        needed = row["misses"] * one
        row["floor"] = tokens / (needed / row["disk"])
        if name == "cold":
            row["floor with dense"] = tokens / ((needed + loaded.weight_bytes - experts) / row["disk"])
    return found


def theirs(args: argparse.Namespace, machine: Machine) -> dict[str, Any]:
    model = their_qwen3_next(args.models, args.layers, args.skew, reroute=args.reroute)
    try:
        with machine.bounded():
            return measure(
                lambda: Side(
                    args.peer_python,
                    "peer_llama_cpp.py",
                    model=str(model),
                    threads=args.threads,
                    context=CONTEXT,
                    repack=False,
                ),
                lambda: machine.forget(model),
                args.work,
                None,
            )
    finally:
        if args.delete:
            model.unlink()


def show(results: dict[str, dict[str, Any]], budget: int | None) -> None:
    """Rates of both sides, and what they are of one another and of the floor."""
    columns = (
        "work",
        "ours",
        "of the floor",
        "disk GB/s",
        "in memory",
        "read, wait s",
        "guessed",
        "llama.cpp",
        "ratio",
    )
    console, table = Console(), Table(*columns)
    mine, peer = results.get("ours", {}), results.get("theirs", {})
    for name, title in TITLES.items():
        own, other = mine.get(name), peer.get(name)
        cells = [title, *[""] * 6, f"{other['rate']:.2f}" if other else "", ""]
        if own:
            floors = [own[key] for key in ("floor", "floor with dense") if key in own]
            begun = own["ahead"] + own["unused"]
            cells[1:7] = [
                f"{own['rate']:.2f} tok/s",
                ", ".join(f"{own['rate'] / floor:.0%}" for floor in floors),
                f"{own['disk'] / 1e9:.2f}",
                f"{own['hits'] / (own['hits'] + own['misses']):.0%}",
                f"{own['read']:.1f}, {own['wait']:.1f} of {own['seconds']:.1f}",
                f"{own['ahead'] / begun:.0%} of {begun}" if begun else "",
            ]
        if own and other:
            cells[8] = f"{own['rate'] / other['rate']:.2f} x"
        table.add_row(*cells)
    console.print(table)
    for name, side in results.items():
        for work in WORKS:
            if ready := side.get(f"{work} ready"):
                over = f", {ready['peak'] / budget:.3f} of the budget" if budget and name == "ours" else ""
                peak = f"private and locked {ready['peak'] / 1e9:.2f} GB{over}"
                console.print(f"{name}, {work}: ready after {ready['seconds']:.1f} s; {peak}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="directory for the models")
    parser.add_argument("--peer-python", help="python of the peer's environment (see `make bench`)")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--memory", type=parse_size, help="our --memory")
    parser.add_argument("--limit", type=parse_size, help="memory of either side, page cache included")
    parser.add_argument("--skew", help="such as 70:20")
    parser.add_argument("--reroute", action="store_true", help="the skewed model takes the place of the even one")
    parser.add_argument("--only", choices=["ours", "theirs"])
    parser.add_argument("--work", nargs="*", default=WORKS, choices=WORKS, help="none: only make the files")
    parser.add_argument("--delete", action="store_true", help="each side's files once it is done")
    parser.add_argument("--json", type=Path, help="what was measured, added to what it holds")
    args = parser.parse_args()
    args.threads = args.threads or len(os.sched_getaffinity(0))
    args.skew = Skew(*(int(part) / 100 for part in args.skew.split(":"))) if args.skew else None
    args.models.mkdir(parents=True, exist_ok=True)
    results = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    for name, side in (("ours", ours), ("theirs", theirs)):
        if args.only in (None, name):
            try:
                results[name] = results.get(name, {}) | side(args, Machine(args.limit))
            except SideError as error:
                sys.exit(f"{name}: {error}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    show(results, args.memory)


if __name__ == "__main__":
    main()
