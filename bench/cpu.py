"""Mixbit beside llama.cpp on the same weights, the same threads, in one run: `make bench`.

Repetitions alternate between the sides and medians are compared, so that a machine whose speed drifts
drifts for both. Each side is a child process; a row's ratio is ours over the peer's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent


class Side:
    """One engine in a child process."""

    def __init__(self, python: str, script: str, **options: Any) -> None:
        self.process = subprocess.Popen(
            [python, str(HERE / script), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.load_seconds: float = self._read()["load_seconds"]

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} ended with {self.process.wait()}")
        result: dict[str, Any] = json.loads(line)
        return result

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@dataclass(frozen=True)
class Work:
    """What a row measures: a command and the tokens it makes."""

    name: str
    command: dict[str, Any]
    tokens: int
    target: float


def works(context: int) -> list[Work]:
    def decode(at: int, tokens: int) -> dict[str, Any]:
        return {"do": "decode", "tokens": tokens, "context": at, "sequences": 1}

    rows = [
        Work("decode, context 128", decode(128, 64), 64, 1.8),
        Work("prefill 512", {"do": "prefill", "tokens": 512}, 512, 6.5),
    ]
    if context > 4200:
        rows.append(Work("decode, context 4096", decode(4096, 32), 32, 1.5))
    return rows


def read_bandwidth(threads: int) -> float:
    """Bytes per second of a plain read by NumPy on `threads` threads: best of five."""
    arrays = [np.ones(64 << 20, np.uint64) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(np.max, arrays))
            best = max(best, sum(a.nbytes for a in arrays) / (time.perf_counter() - start))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="checkpoint directory in MLX format")
    parser.add_argument("--gguf", required=True, help="the same weights for llama.cpp")
    parser.add_argument("--peer-python", required=True, help="Python that has llama-cpp-python")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--context", type=int, default=1024)
    args = parser.parse_args()

    common = {"threads": args.threads, "context": args.context}
    ours = Side(sys.executable, "ours.py", model=args.model, **common)
    peer = Side(args.peer_python, "peer_llama_cpp.py", model=args.gguf, **common)
    bandwidth = read_bandwidth(args.threads)

    table = Table("work", "ours tok/s", "llama.cpp tok/s", "ratio", "at least")
    for work in works(args.context):
        pairs = [[side.ask(**work.command)["seconds"] for side in (ours, peer)] for _ in range(args.repeat + 1)][1:]
        mine, theirs = (work.tokens / statistics.median(side) for side in zip(*pairs, strict=True))
        table.add_row(work.name, f"{mine:.1f}", f"{theirs:.1f}", f"{mine / theirs:.2f}", f"{work.target}")
    memory = ours.ask(do="memory")
    console = Console()
    console.print(table)
    console.print(
        f"load: ours {ours.load_seconds:.2f} s, llama.cpp {peer.load_seconds:.2f} s; "
        f"private memory {memory['private'] / 2**20:.0f} MiB, weights {memory['weights'] / 2**20:.0f} MiB; "
        f"plain read {bandwidth / 1e9:.1f} GB/s, weights once per token: {bandwidth / memory['weights']:.0f} tok/s"
    )
    ours.close()
    peer.close()


if __name__ == "__main__":
    main()
