"""The prefill kernels beside the NumPy reference, on a CUDA device: each case gives a relative error.

`python -m tests.kernels.cuda.prefill_cases [name ...]` runs them without pytest, each group in a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from mixbit.kernels import ops
from mixbit.kernels.cuda import prefill_attention, prefill_delta, prefill_linear, prefill_moe, prefill_rows
from mixbit.kernels.cuda.compiler import Compiler, Source
from mixbit.kernels.cuda.driver import Buffer, Device, Launch, Module
from mixbit.kernels.cuda.prefill import F32, Format, Plan, Tables, Weights
from mixbit.kernels.executor import Batch, CacheConfig
from mixbit.kernels.ops import AttentionSpec, Columns, MlpSpec, ProgramBuilder
from mixbit.kernels.reference.attention import KvPool, attention
from mixbit.kernels.reference.backend import heads_of
from mixbit.kernels.reference.gated_delta import StatePool, gated_delta
from mixbit.kernels.reference.matrix import batch_matvec
from mixbit.kernels.reference.mlp import mlp
from mixbit.kernels.reference.moe import moe, route
from mixbit.kernels.reference.norm import rms_norm
from mixbit.kernels.spec import BatchMatvecSpec, DenseTensor, Matrix, QuantizedTensor
from tests.kernels.builders import Sequences, Tensors

Array = npt.NDArray[Any]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
POISON = 0x7FC07FC0  # NaN, in float32 and bfloat16


class Rig:
    """A device, and what has been compiled for it."""

    def __init__(self) -> None:
        self.device = Device(0)
        self.compiler = Compiler(self.device.arch)
        self.modules: dict[Source, Module] = {}

    def load(self, sources: Sequence[Source]) -> dict[Source, Module]:
        """Compile and load what is missing."""
        missing = [source for source in dict.fromkeys(sources) if source not in self.modules]
        for source, cubin in zip(missing, self.compiler.compile(missing), strict=True):
            self.modules[source] = self.device.load(cubin)
        return self.modules

    def run(self, launches: Sequence[Launch]) -> None:
        """Run and wait."""
        self.device.launch(*launches)
        self.device.synchronize()

    def put(self, x: Array) -> Buffer:
        """Activations, as bfloat16."""
        return self.device.put(x.astype(BFLOAT16))

    def exact(self, x: Array) -> Buffer:
        """Parameters, as float32."""
        return self.device.put(x.astype(np.float32))

    def room(self, *shape: int, itemsize: int = 2) -> Buffer:
        """Poisoned memory."""
        buffer = self.device.alloc(max(16, int(np.prod(shape)) * itemsize + 4))
        buffer.fill(POISON)
        return buffer

    def get(self, buffer: Buffer, *shape: int, dtype: Any = BFLOAT16) -> npt.NDArray[np.float32]:
        """An array from the device."""
        out = np.empty(shape, dtype)
        buffer.download(out)
        return out.astype(np.float32)

    def weights(self, matrix: Matrix) -> Weights:
        """A matrix as it lies in a checkpoint."""
        form = Format.of(matrix)
        if isinstance(matrix, QuantizedTensor):
            parts = [self.device.put(part) for part in (matrix.weight, matrix.scales, matrix.biases)]
            return Weights(parts[0], parts[1], parts[2], form, matrix.out_dim, matrix.in_dim)
        return Weights(self.device.put(matrix.data), None, None, form, matrix.out_dim, matrix.in_dim)

    def mlp(self, spec: MlpSpec) -> prefill_moe.MlpWeights:
        """A feed-forward's matrices."""
        return prefill_moe.MlpWeights(*(self.weights(matrix) for matrix in (spec.gate, spec.up, spec.down)))

    def tables(self, batch: Batch) -> tuple[Tables, Plan]:
        """The tables of a batch."""
        plan, put = Plan.of(batch), self.device.put
        return Tables(
            chunks=put(plan.chunks),
            first_chunks=put(plan.first_chunks),
            tiles=put(plan.tiles),
            query_starts=put(batch.query_starts),
            context_lengths=put(batch.context_lengths),
            state_slots=put(batch.state_slots),
            block_tables=put(batch.block_tables),
            table_length=put(np.array([batch.block_tables.shape[1]], np.int32)),
        ), plan


