"""The store of streamed experts by itself, with everything in memory.

    python -m bench.expert_store --models DIR [--layers 8]

Experts from the page cache over copies of as many bytes, by two threads each: made ready (mapped, or copied into
slots), and made ready and gone over once, which a copy leaves to be done. Each turn maps anew: no page is there before.
Then decoding with all experts in slots over decoding from the weights as they are mapped.
"""

from __future__ import annotations

import argparse
import os
import statistics
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from bench.machine import forget
from bench.models import our_qwen3_next, warm
from mixbit.engine.benchmark import STEP_TOKENS, Driver
from mixbit.engine.loader import load
from mixbit.kernels.cpu.backend import CpuBackend
from mixbit.kernels.executor import ExecutorOptions
from mixbit.kernels.experts import Access, ExpertMemory, expert_bytes

CONTEXT = 2048
PROMPT = 2048  # tokens, that choose nearly all experts
READS = 300  # experts
ROUNDS = 9  # of reading and copying
TURNS, TOKENS = 30, 12  # of decoding


def reads_and_copies(model: Path) -> dict[str, list[float]]:
    """Bytes per second of two threads: experts made ready, also gone over, by either access; copies. In turns."""
    program, backend = load(model).program, CpuBackend()
    forget(list(model.glob("*.safetensors")))
    warm(model)  # one after the other: the system keeps long pieces, of which it maps more at once
    kinds: list[tuple[Access, bool]] = [("mapped", False), ("mapped", True), ("cached", False), ("cached", True)]
    found: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for access, use in kinds:
            rate = backend.read_rate(program, access=access, count=READS, threads=2, use=use)
            found.setdefault(f"{access}, {'gone over' if use else 'ready'}", []).append(rate)
        found.setdefault("copies", []).append(_copy_rate())
    return found


def _copy_rate() -> float:
    """512 KB at a time, an expert's longest array, to as much memory as ten experts take."""
    source = np.ones((2, 1024, 1 << 18), np.uint16)
    target = np.zeros((2, 18, 1 << 18), np.uint16)

    def copy(thread: int) -> None:
        for i in range(1024):
            np.copyto(target[thread, i % 18], source[thread, i])

    threads = [threading.Thread(target=copy, args=(number,)) for number in range(2)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return source.nbytes / (time.perf_counter() - start)


def rates(model: Path, threads: int) -> dict[str, list[float]]:
    """Tokens per second with experts in slots, and where they are mapped: in turns, in one process."""
    loaded = load(model)
    slots = ExpertMemory(2 * expert_bytes(loaded.program), access="mapped")  # more than they take
    options = ExecutorOptions(max_tokens=STEP_TOKENS, threads=threads, precision="fast")
    sides = {
        name: Driver("cpu", loaded.program, loaded.vocab_size, CONTEXT, 1, replace(options, experts=experts))
        for name, experts in (("streaming", slots), ("resident", None))
    }
    sides["streaming"].prefill(PROMPT)
    while _decode(sides["streaming"])[1]:  # also the last layer's: a prompt needs few of them
        pass
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(TURNS + 1):  # the first warms up
        for name, side in sides.items():
            rate, _ = _decode(side)
            if turn:
                found[name].append(rate)
    return found


def _decode(side: Driver) -> tuple[float, int]:
    """Tokens per second, and experts that were not in memory."""
    before = side.executor.expert_counts()
    seconds = side.decode(TOKENS, context=1, sequences=1)
    after = side.executor.expert_counts()
    return TOKENS / seconds, sum(each.misses for each in after) - sum(each.misses for each in before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="directory for the models")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    args.models.mkdir(parents=True, exist_ok=True)
    model = our_qwen3_next(args.models, args.layers)
    found = reads_and_copies(model)
    copies = {"copies": found.pop("copies")}
    for kind, reads in found.items():
        _tell("page cache, bytes/s", {kind: reads} | copies)
    _tell("decoding, tok/s", rates(model, args.threads or len(os.sched_getaffinity(0))))


def _tell(what: str, sides: dict[str, list[float]]) -> None:
    """Medians of two, the first over the second."""
    (first, own), (second, other) = sides.items()
    ratio = statistics.median(one / two for one, two in zip(own, other, strict=True))
    medians = f"{first} {statistics.median(own):.4g}, {second} {statistics.median(other):.4g}"
    print(f"{what}: {medians}; {ratio:.3f} (median of {len(own)} turns)", flush=True)


if __name__ == "__main__":
    main()
