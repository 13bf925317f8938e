"""Single operations: MLX's own beside our MLX kernels, in chains that no cache serves."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np

from bench.gpu_report import COPY, EXPERTS, MATVEC, Report
from bench.gpu_shapes import config, program
from bench.gpu_weights import RandomWeights, random_matrix
from mixbit.kernels import ops
from mixbit.kernels.executor import CacheConfig
from mixbit.kernels.mlx.caches import StatePool
from mixbit.kernels.mlx.custom.experts import Experts, QuantizedMlp, Router
from mixbit.kernels.mlx.custom.gated_delta import DeltaStep
from mixbit.kernels.mlx.custom.launch import Launcher
from mixbit.kernels.mlx.custom.matvec import BatchedMatvec
from mixbit.kernels.mlx.custom.norm import AddNorm
from mixbit.kernels.mlx.custom.prefill_delta import PrefillDelta
from mixbit.kernels.mlx.stock import STOCK
from mixbit.kernels.mlx.weights import QuantizedWeight


def microseconds(run: Callable[[int], Any], count: int) -> float:
    """Median time of one of `count` operations whose graph run(count) builds; building is not timed."""
    for _ in range(2):
        mx.eval(run(count))
    times = []
    for _ in range(7):
        graph = run(count)
        start = time.perf_counter()
        mx.eval(graph)
        mx.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times) / count * 1e6


def row(name: str, stock: float, custom: float, moved: int) -> None:
    """One line of the table; moved: bytes that the operation must read and write."""
    rate = f"{moved / stock / 1e3:8.0f} {moved / custom / 1e3:8.0f}" if moved else " " * 17
    print(f"{name:52s} {stock:9.2f} {custom:9.2f} {rate} {stock / custom:7.2f}x", flush=True)


def nbytes(*weights: QuantizedWeight) -> int:
    return sum(w.codes.nbytes + w.scales.nbytes + w.biases.nbytes for w in weights)


def measure(report: Report, launcher: Launcher) -> None:
    """The table of single operations; weights change from one to the next, so that no cache holds them."""
    dtype = mx.bfloat16
    report.add("our MLX kernels", COPY, _copy_bandwidth())
    one = mx.ones((1, 2048), dtype)

    def chain(n: int) -> mx.array:
        x = one
        for _ in range(n):
            x = x + 1
        return x

    print(f"an add in a chain: {microseconds(chain, 500):.2f} us")
    print(f"{'us for one operation':52s} {'stock':>9s} {'custom':>9s} {'GB/s':>8s} {'GB/s':>8s}")
    for part in (_matvecs, _mixture, _small, _delta):
        try:
            part(report, launcher, dtype)
        except (RuntimeError, ValueError) as failure:
            print(f"{part.__name__}: {str(failure)[:1500]}", flush=True)


def _copy_bandwidth() -> float:
    big = mx.zeros((1 << 29,), mx.float32)
    return 2 * big.nbytes / microseconds(lambda n: [big + i for i in range(n)], 4) / 1e3


def _matvecs(report: Report, launcher: Launcher, dtype: mx.Dtype) -> None:
    for out, in_dim, bits in ((12288, 2048, 4), (12288, 2048, 8), (2048, 4096, 4), (151936, 2048, 4)):
        copies = [
            random_matrix((out, in_dim), bits, dtype, f"{out} {i}")
            for i in range(max(2, int(4e8 / out / in_dim / bits * 8)))
        ]
        ours = [BatchedMatvec(launcher, [w], dtype) for w in copies]
        for tokens in (1, 4, 8, 16):
            x = mx.random.normal((tokens, in_dim)).astype(dtype)

            def run(n: int, apply: Any, x: mx.array = x, width: int = in_dim) -> mx.array:
                for i in range(n):  # each reads what the one before wrote; views cost a launch for several tokens
                    y = apply(i, x)
                    x = y[:, :width] if width <= y.shape[1] else mx.concatenate([y, y], axis=1)
                return x

            stock = microseconds(lambda n, c=copies: run(n, lambda at, y: c[at % len(c)].apply(y)), 64)
            custom = microseconds(lambda n, o=ours: run(n, lambda at, y: o[at % len(o)](y)[0]), 64)
            row(f"matvec {out} x {in_dim}, {bits} bits, {tokens} tokens", stock, custom, nbytes(copies[0]))
            if (out, bits, tokens) == (12288, 4, 1):
                report.add("stock MLX", MATVEC, nbytes(copies[0]) / stock / 1e3)
                report.add("our MLX kernels", MATVEC, nbytes(copies[0]) / custom / 1e3)
    sizes = ((512, 8), (1, 8), (512, 4), (512, 4))
    sets = [[random_matrix((out, 2048), bits, dtype, f"{out} {i}") for out, bits in sizes] for i in range(16)]
    mine = [BatchedMatvec(launcher, s, dtype) for s in sets]
    x = mx.random.normal((1, 2048)).astype(dtype)
    stock = microseconds(lambda n: [w.apply(x) for i in range(n) for w in sets[i % 16]], 64)
    custom = microseconds(lambda n: [mine[i % 16](x) for i in range(n)], 64)
    row("router + shared gates + up, 8|8|4|4 bits (no chain)", stock, custom, nbytes(*sets[0]))


def _mixture(report: Report, launcher: Launcher, dtype: mx.Dtype) -> None:
    count, top_k, size, hidden = 512, 10, 2048, 512

    def feed_forward(*lead: int) -> QuantizedMlp:
        wide, narrow = (*lead, hidden, size), (*lead, size, hidden)
        return QuantizedMlp(*(random_matrix(s, 4, dtype, f"{s}") for s in (wide, wide, narrow)))

    stacks = [(feed_forward(count), feed_forward()) for _ in range(3)]
    ours = [Experts(launcher, e, s, dtype, gated=True) for e, s in stacks]
    for tokens in (1, 4, 16):
        chosen = mx.random.randint(0, count, (tokens, top_k)).astype(mx.uint32)
        weights = mx.full((tokens, top_k), 0.1)
        logit = mx.zeros((tokens, 1), dtype)
        x = mx.random.normal((tokens, size)).astype(dtype)

        given = (chosen, weights, logit)

        def stock(n: int, x: mx.array = x, given: Any = given) -> mx.array:
            for i in range(n):
                x = _stock_mixture(*stacks[i % 3], x, *given)
            return x

        def custom(n: int, x: mx.array = x, given: Any = given) -> mx.array:
            for i in range(n):
                x = ours[i % 3](x, *given)
            return x

        each = nbytes(stacks[0][0].gate, stacks[0][0].up, stacks[0][0].down) // count
        distinct = len(set(np.array(chosen).flatten().tolist()))
        needed = each * distinct + nbytes(stacks[0][1].gate, stacks[0][1].up, stacks[0][1].down)
        times = microseconds(stock, 24), microseconds(custom, 24)
        row(f"top 10 of 512 experts + shared, {tokens} tokens", *times, needed)
        if tokens == 1:
            report.add("stock MLX", EXPERTS, times[0])
            report.add("our MLX kernels", EXPERTS, times[1])


def _stock_mixture(
    experts: QuantizedMlp, shared: QuantizedMlp, x: mx.array, chosen: mx.array, weights: mx.array, logit: mx.array
) -> mx.array:
    g, u = (w.gather(x[:, None, None], chosen, ordered=False) for w in (experts.gate, experts.up))
    y = experts.down.gather(g * mx.sigmoid(g) * u, chosen, ordered=False).squeeze(-2)
    g, u = shared.gate.apply(x), shared.up.apply(x)
    z = shared.down.apply(g * mx.sigmoid(g) * u)
    return (y * weights[..., None].astype(y.dtype)).sum(axis=1) + mx.sigmoid(logit) * z


def _small(report: Report, launcher: Launcher, dtype: mx.Dtype) -> None:
    logits = mx.random.normal((1, 512)).astype(dtype)
    route = Router(launcher, 10, normalize=True)

    def stock_route(n: int) -> list[mx.array]:
        outs = []
        for i in range(n):
            scores = (logits + i).astype(mx.float32)
            chosen = mx.argsort(-scores, axis=-1)[:, :10]
            weights = mx.take_along_axis(mx.softmax(scores, axis=-1), chosen, axis=-1)
            outs.append(weights / weights.sum(axis=-1, keepdims=True))
        return outs

    custom = microseconds(lambda n: [route(logits + i)[1] for i in range(n)], 200)
    row("router: softmax, top 10 of 512 (no chain, and an add)", microseconds(stock_route, 200), custom, 0)

    x, weight = mx.random.normal((1, 2048)).astype(dtype), mx.ones((2048,), dtype)
    add_norm = AddNorm(launcher, weight, 1e-6)

    def chain(n: int, apply: Callable[[mx.array, mx.array], tuple[mx.array, mx.array]]) -> mx.array:
        a, b = x, x
        for _ in range(n):
            a, b = apply(a, b)
        return b

    def stock_norm(a: mx.array, b: mx.array) -> tuple[mx.array, mx.array]:
        total = a + b
        return total, mx.fast.rms_norm(total, weight, 1e-6)

    row(
        "add and norm, 2048",
        microseconds(lambda n: chain(n, stock_norm), 200),
        microseconds(lambda n: chain(n, add_norm), 200),
        0,
    )


def _delta(report: Report, launcher: Launcher, dtype: mx.Dtype) -> None:
    graph = program(config(1))
    node = graph.gated_deltas[0]
    cache = CacheConfig(blocks=1, block_size=16, state_slots=4)
    weights: Any = RandomWeights(dtype)
    pool = StatePool(node.spec, cache, dtype)
    binding: Any = SimpleNamespace(weights=weights, kv_pools=(), state_pools=(pool,))
    stock = STOCK[ops.GatedDelta](node, binding)
    decode = DeltaStep(launcher, node, stock)  # type: ignore[arg-type]
    prefill = PrefillDelta(launcher, node, stock) if launcher.language == "metal" else None  # type: ignore[arg-type]
    for sequences, new in ((1, 1), (4, 1), (1, 512)):
        advance: Any = decode if new == 1 else prefill
        if advance is None:
            continue
        rows = sequences * new
        values = {
            column.value.index: mx.random.normal((rows, column.value.dim)).astype(dtype)
            for column in (node.q, node.k, node.v, node.z, node.b, node.a)
        }
        group: Any = SimpleNamespace(
            slots=tuple(range(sequences)), new=new, rows=slice(0, rows), continued=None, context=new
        )
        step: Any = SimpleNamespace(groups=[group], tokens=mx.zeros((rows,), mx.int32))

        def stock_run(n: int, values: Any = values, step: Any = step) -> list[mx.array]:
            for _ in range(n):
                stock(step, values)
            return [values[node.out.index], *pool.arrays()]

        def custom_run(n: int, values: Any = values, group: Any = group, advance: Any = advance) -> list[mx.array]:
            conv, memory = pool.read(group)
            for _ in range(n):
                out, conv, memory = advance(values, group, conv, memory)
            pool.write(group, conv, memory)
            return [out, conv, memory]

        moved = 2 * 4 * sequences * node.spec.value_heads * node.spec.value_dim * node.spec.key_dim if new == 1 else 0
        name = f"gated delta, {sequences} sequences, {new} tokens each"
        row(name, microseconds(stock_run, 16), microseconds(custom_run, 16), moved)