def rounded(x: Array) -> npt.NDArray[np.float32]:
    """As bfloat16 holds it."""
    return x.astype(BFLOAT16).astype(np.float32)


def error(got: Array, want: Array) -> float:
    """Relative error; infinite where a value is not finite."""
    if not np.isfinite(got).all():
        return float("inf")
    return float(np.linalg.norm(got - want) / max(float(np.linalg.norm(want)), 1e-20))


def linear_case(rig: Rig, tokens: int, depth: int, matrices: Sequence[tuple[Matrix, bool]], seed: int = 0) -> float:
    """The worst error of matrices that share x; the second of each pair: with a bias vector and float32 results."""
    tensors = Tensors(seed + 100)
    x = rounded(tensors.values(tokens, depth))
    specs = [BatchMatvecSpec(m, tensors.dense(m.out_dim, scale=1.0) if more else None) for m, more in matrices]
    outs = [rig.room(tokens, spec.out_dim, itemsize=4) for spec in specs]
    outputs = []
    for spec, out in zip(specs, outs, strict=True):
        if spec.bias is None:
            outputs.append(prefill_linear.Output(rig.weights(spec.matrix), out))
        else:
            bias = rig.exact(spec.bias.data)
            outputs.append(prefill_linear.Output(rig.weights(spec.matrix), out, F32, bias, F32))
    linear = prefill_linear.Linear(rig.device, rig.put(x), outputs)
    want = batch_matvec(tuple(specs), x)
    worst = 0.0
    for block in linear._blocks:  # every shape of block, not only the one that suits so few multiprocessors
        linear._blocks = [block]
        for out in outs:
            out.fill(POISON)
        rig.run(linear.launches(rig.load([linear._source(block)]), tokens))
        for out, expected, (_, more) in zip(outs, want, matrices, strict=True):
            dtype = np.float32 if more else BFLOAT16
            worst = max(worst, error(rig.get(out, *expected.shape, dtype=dtype), expected))
    return worst


def linear_cases() -> Iterator[tuple[str, Callable[[Rig], float]]]:
    """Every width, group size and dtype; sizes off the tiles."""
    for bits in (1, 2, 3, 4, 5, 6, 8, None):
        for group, dtype in ((32, "float32"), (64, "bfloat16"), (128, "float16")):
            if bits == 1 and dtype != "bfloat16":
                continue

            def one(rig: Rig, bits: int | None = bits, group: int = group, dtype: str = dtype) -> float:
                matrix = Tensors(bits or 0).matrix(200, 384, bits=bits, group_size=group, dtype=dtype)
                return linear_case(rig, 150, 384, [(matrix, False)])

            yield f"linear {bits} bits group {group} {dtype}", one
    for tokens, depth in ((9, 96), (65, 32), (300, 224), (40, 2080)):

        def several(rig: Rig, tokens: int = tokens, depth: int = depth) -> float:
            tensors = Tensors(tokens)
            made = [(513, 8), (1, 8), (40, 4), (130, None), (7, 4)]
            matrices = [
                (tensors.matrix(n, depth, bits=b, dtype="bfloat16"), i % 2 == 1) for i, (n, b) in enumerate(made)
            ]
            return linear_case(rig, tokens, depth, matrices)

        yield f"linear together {tokens} x {depth}", several


def mlp_case(rig: Rig, tokens: int, dim: int, hidden: int, bits: int | None) -> float:
    """SwiGLU, with every shape of block."""
    tensors = Tensors(tokens)
    spec, x = tensors.mlp(dim, hidden, bits=bits), rounded(tensors.values(tokens, dim))
    out = rig.room(tokens, dim)
    made = prefill_moe.Mlp(rig.device, rig.mlp(spec), rig.put(x), rig.room(tokens, hidden), out)
    blocks, worst = made._blocks, 0.0
    for block in blocks:
        made._blocks = [block]
        out.fill(POISON)
        rig.run(made.launches(rig.load(made.sources), tokens))
        worst = max(worst, error(rig.get(out, tokens, dim), mlp(spec, x)))
    return worst


