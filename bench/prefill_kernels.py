"""The CUDA prefill kernels at the sizes of Qwen3-Coder-Next, beside their floors: `python -m bench.prefill_kernels`.

Random weights. Each launch is timed as a graph of its repetitions; a floor is the larger of the bytes it must move at
4.0 TB/s and its products at 790 TFLOP/s, as one H200 was measured.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from bench.gpu_shapes import config, shapes_only
from mixbit.kernels import ops
from mixbit.kernels.cuda.compiler import Compiler, Source
from mixbit.kernels.cuda.driver import Buffer, Device, Launch, Module
from mixbit.kernels.cuda.prefill import F32, Format, Plan, Tables, Weights
from mixbit.kernels.cuda.prefill_attention import AttentionPlaces, PrefillAttention
from mixbit.kernels.cuda.prefill_delta import DeltaPlaces, DeltaScratch, PrefillDelta
from mixbit.kernels.cuda.prefill_linear import Linear, Output
from mixbit.kernels.cuda.prefill_moe import MlpWeights, Moe, MoeScratch
from mixbit.kernels.cuda.prefill_rows import AddNorm
from mixbit.kernels.executor import Batch
from mixbit.kernels.ops import AttentionSpec, Columns, GatedDeltaSpec, MlpSpec, MoeSpec, Norm, ProgramBuilder
from mixbit.kernels.spec import DenseTensor

BANDWIDTH, RATE = 4.0e12, 790e12
BLOCK_SIZE = 32
SIZES = config()
HIDDEN, EXPERTS, TOP_K, FFN = (
    SIZES[name] for name in ("hidden_size", "num_experts", "num_experts_per_tok", "moe_intermediate_size")
)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class Bench:
    """A device with random arrays, and times by kernel."""

    def __init__(self) -> None:
        self.device, self.rng = Device(0), np.random.default_rng(0)
        self.compiler = Compiler(self.device.arch)
        self.modules: dict[Source, Module] = {}
        self.micros: defaultdict[str, float] = defaultdict(float)

    def load(self, sources: Sequence[Source]) -> dict[Source, Module]:
        missing = [source for source in dict.fromkeys(sources) if source not in self.modules]
        for source, cubin in zip(missing, self.compiler.compile(missing), strict=True):
            self.modules[source] = self.device.load(cubin)
        return self.modules

    def room(self, *shape: int, itemsize: int = 2) -> Buffer:
        return self.device.alloc(int(np.prod(shape)) * itemsize)

    def values(self, *shape: int, dtype: Any = BFLOAT16) -> Buffer:
        return self.device.put(self.rng.standard_normal(shape, np.float32).astype(dtype))

    def weights(self, *shape: int, bits: int = 4) -> Weights:
        """[..., rows, depth] of normal size, in groups of 64 with bfloat16 scales."""
        *lead, rows, depth = shape
        count, groups = int(np.prod(shape)), (*lead, rows, depth // 64)
        codes = self.device.put(self.rng.integers(0, 1 << 32, count * bits // 32, np.uint32))
        reach = (3 / depth) ** 0.5
        scales = self.device.put(np.full(groups, 2 * reach / (2**bits - 1), BFLOAT16))
        return Weights(
            codes, scales, self.device.put(np.full(groups, -reach, BFLOAT16)), Format(bits, 64, 0), rows, depth
        )

    def time(
        self, label: str, launches: Sequence[Launch], *, work: Sequence[tuple[float, float]] = (), repeat: int = 10
    ) -> None:
        """Print each launch's time; work: (bytes, operations) of each, or nothing."""
        self.device.launch(*launches)
        self.device.synchronize()
        previous = 0.0
        for i, launch in enumerate(launches):
            # The scatter moves what the scan has set, and cannot be repeated without it.
            lead = [launches[i - 1]] if launch.kernel.name == "prefill_scatter" else []
            graph = self.device.capture([*lead, launch] * repeat)
            replay = partial(self.device.replay, graph)
            micros = min(self.device.milliseconds(replay) for _ in range(3)) * 1e3 / repeat
            micros -= previous if lead else 0
            previous = micros
            name = f"{label}: {launch.kernel.name.removeprefix('prefill_')}"
            self.micros[label] += micros
            nbytes, operations = work[i] if i < len(work) else (0, 0)
            floor = max(nbytes / BANDWIDTH, operations / RATE) * 1e6
            rates = f"{operations / micros * 1e-6:5.0f} TFLOP/s {nbytes / micros * 1e-3:6.0f} GB/s"
            rate = f"floor {floor:7.1f}  {micros / floor:5.1f} x  {rates}" if floor else ""
            print(f"  {name:40} {micros:8.1f} us  {rate}", flush=True)


