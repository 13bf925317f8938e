"""The CUDA backend at full size: Qwen3-Coder-Next with random weights, made on the device.

python -m bench.gpu_native parity     random programs against the NumPy reference
python -m bench.gpu_native model      decode and prefill: tokens a second, launches a step, time by kernel
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.gpu_cases import cases, outputs
from bench.gpu_shapes import program
from mixbit.kernels.cuda.compiler import Compiler
from mixbit.kernels.cuda.driver import Buffer, Device
from mixbit.kernels.cuda.executor import CudaExecutor, Key
from mixbit.kernels.executor import Batch, CacheConfig, ExecutorOptions
from mixbit.kernels.reference.backend import ReferenceBackend

_PIECE = 1 << 26  # bytes of random codes that large tensors repeat


def random_weights(device: Device) -> Callable[[npt.NDArray[Any]], Buffer]:
    rng = np.random.default_rng(0)
    piece = device.put(rng.integers(0, 1 << 32, _PIECE // 4, dtype=np.uint32))

    def place(array: npt.NDArray[Any]) -> Buffer:
        if (
            0 not in array.strides and array.any()
        ):  # made from the program's sizes, as the frequencies of a rotary embedding
            return device.put(array)
        if array.dtype == np.uint32:
            return _repeat(device, piece, array.nbytes)
        if array.dtype == np.float32 or array.ndim == 1:
            return device.put((1 + 0.1 * rng.standard_normal(array.shape)).astype(array.dtype))
        if array.dtype not in scales:
            values = rng.uniform(0.001, 0.004, 1 << 20) * rng.choice([-1, 1], 1 << 20)
            scales[array.dtype] = device.put(values.astype(array.dtype))
        return _repeat(device, scales[array.dtype], array.nbytes)

    scales: dict[Any, Buffer] = {}
    return place


def _repeat(device: Device, piece: Buffer, nbytes: int) -> Buffer:
    made = device.alloc(nbytes)
    for start in range(0, nbytes, piece.nbytes):
        device.copy(made.view(start, piece.nbytes), piece, min(piece.nbytes, nbytes - start))
    return made


def parity(device: Device, compiler: Compiler) -> None:
    """Print the largest error of each case, relative to the largest value wanted."""
    from tests.kernels.builders import CACHE

    wrong = 0
    for name, (graph, sizes) in cases().items():
        want = outputs(ReferenceBackend().compile(graph, CACHE, ExecutorOptions(max_tokens=64)), sizes)
        shown = []
        for dtype, limit in (("float32", 1e-4), ("bfloat16", 1e-1)):
            options = ExecutorOptions(max_tokens=64, dtype=dtype)  # type: ignore[arg-type]
            got = outputs(CudaExecutor(graph, CACHE, options, device, compiler), sizes)
            error = float(np.abs(got - want).max() / np.abs(want).max())
            bad = not error < limit
            wrong += bad
            shown.append(f"{dtype} {error:.1e}{' WRONG' if bad else ''}")
        print(f"{name:44s} {'; '.join(shown)}", flush=True)
    print(f"parity: {wrong} wrong")


def batch(count: int, context: int, new: int, cache: CacheConfig, selected: int | None = None) -> Batch:
    """`count` sequences with so many tokens in the cache and so many new ones."""
    each = -(-(context + new) // cache.block_size)
    rng = np.random.default_rng(context)
    ends = np.arange(1, count + 1) * new - 1
    return Batch(
        tokens=rng.integers(0, 151936, count * new).astype(np.int32),
        query_starts=(np.arange(count + 1) * new).astype(np.int32),
        context_lengths=np.full(count, context, np.int32),
        block_tables=np.arange(count * each, dtype=np.int32).reshape(count, each),
        state_slots=np.arange(count, dtype=np.int32),
        logit_rows=(ends if selected is None else ends[:selected]).astype(np.int32),
    )


def model(device: Device, compiler: Compiler, layers: int, *, prefill: bool) -> None:
    """Tokens a second through Executor.run, logits on the host included; then device time by kernel."""
    cache = CacheConfig(blocks=1024, block_size=32, state_slots=32)
    options = ExecutorOptions(max_tokens=2048, dtype="bfloat16")
    start = time.perf_counter()
    executor = CudaExecutor(program(layers), cache, options, device, compiler, random_weights(device))
    print(f"made in {time.perf_counter() - start:.1f} s, {device.free_memory / 1e9:.1f} GB free", flush=True)
    for count in (1, 4, 16):
        executor.run(batch(count, 0, 1, cache))
        steps = [batch(count, 64 + i, 1, cache) for i in range(40)]
        times = []
        for step in steps:
            begin = time.perf_counter()
            logits = executor.run(step)
            times.append(time.perf_counter() - begin)
        steps_of = executor._few
        graph = steps_of.graph(Key(count, count, count))
        on_device = statistics.median(device.milliseconds(lambda g=graph: device.replay(g)) for _ in range(20))
        step = statistics.median(times[5:])
        print(
            f"decode, {count:2d}: {count / step:8.1f} tok/s, {step * 1e3:.3f} ms a step, {on_device:.3f} there, "
            f"{len(graph.launches)} launches; finite {np.isfinite(logits).all()}, spread {logits.std():.2f}",
            flush=True,
        )
        by_kernel(executor, device, count)
    for context in (1024, 4096):
        executor.run(batch(1, context, 1, cache))
        times = []
        for _ in range(20):
            begin = time.perf_counter()
            executor.run(batch(1, context, 1, cache))
            times.append(time.perf_counter() - begin)
        print(f"decode, 1, context {context}: {1 / statistics.median(times):8.1f} tok/s", flush=True)
    for tokens in (512, 2048) if prefill else ():
        times = []
        for _ in range(6):
            begin = time.perf_counter()
            executor.run(batch(1, 0, tokens, cache))
            times.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        executor.run(batch(1, 0, tokens - 3, cache))
        fresh = time.perf_counter() - begin
        print(
            f"prefill {tokens}: {tokens / statistics.median(times[1:]):8.1f} tok/s, "
            f"{(tokens - 3) / fresh:8.1f} at a size not seen before",
            flush=True,
        )


def by_kernel(executor: CudaExecutor, device: Device, count: int) -> None:
    """Device time of each kernel of a step, each kind captured by itself: launches follow one another in a graph."""
    groups: defaultdict[str, list[Any]] = defaultdict(list)
    total = 0.0
    for _work, planned in executor._few.planned(count, count, count):
        for plan, launch in zip(planned, executor._kernels.launches(planned), strict=True):
            label = plan.kernel
            if plan.kernel == "matvec":
                label += " " + ", ".join(d for d in plan.source.defines if d.startswith(("DIM", "FORMATS", "WITH")))
            groups[label].append(launch)
    for label, launches in groups.items():
        graph = device.capture(launches)
        device.replay(graph)
        took = statistics.median(device.milliseconds(lambda g=graph: device.replay(g)) for _ in range(5))
        total += took
        print(
            f"    {label:88.88s} {len(launches):4d} x {took / len(launches) * 1e3:8.2f} us = {took:7.3f} ms", flush=True
        )
    print(f"    {'sum':88s} {total:.3f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("parity", "model"))
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--prefill", action="store_true")
    given = parser.parse_args()
    device = Device()
    print(f"{device.name}, {device.arch}, {device.multiprocessors} multiprocessors", flush=True)
    compiler = Compiler(device.arch)
    if given.what == "parity":
        parity(device, compiler)
    else:
        model(device, compiler, given.layers, prefill=given.prefill)


if __name__ == "__main__":
    main()