def moe_case(rig: Rig, tokens: int, **sizes: Any) -> float:
    """A mixture; tokens whose choice of experts hangs on rounding are told apart by the reference's own router."""
    tensors = Tensors(tokens)
    spec = tensors.moe(**sizes)
    x = rounded(tensors.values(tokens, spec.router.in_dim))
    out, scratch = rig.room(tokens, spec.router.in_dim), prefill_moe.MoeScratch(rig.device, spec, tokens)
    made = prefill_moe.Moe(
        rig.device,
        spec,
        rig.weights(spec.router),
        rig.mlp(spec.experts),
        None if spec.shared is None else rig.mlp(spec.shared),
        None if spec.shared_gate is None else rig.weights(spec.shared_gate),
        scratch,
        rig.put(x),
        out,
    )
    rig.run(made.launches(rig.load(made.sources), tokens))
    chosen = rig.get(scratch.experts, tokens, spec.top_k, dtype=np.int32)
    same = (np.sort(chosen, axis=1) == np.sort(route(spec, x)[0], axis=1)).all(axis=1)
    if same.mean() < 0.9:
        return float("inf")
    return error(rig.get(out, tokens, spec.router.in_dim)[same], moe(spec, x)[same])


def route_case(rig: Rig, experts: int, top_k: int, normalize: bool) -> float:
    """Many equal logits: the lower expert first, in the reference's order."""
    tokens, rng = 37, np.random.default_rng(experts)
    logits = rng.integers(-2, 3, (tokens, experts)).astype(np.float32)
    logits[1] = 0
    chosen, weights = rig.room(tokens, top_k, itemsize=4), rig.room(tokens, top_k, itemsize=4)
    source = Source("prefill_moe.cu", (f"EXPERTS {experts}", "BM 64"))
    kernel = rig.load([source])[source].function("prefill_route")
    arguments = (rig.exact(logits), chosen, weights, np.int32(tokens), np.int32(top_k), np.int32(normalize))
    rig.run([Launch(kernel, (10, 1, 1), (128, 1, 1), arguments)])
    best = np.argsort(-logits, axis=-1, kind="stable")[:, :top_k]
    if (rig.get(chosen, tokens, top_k, dtype=np.int32) != best).any():
        return float("inf")
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    want = np.take_along_axis(powers / powers.sum(axis=1, keepdims=True), best, axis=1)
    if normalize:
        want = want / want.sum(axis=1, keepdims=True)
    return error(rig.get(weights, tokens, top_k, dtype=np.float32), want)


def mixture_cases() -> Iterator[tuple[str, Callable[[Rig], float]]]:
    """Feed-forwards, mixtures, routers."""
    yield "mlp 4 bits", lambda rig: mlp_case(rig, 200, 256, 160, 4)
    yield "mlp 5 bits, 9 tokens", lambda rig: mlp_case(rig, 9, 64, 32, 5)
    yield "mlp dense", lambda rig: mlp_case(rig, 130, 96, 288, None)
    yield "moe", lambda rig: moe_case(rig, 150, dim=256, hidden=128, experts=16, top_k=4)
    yield "moe of 40 experts, 6 bits", lambda rig: moe_case(rig, 333, dim=96, hidden=64, experts=40, top_k=6, bits=6)
    yield "moe of few tokens", lambda rig: moe_case(rig, 9, dim=64, hidden=32, experts=100, top_k=2, normalize=False)
    yield "moe without a shared expert", lambda rig: moe_case(rig, 70, experts=4, top_k=1, shared=False)
    yield "moe without a shared gate", lambda rig: moe_case(rig, 70, bits=8, shared_gate=False)
    yield "moe dense", lambda rig: moe_case(rig, 80, bits=None, router_bits=None)
    yield "moe of one crowd", lambda rig: moe_case(rig, 300, experts=2, top_k=2, bits=3)
    for experts, top_k, normalize in ((512, 10, True), (33, 33, False), (8, 2, True), (1, 1, True), (1100, 40, True)):

        def ties(rig: Rig, experts: int = experts, top_k: int = top_k, normalize: bool = normalize) -> float:
            return route_case(rig, experts, top_k, normalize)

        yield f"route {top_k} of {experts}", ties


