"""Our kernels on the host in half types, at sizes of real models, in several orders of threads.

What every backend must do is in tests/kernels; this is what only these kernels have.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mixbit.kernels.executor import CacheConfig, ExecutorOptions
from mixbit.kernels.mlx.custom.experts import QuantizedMlp, Router
from mixbit.kernels.mlx.custom.launch import Launcher, lanes_for
from mixbit.kernels.mlx.custom.matvec import MAX_TOKENS, BatchedMatvec
from mixbit.kernels.mlx.custom.prefill_experts import PrefillExperts
from mixbit.kernels.mlx.custom.sources import source
from mixbit.kernels.mlx.weights import QuantizedWeight, Weights
from mixbit.kernels.ops import AttentionSpec, Columns, MlpSpec, Program, Rope
from mixbit.kernels.reference.matrix import dequantize
from mixbit.kernels.reference.mlp import mlp
from mixbit.kernels.spec import BITS, QuantizedTensor
from tests.kernels.builders import FloatArray, Sequences, Tensors, all_rows, assert_close, program_of
from tests.kernels.conftest import REFERENCE
from tests.metal.backend import HostMetalBackend
from tests.metal.host import HostMetal

HALF_TYPES = {"float16": (mx.float16, 2e-3), "bfloat16": (mx.bfloat16, 2e-2)}


def launcher(seed: int = 0) -> Launcher:
    return Launcher("metal", HostMetal(seed=seed).kernel)


@pytest.fixture(autouse=True)
def _on_cpu() -> None:
    mx.set_default_device(mx.cpu)


def to_float(array: mx.array) -> FloatArray:
    return np.array(array.astype(mx.float32))


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("tokens", [1, 2, 7, MAX_TOKENS + 3])
def test_one_launch_for_matrices_of_all_widths(dtype: str, tokens: int) -> None:
    tensors, (kind, tolerance) = Tensors(seed=tokens), HALF_TYPES[dtype]
    made = [(3, 1, 32), (40, 2, 64), (17, 3, 128), (9, 4, 64), (33, 5, 32), (8, 6, 64), (5, 8, 128)]
    matrices = [tensors.quantized(out, 640, bits=bits, group_size=group, dtype=dtype) for out, bits, group in made]
    weights = [Weights(kind).matrix(matrix) for matrix in matrices]
    host = HostMetal(seed=tokens)
    batched = BatchedMatvec(
        Launcher("metal", host.kernel), [w for w in weights if isinstance(w, QuantizedWeight)], kind
    )
    x = mx.array(tensors.values(tokens, 640)).astype(kind)
    outs = batched(x)
    assert list(host.sources) == ["matvec"]
    for out, matrix in zip(outs, matrices, strict=True):
        assert out.dtype == kind
        assert_close(to_float(out), to_float(x) @ dequantize(matrix).T, tolerance)


def test_accuracy_is_that_of_float32() -> None:
    """Half activations are rounded once, at the end: the sum itself is exact to float32."""
    tensors = Tensors(seed=3)
    matrix: QuantizedTensor = tensors.quantized(64, 4096, bits=4, group_size=64, dtype="bfloat16")
    weight = Weights(mx.bfloat16).matrix(matrix)
    assert isinstance(weight, QuantizedWeight)
    x = mx.array(tensors.values(1, 4096)).astype(mx.bfloat16)
    (out,) = BatchedMatvec(launcher(), [weight], mx.bfloat16)(x)
    exact = (to_float(x).astype(np.float64) @ dequantize(matrix).T.astype(np.float64)).astype(np.float32)
    nearest = to_float(mx.array(exact).astype(mx.bfloat16))
    assert (to_float(out) == nearest).mean() > 0.95


@pytest.mark.parametrize(("experts", "top_k"), [(3, 1), (40, 8), (512, 10), (130, 32)])
def test_router(experts: int, top_k: int) -> None:
    rng = np.random.default_rng(experts)
    logits = rng.choice(np.arange(-6, 6, 0.25, dtype=np.float32), (4, experts))  # many ties
    chosen, weights = Router(launcher(seed=1), top_k, normalize=False)(mx.array(logits))
    order = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
    np.testing.assert_array_equal(np.array(chosen), order)
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    np.testing.assert_allclose(np.array(weights), np.take_along_axis(shares, order, 1), rtol=1e-5)


def test_router_stays_within_bounds_without_numbers() -> None:
    logits = mx.full((1, 64), float("nan"))
    chosen, _ = Router(launcher(), 4, normalize=True)(logits)
    assert (np.array(chosen) < 64).all()


@pytest.mark.parametrize(
    ("bits", "dtype"),
    [*((bits, "float32") for bits in BITS), *((bits, dtype) for bits in (3, 4) for dtype in HALF_TYPES)],
)
def test_prefill_experts(bits: int, dtype: str) -> None:
    """Random shapes and group sizes; experts of many rows, of one and of none."""
    tensors = Tensors(seed=bits)
    kind, tolerance = HALF_TYPES.get(dtype, (mx.float32, 2e-5))
    rng = tensors.rng
    group, experts, top_k, tokens = (
        int(rng.choice([32, 64, 128])),
        int(rng.integers(2, 9)),
        3,
        int(rng.integers(40, 90)),
    )
    dim, hidden = group * int(rng.integers(1, 3)), group * int(rng.integers(1, 4))
    shapes = (experts, hidden, dim), (experts, hidden, dim), (experts, dim, hidden)
    spec = MlpSpec(*(tensors.quantized(*shape, bits=bits, group_size=group, dtype=dtype) for shape in shapes))
    matrices = [Weights(kind).matrix(matrix) for matrix in (spec.gate, spec.up, spec.down)]
    ours = PrefillExperts(
        launcher(seed=bits), QuantizedMlp(*(w for w in matrices if isinstance(w, QuantizedWeight))), kind
    )
    x = mx.array(tensors.values(tokens, dim)).astype(kind)
    chosen = rng.integers(0, experts - 1, (tokens, top_k)).astype(np.uint32)  # the last has none
    chosen[0, 0] = 0
    weights = rng.uniform(0, 1, (tokens, top_k)).astype(np.float32)
    got = ours(x, mx.array(chosen), mx.array(weights))
    assert got.dtype == kind
    rows = to_float(x)
    each = np.stack([mlp(spec, rows, expert) for expert in range(experts)])
    want = (each[chosen, np.arange(tokens)[:, None]] * weights[..., None]).sum(axis=1)
    assert_close(to_float(got), want, 2 * tolerance)


def attention(heads: int, kv_heads: int, dim: int, tensors: Tensors, length: int) -> Program:
    rope = Rope((1e4 ** -np.linspace(0, 1, dim // 4)).astype(np.float32))
    spec = AttentionSpec(heads, kv_heads, dim, dim**-0.5, rope, tensors.norm(dim), tensors.norm(dim))
    q, k = 2 * heads * dim, kv_heads * dim  # the gate of a head follows its q

    def verb(builder, value):  # type: ignore[no-untyped-def]
        columns = [Columns(value, at, stride) for at, stride in ((0, 2 * dim), (q, dim), (q + k, dim), (dim, 2 * dim))]
        return builder.attention(*columns[:3], spec, columns[3])

    return program_of(tensors.values(length, q + 2 * k), verb)


@pytest.mark.parametrize("seed", [0, 1])
def test_attention_over_several_parts(seed: int) -> None:
    """Contexts of one part and of many, sequences of very different lengths in one step."""
    cache = CacheConfig(blocks=60, block_size=8, state_slots=3)
    program = attention(heads=6, kv_heads=2, dim=64, tensors=Tensors(seed=20), length=160)
    backend = HostMetalBackend(HostMetal(seed=seed, in_place=frozenset({"keys", "cached"})))
    ours = backend.compile(program, cache, ExecutorOptions(max_tokens=256, dtype="float32"))
    reference = REFERENCE.compile(program, cache)
    mine, theirs = Sequences(cache, count=3), Sequences(cache, count=3)
    for tokens in ({0: range(130), 1: range(3), 2: range(63)}, {0: [5], 1: [6], 2: [7]}, {2: [8], 0: [9]}):
        assert_close(ours.run(mine.step(tokens)), reference.run(theirs.step(tokens)))
    assert {"attention_write", "attention_decode", "attention_join"} <= set(backend.host.sources)


def test_moe_takes_four_launches() -> None:
    tensors = Tensors(seed=30)
    spec = tensors.moe(dim=256, hidden=64, experts=16, top_k=4)
    backend = HostMetalBackend()
    program = program_of(tensors.values(3, 256), lambda b, value: b.moe(value, spec))
    options = ExecutorOptions(max_tokens=8, dtype="float32")
    got = backend.compile(program, CacheConfig(1, 8, 1), options).run(all_rows(range(3)))
    assert_close(got, REFERENCE.compile(program, CacheConfig(1, 8, 1)).run(all_rows(range(3))))
    assert sorted(backend.host.sources) == ["experts_hidden", "experts_project", "matvec", "router"]


def test_lanes_for() -> None:
    assert [lanes_for(n) for n in (2048, 4096, 512, 576, 256, 64)] == [32, 32, 16, 8, 8, 8]


def test_shared_memory_is_declared_in_kernels_alone() -> None:
    """Metal refuses threadgroup variables in other functions, which the host would not notice."""
    for file in (Path(__file__).parents[2] / "kernels" / "metal").glob("*.metal"):
        assert "SHARED(" not in source(file.stem, "metal").header.replace("#define SHARED(", "")


def test_cuda_reads_the_same_text() -> None:
    cuda, metal = source("matvec", "cuda"), source("matvec", "metal")
    assert "thread_index_in_simdgroup" in cuda.body
    assert "const device" not in cuda.header
    assert cuda.body.replace(" ", "") == metal.body.replace("device", "").replace(" ", "")