def batch_of(tokens: int) -> Batch:
    blocks = -(-tokens // BLOCK_SIZE)
    one = np.array([0], np.int32)
    return Batch(
        np.zeros(tokens, np.int32),
        np.array([0, tokens], np.int32),
        one,
        np.random.default_rng(1).permutation(blocks).astype(np.int32)[None],
        one,
        np.array([tokens - 1], np.int32),
    )


def tables_of(bench: Bench, batch: Batch) -> tuple[Tables, Plan]:
    plan, put = Plan.of(batch), bench.device.put
    parts = (plan.chunks, plan.first_chunks, plan.tiles, batch.query_starts, batch.context_lengths, batch.state_slots)
    width = np.array([batch.block_tables.shape[1]], np.int32)
    return Tables(*(put(part) for part in parts), put(batch.block_tables), put(width)), plan


def vector(size: int, *more: int) -> DenseTensor:
    return DenseTensor("", np.zeros((size, *more), np.float32))


def linear(bench: Bench, label: str, tokens: int, depth: int, sizes: Sequence[tuple[int, int]]) -> None:
    """sizes: (rows, bits) of each matrix."""
    x = bench.values(tokens, depth)
    made = Linear(
        bench.device,
        x,
        [
            Output(bench.weights(rows, depth, bits=bits), bench.room(tokens, rows, itemsize=4), F32 if bits == 8 else 0)
            for rows, bits in sizes
        ],
    )
    rows = sum(n for n, _ in sizes)
    nbytes = sum(n * depth * (bits + 0.5) / 8 for n, bits in sizes) + tokens * (depth + rows) * 2
    bench.time(label, made.launches(bench.load(made.sources), tokens), work=[(nbytes, 2.0 * tokens * depth * rows)])


def feed_forward(*stack: int) -> MlpSpec:
    wide, narrow = (*stack, FFN, HIDDEN), (*stack, HIDDEN, FFN)
    return MlpSpec(*(shapes_only("", shape, 4) for shape in (wide, wide, narrow)))


def moe(bench: Bench, tokens: int) -> None:
    spec = MoeSpec(
        shapes_only("router", (EXPERTS, HIDDEN), 8),
        feed_forward(EXPERTS),
        TOP_K,
        True,
        feed_forward(),
        shapes_only("shared gate", (1, HIDDEN), 8),
    )
    weights = bench.weights

    def mlp(*stack: int) -> MlpWeights:
        return MlpWeights(weights(*stack, FFN, HIDDEN), weights(*stack, FFN, HIDDEN), weights(*stack, HIDDEN, FFN))

    scratch = MoeScratch(bench.device, spec, tokens)
    made = Moe(
        bench.device,
        spec,
        weights(EXPERTS, HIDDEN, bits=8),
        mlp(EXPERTS),
        mlp(),
        weights(1, HIDDEN, bits=8),
        scratch,
        bench.values(tokens, HIDDEN),
        bench.room(tokens, HIDDEN),
    )
    launches = made.launches(bench.load(made.sources), tokens)
    pairs, product = tokens * TOP_K, 2.0 * FFN * HIDDEN
    bench.device.launch(*launches)
    chosen = np.empty(pairs, np.int32)
    scratch.experts.download(chosen)
    counts = np.bincount(chosen, minlength=EXPERTS)
    print(f"  tokens of an expert: {counts.min()} to {counts.max()}, mean {counts.mean():.0f}")
    used = int((counts > 0).sum()) * FFN * HIDDEN * 4.5 / 8  # bytes of one of three stacks
    work = [
        (tokens * HIDDEN * 2 + EXPERTS * HIDDEN * 8.5 / 8, 2.0 * tokens * EXPERTS * HIDDEN),
        (tokens * EXPERTS * 4, 0),
        (pairs * 4, 0),
        (pairs * 12, 0),
        (2 * used + tokens * HIDDEN * 2 + pairs * FFN * 2, 2 * product * pairs),
        (used + pairs * (FFN + HIDDEN) * 2, product * pairs),
        (tokens * (HIDDEN + FFN) * 2, 2 * product * tokens),
        (tokens * (HIDDEN + FFN) * 2, product * tokens),
        ((pairs + 2 * tokens) * HIDDEN * 2, 0),
    ]
    bench.time("moe", launches, work=work)


def delta(bench: Bench, tokens: int) -> None:
    heads, value_heads = SIZES["linear_num_key_heads"], SIZES["linear_num_value_heads"]
    dim = SIZES["linear_key_head_dim"]
    channels, fused = 2 * heads * dim + value_heads * dim, 2 * dim + 4 * dim
    linear(bench, "delta", tokens, HIDDEN, [(heads * fused, 4), (2 * value_heads, 4)])
    spec = GatedDeltaSpec(
        heads,
        value_heads,
        dim,
        dim,
        vector(channels, 4),
        vector(value_heads),
        vector(value_heads),
        Norm(vector(dim), 1e-6),
    )
    builder = ProgramBuilder()
    qkvz, ba = builder.embed(vector(1, heads * fused)), builder.embed(vector(1, 2 * value_heads))
    columns = [Columns(qkvz, start, fused) for start in (0, dim, 2 * dim, 4 * dim)]
    builder.gated_delta(*columns, Columns(ba, 0, 4), Columns(ba, 2, 4), spec)
    (node,) = (node for node in builder._nodes if isinstance(node, ops.GatedDelta))
    tables, plan = tables_of(bench, batch_of(tokens))
    big, small = bench.values(tokens, heads * fused), bench.values(tokens, 2 * value_heads)
    f32 = np.float32
    places = DeltaPlaces(
        *[big] * 4,
        *[small] * 2,
        bench.values(channels, 4, dtype=f32),
        bench.device.put(np.full(value_heads, -1, f32)),
        bench.values(value_heads, dtype=f32),
        bench.values(dim, dtype=f32),
        bench.room(2, 3, channels),
        bench.room(2, value_heads, dim, dim, itemsize=4),
        bench.room(tokens, value_heads * dim),
    )
    made = PrefillDelta(node, places, DeltaScratch(bench.device, spec, tokens, 2), tables, "bfloat16")
    row = 2.0 * tokens
    pieces = tokens / 64 * value_heads
    work = [
        (2 * row * channels, 0),
        (6 * channels, 0),
        (row * channels + pieces * 40.5e3, pieces * 2 * 64 * 64 * dim * 4),
        (row * channels + pieces * 40.5e3, pieces * 2 * 64 * dim * (3 * dim + 64)),
        (3 * row * value_heads * dim, 0),
    ]
    bench.time("delta", made.launches(bench.load(made.sources), plan.size), work=work)
    linear(bench, "delta", tokens, value_heads * dim, [(HIDDEN, 4)])


def attention(bench: Bench, tokens: int) -> None:
    heads, kv_heads, dim = (SIZES[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    linear(bench, "attention", tokens, HIDDEN, [(heads * 2 * dim, 4), (kv_heads * dim, 4), (kv_heads * dim, 4)])
    norm = Norm(vector(dim), 1e-6)
    spec = AttentionSpec(heads, kv_heads, dim, dim**-0.5, ops.Rope(np.ones(32, np.float32)), norm, norm)
    builder = ProgramBuilder()
    q, k, v = (builder.embed(vector(1, n * dim)) for n in (2 * heads, kv_heads, kv_heads))
    builder.attention(Columns(q, 0, 2 * dim), Columns(k, 0, dim), Columns(v, 0, dim), spec, Columns(q, dim, 2 * dim))
    (node,) = (node for node in builder._nodes if isinstance(node, ops.Attention))
    tables, plan = tables_of(bench, batch_of(tokens))
    wide, keys, values = (bench.values(tokens, n * dim) for n in (2 * heads, kv_heads, kv_heads))
    parameters = [bench.values(n, dtype=np.float32) for n in (dim, dim, 32)]
    pools = [bench.room(tokens + BLOCK_SIZE, kv_heads, dim) for _ in range(2)]
    rows = [bench.room(tokens, heads * dim) for _ in range(2)]
    made = PrefillAttention(
        node, BLOCK_SIZE, AttentionPlaces(wide, keys, values, wide, *parameters, *pools, *rows), tables
    )
    row = 2.0 * tokens * dim
    work = [
        (row * (2 * heads + 4 * kv_heads), 0),
        (row * (3 * heads + 2 * kv_heads), 2.0 * tokens * tokens * heads * dim),
    ]
    bench.time("attention", made.launches(bench.load(made.sources), plan.size), work=work)
    linear(bench, "attention", tokens, heads * dim, [(HIDDEN, 4)])


def norm(bench: Bench, tokens: int) -> None:
    x, added, total, out = (bench.values(tokens, HIDDEN) for _ in range(4))
    made = AddNorm(HIDDEN, 1e-6, x, bench.values(HIDDEN, dtype=np.float32), out, added, total)
    bench.time("norm", made.launches(bench.load(made.sources), tokens), work=[(8.0 * tokens * HIDDEN, 0)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048])
    for tokens in parser.parse_args().tokens:
        bench = Bench()
        print(f"{bench.device.name}, {tokens} tokens:")
        for part in (delta, attention, moe, norm):
            try:
                part(bench, tokens)
            except Exception as problem:
                print(f"  {part.__name__}: {problem}")
                raise
        counts = {"delta": 36, "attention": 12, "moe": 48, "norm": 97}
        for name, micros in bench.micros.items():
            print(f"  {counts[name]:3} x {name:10} {micros:8.1f} us = {counts[name] * micros / 1e3:7.2f} ms")
        whole = sum(counts[name] * micros for name, micros in bench.micros.items())
        print(f"  48 layers: {whole / 1e3:.1f} ms, {tokens / whole * 1e6:,.0f} tokens a second")


if __name__ == "__main__":
    main()