def run_node(builder: ProgramBuilder, kind: type[ops.Node]) -> Any:
    """The only node of its kind that a builder has recorded."""
    (node,) = (node for node in builder._nodes if isinstance(node, kind))
    return node


def delta_case(
    rig: Rig, heads: tuple[int, int], dims: tuple[int, int], steps: Sequence[dict[int, int]], **how: Any
) -> float:
    """The worst error of outputs and states over steps of several sequences, each with so many new tokens."""
    kernel, fused, conv_dtype = how.get("kernel", 4), how.get("fused", True), how.get("conv_dtype", "bfloat16")
    tensors, (key_heads, value_heads), (key_dim, value_dim) = Tensors(3), heads, dims
    ratio = value_heads // key_heads
    spec = ops.GatedDeltaSpec(
        key_heads=key_heads,
        value_heads=value_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        conv=tensors.dense(2 * key_heads * key_dim + value_heads * value_dim, kernel),
        a_log=tensors.dense(value_heads, scale=1.0),
        dt_bias=tensors.dense(value_heads, scale=1.0),
        norm=tensors.norm(value_dim),
    )
    widths = [key_dim] * 2 + [ratio * value_dim] * 2 + [ratio] * 2
    starts = np.cumsum([0, *widths])
    row = int(starts[-1]) * key_heads
    builder = ProgramBuilder()
    x = builder.embed(DenseTensor("rows", np.zeros((1, row), np.float32)))
    if fused:
        places = [Columns(x, int(start), int(starts[-1])) for start in starts[:-1]]
    else:
        places = [Columns(x, int(start) * key_heads, width) for start, width in zip(starts, widths, strict=False)]
    builder.gated_delta(places[0], places[1], places[2], places[3], places[4], places[5], spec)
    node = run_node(builder, ops.GatedDelta)
    cache_config = CacheConfig(blocks=200, block_size=64, state_slots=6)
    sequences, reference = Sequences(cache_config, count=4), StatePool.zeros(spec, cache_config)
    conv = rig.device.put(np.full(reference.conv.shape, 7, BFLOAT16 if conv_dtype == "bfloat16" else np.float32))
    memory = rig.exact(np.full(reference.memory.shape, 7))
    most = max(sum(step.values()) for step in steps)
    scratch = prefill_delta.DeltaScratch(rig.device, spec, most, 4)
    rate = -np.exp(spec.a_log.data.astype(np.float32))
    parameters = [rig.exact(array) for array in (spec.conv.data, rate, spec.dt_bias.data, spec.norm.weight.data)]
    worst = 0.0
    for step in steps:
        batch = sequences.step({s: range(n) for s, n in step.items()})
        tokens = len(batch.tokens)
        values = rounded(tensors.values(tokens, row))
        on_device, out = rig.put(values), rig.room(tokens, value_heads * value_dim)
        tables, plan = rig.tables(batch)
        at: dict[str, Any] = dict.fromkeys(("q", "k", "v", "z", "b", "a"), on_device)
        at |= dict(zip(("taps", "rate", "dt_bias", "norm"), parameters, strict=True))
        where = prefill_delta.DeltaPlaces(**at, conv=conv, memory=memory, out=out)
        layer = prefill_delta.PrefillDelta(node, where, scratch, tables, conv_dtype)
        rig.run(layer.launches(rig.load(layer.sources), plan.size))
        parts = [
            heads_of(place, {x: values}, key_heads, width).reshape(tokens, -1, last)
            for place, width, last in zip(places, widths, (key_dim, key_dim, value_dim, value_dim, 1, 1), strict=True)
        ]
        q, k, v, z = parts[:4]
        b, a = (part.reshape(tokens, value_heads) for part in parts[4:])
        want = gated_delta(spec, q, k, v, z, b, a, reference, batch)
        worst = max(worst, error(rig.get(out, *want.shape), want))
        slots = batch.state_slots
        dtype = BFLOAT16 if conv_dtype == "bfloat16" else np.float32
        worst = max(worst, error(rig.get(conv, *reference.conv.shape, dtype=dtype)[slots], reference.conv[slots]))
        worst = max(
            worst, error(rig.get(memory, *reference.memory.shape, dtype=np.float32)[slots], reference.memory[slots])
        )
    return worst


