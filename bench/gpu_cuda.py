"""The CUDA backend at full size: tokens a second, the step by kernel beside its floors, products and experts alone."""

from __future__ import annotations

import importlib.metadata
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.gpu_report import COPY, EXPERTS, MATVEC, Report
from bench.gpu_shapes import batch, config, program, shapes_only
from mixbit.kernels import ops
from mixbit.kernels.cuda.compiler import Compiler
from mixbit.kernels.cuda.driver import Buffer, Device, Launch
from mixbit.kernels.cuda.executor import CudaExecutor, Key
from mixbit.kernels.cuda.linear import Kind, Output, linear
from mixbit.kernels.cuda.plan import Planned
from mixbit.kernels.cuda.weights import Store
from mixbit.kernels.executor import CacheConfig, ExecutorOptions
from mixbit.kernels.spec import Matrix

SIDE = "CUDA backend"
CACHE = CacheConfig(blocks=1024, block_size=32, state_slots=32)
COUNTS, PROMPTS, CONTEXTS = (1, 4, 16), (512, 2048), (1024, 4096)
_PIECE = 1 << 26  # bytes of random codes that large tensors repeat
_ROTATE = 1 << 30  # bytes of copies of one matrix, so that no cache holds the next


def measure(report: Report, layers: int) -> dict[str, str]:
    """The part "cuda" of bench.gpu; returns what it ran on."""
    device = Device()
    compiler = Compiler(device.arch)
    bandwidth = copy_bandwidth(device)
    report.add(SIDE, COPY, bandwidth)
    plain_product(report, device, compiler)
    model(report, device, compiler, config(layers), bandwidth)
    return {"device": device.name, "cuda-bindings": importlib.metadata.version("cuda-bindings")}


def copy_bandwidth(device: Device, nbytes: int = 1 << 31) -> float:
    """GB/s read and written by the driver's own copy."""
    source, target = device.alloc(nbytes), device.alloc(nbytes)
    source.fill(1)
    device.copy(target, source, nbytes)
    each = min(device.milliseconds(lambda: device.copy(target, source, nbytes)) for _ in range(5))
    return 2 * nbytes / each / 1e6


