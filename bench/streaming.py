"""A model larger than memory: Mixbit's streamed experts beside llama.cpp with mmap, on one shape and one machine.

    python -m bench.streaming --peer-python PYTHON --models DIR [--layers 48] [--limit 22GB] [--skew 70:20]

With --limit both sides run in a memory cgroup of that size (version 1, as root), their pages in the page cache
included, so that fewer layers stand for a machine that is as much too small for them. The pages of the model's files
are dropped before it is started. Beside each row the disk is measured by reading random experts past the page cache:
the floor is what the misses of that row take at that rate. With --delete only one side's files are on disk at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.models import Pair, our_qwen3_next, their_qwen3_next
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


def measure(start: Callable[[], Side], forget: Callable[[], None], rate: Callable[[], float] | None) -> dict[str, Any]:
    """All rows of one side."""
    found: dict[str, Any] = {}

    def row(name: str, side: Side, **command: Any) -> None:
        before, first = side.ask(do="experts") if rate else {}, rate() if rate else 0
        tokens, seconds = command["tokens"], side.ask(**command)["seconds"]
        found[name] = {"rate": tokens / seconds}
        if rate:
            after, disk = side.ask(do="experts"), (first + rate()) / 2
            read = after["bytes_read"] - before["bytes_read"]
            asked = after["misses"] - before["misses"] + after["hits"] - before["hits"]
            found[name] |= {
                "disk": disk,
                "floor": tokens / (read / disk),
                "in memory": (after["hits"] - before["hits"]) / asked,
                "read seconds": after["read"] - before["read"],
                "wait seconds": after["wait"] - before["wait"],
            }

    forget()
    started = time.perf_counter()
    side = start()
    peak = Peak(side.pid)
    peak.start()
    try:
        found["ready"] = {"seconds": time.perf_counter() - started, "load": side.loaded["seconds"]}
        row("cold", side, do="decode", tokens=COLD, context=1, sequences=1)
        side.ask(do="decode", tokens=BEFORE - COLD, context=1, sequences=1)
        row("steady", side, do="decode", tokens=STEADY, context=1, sequences=1)
    finally:
        side.close()
    forget()
    side = start()
    try:
        row("prefill", side, do="prefill", tokens=PROMPT)
    finally:
        side.close()
        found["peak"] = peak.stop()
    return found


def ours(args: argparse.Namespace, machine: Machine) -> dict[str, Any]:
    model = our_qwen3_next(args.models, args.layers, args.skew)
    loaded = load(model)
    program, backend = loaded.program, CpuBackend()
    layers, experts = len(list(streamable(program))), expert_bytes(program) / 1e9
    print(f"{loaded.weight_bytes / 1e9:.2f} GB, of them {experts:.2f} GB of experts in {layers} layers", flush=True)
    try:
        with machine.bounded():
            return measure(
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
                lambda: backend.read_rate(program, direct=True, count=_RATE_EXPERTS),
            )
    finally:
        if args.delete:
            shutil.rmtree(model)


def theirs(args: argparse.Namespace, machine: Machine) -> dict[str, Any]:
    model = their_qwen3_next(args.models, args.layers, args.skew)
    try:
        with machine.bounded():
            return measure(
                lambda: Side(args.peer_python, args.peer, model=str(model), threads=args.threads, context=CONTEXT),
                lambda: machine.forget(model),
                None,
            )
    finally:
        if args.delete:
            model.unlink()


def store(args: argparse.Namespace) -> dict[str, float]:
    """The store by itself, everything in memory: reads from the page cache over copies of as many bytes by as many
    threads, and decoding with all experts in slots over decoding with all where they are mapped."""
    model = our_qwen3_next(args.models, args.layers, args.skew)
    program, backend = load(model).program, CpuBackend()
    Pair(model, model, temporary=False).warm()
    reads = max(backend.read_rate(program, direct=False, count=_RATE_EXPERTS, threads=2) for _ in range(3))
    sides = {
        name: Side(
            sys.executable,
            "ours.py",
            model=str(model),
            threads=args.threads,
            context=CONTEXT,
            expert_memory=memory,
            direct=False,
            precision="fast",
        )
        for name, memory in (("streaming", 2 * expert_bytes(program)), ("resident", None))
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    try:
        sides["streaming"].ask(do="prefill", tokens=PROMPT)  # reads all experts
        for _ in range(5):
            for name, side in sides.items():
                seconds[name].append(side.ask(do="decode", tokens=32, context=1, sequences=1)["seconds"])
    finally:
        for side in sides.values():
            side.close()
    resident, streaming = (statistics.median(seconds[name]) for name in ("resident", "streaming"))
    return {"reads": reads, "copies": _copy_rate(), "of the resident form": resident / streaming}


def _copy_rate() -> float:
    """Bytes per second that two threads copy, 512 KB at a time, from memory to memory."""
    source = np.ones((2, 1024, 1 << 18), np.uint16)
    target = np.zeros((2, 64, 1 << 18), np.uint16)

    def copy(thread: int) -> None:
        for i in range(1024):
            np.copyto(target[thread, i % 64], source[thread, i])

    best = 0.0
    for _ in range(3):
        threads = [threading.Thread(target=copy, args=(number,)) for number in range(2)]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        best = max(best, source.nbytes / (time.perf_counter() - start))
    return best


def show(results: dict[str, dict[str, Any]], budget: int | None) -> None:
    """Rates of both sides, and what they are of one another and of the floor."""
    console, table = Console(), Table("work", "ours", "of the floor", "disk GB/s", "in memory", "llama.cpp", "ratio")
    mine, peer = results.get("ours", {}), results.get("theirs", {})
    titles = {"cold": f"decode, tokens 1-{COLD}", "steady": f"decode after {BEFORE}", "prefill": f"prefill {PROMPT}"}
    for name, title in titles.items():
        own, other = mine.get(name), peer.get(name)
        cells = [title, *[""] * 4, f"{other['rate']:.2f}" if other else "", ""]
        if own:
            cells[1:5] = [
                f"{own['rate']:.2f} tok/s",
                f"{own['rate'] / own['floor']:.0%}",
                f"{own['disk'] / 1e9:.2f}",
                f"{own['in memory']:.0%}",
            ]
        if own and other:
            cells[6] = f"{own['rate'] / other['rate']:.2f} x"
        table.add_row(*cells)
    console.print(table)
    for name, side in results.items():
        ready, peak = side["ready"], side["peak"]
        over = f", {peak / budget:.3f} of the budget" if budget and name == "ours" else ""
        console.print(f"{name}: ready after {ready['seconds']:.1f} s; private and locked {peak / 1e9:.2f} GB{over}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="directory for the models")
    parser.add_argument("--peer-python", help="python that has the package of --peer")
    parser.add_argument("--peer", default="peer_llama_cpp.py", help="or peer_llama_wheel.py")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--memory", type=parse_size, help="our --memory")
    parser.add_argument("--limit", type=parse_size, help="memory of either side, page cache included")
    parser.add_argument("--skew", help="such as 70:20")
    parser.add_argument("--only", choices=["ours", "theirs"])
    parser.add_argument("--store", action="store_true", help="instead: the store by itself, all in memory")
    parser.add_argument("--delete", action="store_true", help="each side's files once it is done")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.threads = args.threads or len(os.sched_getaffinity(0))
    args.skew = Skew(*(int(part) / 100 for part in args.skew.split(":"))) if args.skew else None
    args.models.mkdir(parents=True, exist_ok=True)
    if args.store:
        found = store(args)
        print(
            f"reads from the page cache {found['reads'] / 1e9:.2f} GB/s, copies {found['copies'] / 1e9:.2f} GB/s: "
            f"{found['reads'] / found['copies']:.2f}; decoding {found['of the resident form']:.3f} of the resident form"
        )
        return
    results = {}
    for name, side in (("ours", ours), ("theirs", theirs)):
        if args.only in (None, name):
            try:
                results[name] = side(args, Machine(args.limit))
            except SideError as error:
                sys.exit(f"{name}: {error}")
    if args.json:
        known = json.loads(args.json.read_text()) if args.json.exists() else {}
        results = known | results
        args.json.write_text(json.dumps(results, indent=1))
    show(results, args.memory)


if __name__ == "__main__":
    main()