def delta_cases() -> Iterator[tuple[str, Callable[[Rig], float]]]:
    """Chunked gated delta rule."""
    steps: list[dict[int, int]] = [{0: 70}, {1: 1, 0: 2, 2: 130}, {0: 64, 1: 63}, {2: 200, 3: 5, 1: 3}, {0: 1, 1: 1}]
    yield "delta as in the real model", lambda rig: delta_case(rig, (2, 4), (128, 128), steps)
    yield "delta, separate columns", lambda rig: delta_case(rig, (2, 4), (128, 128), steps, fused=False)
    yield "delta, other sizes", lambda rig: delta_case(rig, (2, 6), (32, 48), steps, conv_dtype="float32")
    yield "delta, one to one, kernel 2", lambda rig: delta_case(rig, (3, 3), (80, 64), steps, kernel=2)
    yield "delta, long", lambda rig: delta_case(rig, (1, 2), (128, 128), [{0: 1500}, {0: 100}], kernel=5)


def attention_case(rig: Rig, heads: tuple[int, int], dim: int, steps: Sequence[dict[int, int]], **how: Any) -> float:
    """As delta_case: the worst error of outputs over steps of several sequences."""
    tensors, (heads_q, heads_kv) = Tensors(5), heads
    half, norms, gated, block_size = (
        how.get("half", dim // 4),
        how.get("norms", True),
        how.get("gated", True),
        how.get("block_size", 16),
    )
    spec = AttentionSpec(
        heads=heads_q,
        kv_heads=heads_kv,
        head_dim=dim,
        scale=dim**-0.5,
        rope=ops.Rope((1e4 ** -(np.arange(half) / half)).astype(np.float32), how.get("rope_scale", 1.0))
        if half
        else None,
        q_norm=tensors.norm(dim) if norms else None,
        k_norm=tensors.norm(dim) if norms else None,
    )
    width = 2 * dim if gated else dim
    row = heads_q * width + 2 * heads_kv * dim
    builder = ProgramBuilder()
    x = builder.embed(DenseTensor("rows", np.zeros((1, row), np.float32)))
    q, gate = Columns(x, 0, width), Columns(x, dim, width) if gated else None
    k, v = Columns(x, heads_q * width, dim), Columns(x, heads_q * width + heads_kv * dim, dim)
    builder.attention(q, k, v, spec, gate)
    node = run_node(builder, ops.Attention)
    config = CacheConfig(blocks=-(-4096 // block_size), block_size=block_size, state_slots=4)
    sequences, pool = Sequences(config, count=4), KvPool.zeros(spec, config)
    keys, values_pool = (rig.room(*pool.keys.shape) for _ in range(2))
    norm_weights = [None if norm is None else rig.exact(norm.weight.data) for norm in (spec.q_norm, spec.k_norm)]
    inv_freq = None if spec.rope is None else rig.exact(spec.rope.inv_freq)
    worst = 0.0
    for step in steps:
        batch = sequences.step({s: range(n) for s, n in step.items()})
        tokens = len(batch.tokens)
        values = rounded(tensors.values(tokens, row))
        on_device, out = rig.put(values), rig.room(tokens, heads_q * dim)
        tables, plan = rig.tables(batch)
        places = prefill_attention.AttentionPlaces(
            q=on_device,
            k=on_device,
            v=on_device,
            gate=on_device if gated else None,
            q_norm=norm_weights[0],
            k_norm=norm_weights[1],
            inv_freq=inv_freq,
            keys=keys,
            values=values_pool,
            queries=rig.room(tokens, heads_q * dim),
            out=out,
        )
        layer = prefill_attention.PrefillAttention(node, block_size, places, tables)
        rig.run(layer.launches(rig.load(layer.sources), plan.size))
        parts = [heads_of(c, {x: values}, n, dim) for c, n in ((q, heads_q), (k, heads_kv), (v, heads_kv))]
        gates = None if gate is None else heads_of(gate, {x: values}, heads_q, dim)
        want = attention(spec, parts[0], parts[1], parts[2], gates, pool, batch)
        worst = max(worst, error(rig.get(out, *want.shape), want))
    return worst


def attention_cases() -> Iterator[tuple[str, Callable[[Rig], float]]]:
    """Attention over paged caches."""
    steps: list[dict[int, int]] = [{0: 70}, {1: 1, 0: 2, 2: 130}, {0: 300, 1: 63}, {2: 200, 3: 5, 1: 3}, {0: 1, 1: 1}]
    yield "attention as in the real model", lambda rig: attention_case(rig, (8, 1), 256, steps, half=32, block_size=32)
    yield (
        "attention, 64 wide, plain",
        lambda rig: attention_case(rig, (4, 4), 64, steps, norms=False, gated=False, rope_scale=1.3),
    )
    yield "attention, 128 wide", lambda rig: attention_case(rig, (6, 2), 128, steps, half=64, block_size=4)
    yield "attention, 80 wide", lambda rig: attention_case(rig, (2, 1), 80, steps, half=16)
    yield "attention, 32 wide, no rope", lambda rig: attention_case(rig, (4, 2), 32, steps, half=0)
    yield "attention, long", lambda rig: attention_case(rig, (2, 1), 128, [{0: 900}, {0: 100}])


def norm_case(rig: Rig, rows: int, dim: int, *, add: bool) -> float:
    """The norm, and the sum before it."""
    tensors = Tensors(dim)
    x, delta, norm = rounded(tensors.values(rows, dim)), rounded(tensors.values(rows, dim)), tensors.norm(dim)
    total, out = rig.room(rows, dim), rig.room(rows, dim)
    sums = {"delta": rig.put(delta), "total": total} if add else {}
    made = prefill_rows.AddNorm(dim, norm.eps, rig.put(x), rig.exact(norm.weight.data), out, **sums)
    rig.run(made.launches(rig.load(made.sources), rows))
    want = x + delta if add else x
    worst = error(rig.get(total, rows, dim), want) if add else 0.0
    return max(worst, error(rig.get(out, rows, dim), rms_norm(norm, want)))


def select_case(rig: Rig) -> float:
    """Chosen rows; no error is allowed."""
    x, rows = rounded(Tensors(1).values(30, 72)), np.array([29, 3, 3, 0], np.int32)
    out = rig.room(4, 72)
    made = prefill_rows.Select(72, rig.put(x), rig.device.put(rows), out)
    rig.run(made.launches(rig.load(made.sources), 4))
    return 0.0 if (rig.get(out, 4, 72) == x[rows]).all() else float("inf")


def rows_cases() -> Iterator[tuple[str, Callable[[Rig], float]]]:
    """Row by row."""
    for rows, dim in ((9, 2048), (33, 72), (5, 5120)):
        for add in (True, False):

            def one(rig: Rig, rows: int = rows, dim: int = dim, add: bool = add) -> float:
                return norm_case(rig, rows, dim, add=add)

            yield f"norm {rows} x {dim}{' of a sum' if add else ''}", one
    yield "select", select_case


GROUPS = {
    "linear": linear_cases,
    "mixture": mixture_cases,
    "delta": delta_cases,
    "attention": attention_cases,
    "rows": rows_cases,
}
TOLERANCE = 1e-2  # of sums of products of bfloat16


@cache
def the_rig() -> Rig:
    """One for all cases of a process."""
    return Rig()


def main(names: Sequence[str]) -> None:
    """Run groups of cases and print the errors."""
    if len(names) != 1:
        for name in names or GROUPS:
            command = [sys.executable, "-m", "tests.kernels.cuda.prefill_cases", name]
            try:
                subprocess.run(command, check=False, timeout=100)
            except subprocess.TimeoutExpired:
                print(f"{name}: no end after 100 s", flush=True)
        return
    for name, case in GROUPS[names[0]]():
        try:
            worst = case(the_rig())
            print(f"{'ok  ' if worst < TOLERANCE else 'FAIL'} {name}: {worst:.2e}", flush=True)
        except Exception as problem:
            print(f"FAIL {name}: {type(problem).__name__}: {str(problem)[:300]}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