def random_weights(device: Device) -> Callable[[npt.NDArray[Any]], Buffer]:
    """Puts arrays of shapes alone on the device with random contents; arrays that have values as they are."""
    rng = np.random.default_rng(0)
    piece = device.put(rng.integers(0, 1 << 32, _PIECE // 4, dtype=np.uint32))
    scales: dict[Any, Buffer] = {}

    def place(array: npt.NDArray[Any]) -> Buffer:
        if 0 not in array.strides and array.any():  # made from the program's sizes, as a rotation's frequencies
            return device.put(array)
        if array.dtype == np.uint32:
            return _repeat(device, piece, array.nbytes)
        if array.dtype == np.float32 or array.ndim == 1:
            return device.put((1 + 0.1 * rng.standard_normal(array.shape)).astype(array.dtype))
        if array.dtype not in scales:
            values = rng.uniform(0.001, 0.004, 1 << 20) * rng.choice([-1, 1], 1 << 20)
            scales[array.dtype] = device.put(values.astype(array.dtype))
        return _repeat(device, scales[array.dtype], array.nbytes)

    return place


def _repeat(device: Device, piece: Buffer, nbytes: int) -> Buffer:
    made = device.alloc(nbytes)
    for start in range(0, nbytes, piece.nbytes):
        size = min(piece.nbytes, nbytes - start)
        device.copy(made.view(start, size), piece, size)
    return made


def graph_us(device: Device, launches: Sequence[Launch], rounds: int = 9) -> float:
    """Median device time of one launch, all of them in one graph."""
    graph = device.capture(launches)
    device.replay(graph)
    took = [device.milliseconds(lambda: device.replay(graph)) for _ in range(rounds)]
    return statistics.median(took) / len(launches) * 1e3


def plain_product(
    report: Report,
    device: Device,
    compiler: Compiler,
    sizes: Sequence[tuple[int, int, int, int]] = ((12288, 2048, 4, 1), (12288, 2048, 8, 1), (12288, 2048, 4, 16)),
) -> None:
    """Products alone, (out, in, bits, rows): no norm, no residual; each launch in a graph has a matrix of its own."""
    for out, in_dim, bits, rows in sizes:
        matrix = shapes_only("plain", (out, in_dim), bits)
        copies = max(2, min(64, _ROTATE // matrix.nbytes))
        kind, place = Kind("bfloat16", device.multiprocessors), random_weights(device)
        x, y = device.put(np.ones(rows * in_dim, np.uint16)), device.alloc(4 * rows * out)
        stores = [Store(device, "bfloat16", place) for _ in range(copies)]  # a store places an array once
        planned = [linear(kind, x, [Output(store.matrix(matrix), y)], rows) for store in stores]
        (code,) = compiler.compile([planned[0].source])
        modules = {planned[0].source: device.load(code)}
        each = graph_us(device, [plan.launch(modules) for plan in planned])
        rate = matrix.nbytes / each / 1e3
        print(f"product {out} x {in_dim}, {bits} bits, {rows} rows: {each:.2f} us, {rate:,.0f} GB/s", flush=True)
        if (bits, rows) == (4, 1):
            report.add(SIDE, MATVEC, rate)


def model(
    report: Report, device: Device, compiler: Compiler, sizes: Mapping[str, Any], bandwidth: float, steps: int = 40
) -> None:
    """Through Executor.run, logits on the host included; then device time by kernel. bandwidth: GB/s, for floors."""
    options, vocab = ExecutorOptions(max_tokens=max(PROMPTS), dtype="bfloat16"), int(sizes["vocab_size"])
    executor = CudaExecutor(program(sizes), CACHE, options, device, compiler, random_weights(device))

    def median(count: int, contexts: Sequence[int], new: int) -> float:
        times = []
        for context in contexts:
            given = batch(count, context, new, CACHE, vocab)
            begin = time.perf_counter()
            logits = executor.run(given)
            times.append(time.perf_counter() - begin)
            if not np.isfinite(logits).all():
                raise RuntimeError(f"{count} sequences at context {context}: logits are not numbers")
        return statistics.median(times[len(times) // 8 :])

    for count in COUNTS:
        each = median(count, range(64, 64 + steps), 1)
        name = "decode, 1" if count == 1 else f"decode, {count} in all"
        report.add(SIDE, name, count / each)
        report.steps[name] = by_kernel(executor, device, count, each, bandwidth)
    for context in CONTEXTS:
        print(f"decode, 1, context {context}: {1 / median(1, [context] * 16, 1):,.1f} tok/s", flush=True)
    for new in PROMPTS:
        report.add(SIDE, f"prefill {new}", new / median(1, [0] * 8, new))
    report.add(SIDE, EXPERTS, experts_us(executor, device))


@dataclass(frozen=True)
class _Kind:
    """Launches of a step that are alike."""

    label: str
    launches: list[Launch]
    floors: list[float]  # us


def by_kernel(executor: CudaExecutor, device: Device, count: int, step: float, bandwidth: float) -> dict[str, Any]:
    """Device time of each kind of kernel of a decode step, captured by itself, beside what its bytes take."""
    graph = executor._few.graph(Key(count, count, count))
    whole = statistics.median(device.milliseconds(lambda: device.replay(graph)) for _ in range(20))
    kinds: dict[str, _Kind] = {}
    for work, planned in executor._few.planned(count, count, count):
        for plan, launch in zip(planned, executor._kernels.launches(planned), strict=True):
            label = f"{plan.kernel} of {ops.kind(work.node)}"
            if isinstance(work.node, ops.BatchMatvec):
                label += " " + ", ".join(f"{m.out_dim} x {m.in_dim}" for m in _matrices(work.node))
            kind = kinds.setdefault(label, _Kind(label, [], []))
            kind.launches.append(launch)
            kind.floors.append(moved_bytes(work.node, plan, count) / bandwidth / 1e3)
    rows = [
        {
            "kernel": kind.label,
            "launches": len(kind.launches),
            "us": graph_us(device, kind.launches, 5),
            "floor_us": statistics.mean(kind.floors),
        }
        for kind in kinds.values()
    ]

    def total(field: str) -> float:
        return sum(row["launches"] * row[field] for row in rows) / 1e3  # type: ignore[operator,misc]

    return {
        "launches": len(graph.launches),
        "step_ms": step * 1e3,
        "device_ms": whole,
        "sum_ms": total("us"),
        "floor_ms": total("floor_us"),
        "kernels": rows,
    }


def _matrices(node: ops.BatchMatvec) -> list[Matrix]:
    return [spec.matrix for spec in node.specs]


def moved_bytes(node: ops.Node, plan: Planned, rows: int) -> float:
    """Bytes of weights and states that a launch cannot but move; experts as many as `rows` even choices meet."""
    match node:
        case ops.BatchMatvec():
            return sum(matrix.nbytes for matrix in _matrices(node))
        case ops.GatedDelta(spec=spec):
            return 8 * rows * spec.value_heads * spec.value_dim * spec.key_dim
        case ops.Moe(spec=spec):
            if plan.kernel == "matvec":
                return spec.router.nbytes + (spec.shared_gate.nbytes if spec.shared_gate is not None else 0)
            count = spec.experts.down.experts or 1
            met = count * (1 - (1 - spec.top_k / count) ** rows)
            names = ("down",) if plan.kernel == "experts_project" else ("gate", "up")
            routed = sum(getattr(spec.experts, name).nbytes for name in names) * met / count
            return routed + (sum(getattr(spec.shared, name).nbytes for name in names) if spec.shared is not None else 0)
    return 0


def experts_us(executor: CudaExecutor, device: Device) -> float:
    """The chosen experts of one token with the shared one, both launches, layer after layer in one graph."""
    layers: defaultdict[int, list[Launch]] = defaultdict(list)
    for index, (work, planned) in enumerate(executor._few.planned(1, 1, 1)):
        if isinstance(work.node, ops.Moe):
            launches = executor._kernels.launches(planned)
            layers[index] += [
                launch for plan, launch in zip(planned, launches, strict=True) if plan.kernel.startswith("experts_")
            ]
    launches = [launch for layer in layers.values() for launch in layer]
    return graph_us(device, launches) * len(launches) / len(layers)
