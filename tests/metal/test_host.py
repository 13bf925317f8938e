"""The harness itself: right programs run as on a GPU, and each kind of wrong one is caught."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.metal.host import HostMetal, MetalError

THREADS = 64


def run(
    body: str, *inputs: Any, count: int = THREADS, header: str = "", in_place: tuple[str, ...] = (), **options: Any
) -> np.ndarray[Any, Any]:
    """Output `out` of a kernel over inputs a, b, ...; one threadgroup of 64 if not told otherwise."""
    arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
    host = HostMetal(seed=options.pop("seed", 0), in_place=frozenset(in_place))
    kernel = host.kernel("probe", "abcdef"[: len(arrays)], ["out"], body, header)
    defaults = {"grid": (THREADS, 1, 1), "threadgroup": (THREADS, 1, 1), "template": [("T", mx.float32)]}
    outs = kernel(inputs=arrays, output_shapes=[(count,)], output_dtypes=[mx.float32], **(defaults | options))
    return np.array(outs[0])


INDICES = """
const uint i = thread_index_in_threadgroup;
const uint lane = thread_index_in_simdgroup;
"""
NUMBERS = np.arange(THREADS, dtype=np.float32)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_threads_meet_at_barriers(seed: int) -> None:
    body = """
    threadgroup float shared[64];
    shared[i] = a[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[i] = shared[63 - i];
    """
    np.testing.assert_array_equal(run(INDICES + body, NUMBERS, seed=seed), NUMBERS[::-1])


def test_simd_operations() -> None:
    body = """
    const float x = a[i];
    const float neighbour = simd_shuffle_xor(x, 1);
    const float next = simd_shuffle_down(x, 1);
    const float all = simd_sum(x) + 1000 * simd_max(x) + simd_broadcast(x, 3) + simd_shuffle(x, 31 - lane);
    out[i] = all + 0.25f * neighbour + (lane < 31 ? next : 0.0f);
    """
    halves = NUMBERS.reshape(2, 32)
    neighbour = NUMBERS.reshape(32, 2)[:, ::-1].reshape(2, 32)
    following = np.append(halves[:, 1:], [[0], [0]], axis=1)
    shared = halves.sum(1) + 1000 * halves.max(1) + halves[:, 3]
    want = shared[:, None] + halves[:, ::-1] + 0.25 * neighbour + following
    np.testing.assert_array_equal(run(INDICES + body, NUMBERS), want.reshape(-1))


def test_a_grid_that_threadgroups_do_not_divide() -> None:
    body = """
    const uint3 p = thread_position_in_grid;
    out[p.y * threads_per_grid.x + p.x] = threads_per_threadgroup.x * 100 + threadgroup_position_in_grid.y;
    """
    got = run(body, count=30, grid=(10, 3, 1), threadgroup=(8, 2, 1)).reshape(3, 10)
    want = np.where(np.arange(10) < 8, 800, 200) + (np.arange(3) // 2)[:, None]
    np.testing.assert_array_equal(got, want)


def test_arguments_are_bound_as_mlx_binds_them() -> None:
    """Small inputs are constant, scalars are references, shape arguments appear when they are named."""
    header = "inline float of_constant(const constant float* x) { return x[0]; }\n"
    body = "out[0] = of_constant(a) + b + c_shape[1] + c_strides[0] + c_ndim; out[1] = c[0];"
    inputs = (np.ones(7, np.float32), np.float32(2), np.zeros((8, 5), np.float32))
    got = run(body, *inputs, count=2, header=header, grid=(1, 1, 1))
    np.testing.assert_array_equal(got, [1 + 2 + 5 + 5 + 2, 0])


def test_half_types() -> None:
    body = """
    out[i] = float(bfloat(a[i])) * 1000 + float(half(a[i]));
    """
    x = np.linspace(-3, 3, THREADS, dtype=np.float32)
    rounded = np.array(mx.array(x).astype(mx.bfloat16).astype(mx.float32))
    np.testing.assert_array_equal(run(INDICES + body, x), rounded * 1000 + x.astype(np.float16).astype(np.float32))


WRONG = {
    "missing barrier": (
        "threadgroup float shared[64]; shared[i] = a[i]; out[i] = shared[i ^ 32];",
        "race: reads|nothing has written",
    ),
    "missing second barrier": (
        "threadgroup float shared[64]; shared[i] = a[i]; threadgroup_barrier(mem_flags::mem_threadgroup);"
        "const float x = shared[63 - i]; shared[i] = x; out[i] = x;",
        "race: (writes|reads) byte",
    ),
    "barrier of the wrong memory": (
        "threadgroup float shared[64]; shared[i] = a[i]; threadgroup_barrier(mem_flags::mem_device);"
        "out[i] = shared[63 - i];",
        "race: reads",
    ),
    "barrier of the simdgroup alone": (
        "threadgroup float shared[64]; shared[i] = a[i]; simdgroup_barrier(mem_flags::mem_threadgroup);"
        "out[i] = shared[63 - i];",
        "race: reads|nothing has written",
    ),
    "lanes without a simdgroup barrier": (
        "threadgroup float shared[64]; shared[i] = a[i]; out[i] = shared[i ^ 1];",
        "race: reads|nothing has written",
    ),
    "return before a barrier": (
        "if (i == 40) { out[i] = 0; return; } threadgroup_barrier(mem_flags::mem_threadgroup); out[i] = a[i];",
        r"divergence: thread \d+ is at threadgroup_barrier \(line \d+ of the source\), but thread 40 has returned",
    ),
    "different barriers": (
        "if (i < 32) {\n threadgroup_barrier(mem_flags::mem_none);\n} else {\n"
        " threadgroup_barrier(mem_flags::mem_none);\n} out[i] = a[i];",
        "divergence: thread",
    ),
    "simd operation in a branch": (
        "float x = a[i]; if (lane < 8) x = simd_sum(x); out[i] = x;",
        "divergence: lane .* a simd operation",
    ),
    "lane that is not there": ("out[i] = simd_shuffle(a[i], 32);", "reads lane 32"),
    "read past the end": ("out[i] = a[i + 1];", "out of bounds: reads 4 bytes at byte 256 of a, which has 256"),
    "read before the start": ("out[i] = a[int(i) - 1];", "out of bounds: reads 4 bytes at byte -4 of a"),
    "write past the end": ("out[i * 2] = a[i];", r"out of bounds: writes 4 bytes at byte \d+ of out"),
    "read far away": ("out[i] = a[i + (1 << 26)];", "outside of every buffer"),
    "threadgroup index": ("threadgroup float shared[64]; shared[i + 1] = a[i]; out[i] = 0;", "byte 256 of threadgroup"),
    "write to an input": ("((device float*)a)[i] = 1; out[i] = 0;", "writes to a, which is read-only"),
    "write race in device memory": ("out[i / 2] = a[i];", "race: writes"),
    "unwritten output": ("out[i] += a[i];", r"reads byte \d+ of out, which nothing has written"),
    "misaligned vector": ("out[i] = (*(const device float4*)(a + i % 32)).x;", "misaligned: 16 bytes at byte 4 of a"),
    "threadgroup memory": (
        "threadgroup float many[8192]; threadgroup float more[1]; if (i == 0) more[0] = 1;"
        "many[i] = a[i]; out[i] = many[i];",
        "threadgroup memory: 32784 bytes",
    ),
}


@pytest.mark.parametrize("fault", WRONG)
@pytest.mark.parametrize("seed", [0, 5])
def test_faults_are_caught(fault: str, seed: int) -> None:
    body, message = WRONG[fault]
    with pytest.raises(MetalError, match=message):
        run(INDICES + body, NUMBERS, seed=seed)


def test_race_between_threadgroups() -> None:
    body = "out[0] = a[thread_position_in_grid.x];"
    with pytest.raises(MetalError, match=r"race: writes byte 0 of out, which thread 0 of threadgroup \d"):
        run(body, NUMBERS, grid=(2, 1, 1), threadgroup=(1, 1, 1))


def test_output_that_nobody_writes_is_not_a_number() -> None:
    got = run("if (i % 2 == 0) out[i] = a[i];".join([INDICES, ""]), NUMBERS)
    assert np.isnan(got[1::2]).all()
    assert not np.isnan(got[::2]).any()


def test_inputs_in_place_only_when_allowed() -> None:
    cache = mx.zeros(THREADS)
    got = run(INDICES + "((device float*)b)[i] = a[i]; out[i] = 1;", NUMBERS, cache, in_place=("b",))
    assert (got == 1).all()
    np.testing.assert_array_equal(np.array(cache), NUMBERS)


@pytest.mark.parametrize(
    "body",
    [
        "const float* p = a; out[i] = p[i];",  # device to the thread's own
        "const constant float* p = a; out[i] = p[i];",  # device to constant
        "threadgroup float shared[64]; device float* p = shared; out[i] = p[i];",  # threadgroup to device
        "const device float* p = b; out[i] = p[0];",  # a small input is constant
        "a[i] = 0;",  # inputs are const
        "out[i] = missing;",
    ],
)
def test_the_compiler_checks_address_spaces(body: str) -> None:
    with pytest.raises(MetalError, match=r"error: "):
        run(INDICES + body, NUMBERS, np.ones(3, np.float32))
