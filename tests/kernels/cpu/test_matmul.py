"""Every width, group, scale type and instruction set of the native product, against a decoder of this test's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from mixbit.kernels.cpu import _cpu

Array = npt.NDArray[Any]

WIDTHS = (1, 2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
TOKENS = (0, 1, 2, 3, 4, 5, 7, 8, 33, 130)
MANY = 8  # rows: from here on AMX multiplies bfloat16
DTYPES = {
    "f32": (np.float32, _cpu.DType.f32),
    "f16": (np.float16, _cpu.DType.f16),
    "bf16": (ml_dtypes.bfloat16, _cpu.DType.bf16),
}


@dataclass(frozen=True)
class Stack:
    """A stack of matrices for the native module, and its values [experts, rows, cols] in double precision."""

    native: _cpu.Weight
    values: npt.NDArray[np.float64]


def code_bytes(codes: npt.NDArray[np.int64], bits: int) -> npt.NDArray[np.uint8]:
    """Each row as a stream of bits, lowest first, as packbits understands it."""
    stream = (codes[..., None] >> np.arange(bits)) & 1
    return np.packbits(stream.reshape(*codes.shape[:-1], -1).astype(np.uint8), axis=-1, bitorder="little")


def quantized(rng: np.random.Generator, bits: int, group: int, dtype: str, shape: tuple[int, int, int]) -> Stack:
    numpy_type, native_type = DTYPES[dtype]
    codes = rng.integers(0, 2**bits, shape)
    part = (*shape[:2], shape[2] // group)
    scales, biases = (rng.normal(size=part).astype(numpy_type) for _ in range(2))
    wide = [np.repeat(a.astype(np.float64), group, axis=-1) for a in (scales, biases)]
    packed = code_bytes(codes, bits)
    buffers = (packed, scales.view(np.uint8), biases.view(np.uint8))
    return Stack(_cpu.Weight(*buffers, native_type, bits, group, *shape), wide[0] * codes + wide[1])


def dense(rng: np.random.Generator, dtype: str, shape: tuple[int, int, int]) -> Stack:
    numpy_type, native_type = DTYPES[dtype]
    values = rng.normal(size=shape).astype(numpy_type)
    native = _cpu.Weight(values.view(np.uint8), None, None, native_type, 0, 0, *shape)
    return Stack(native, values.astype(np.float64))


def assert_product(rng: np.random.Generator, stack: Stack, isa: str, count: int) -> None:
    experts, rows, cols = stack.values.shape
    expert = int(rng.integers(experts))
    begin = int(rng.integers(rows))
    end = int(rng.integers(begin, rows + 1))
    x = rng.normal(size=(count + 2, cols)).astype(np.float32)
    index = rng.integers(0, count + 2, count).astype(np.int32) if rng.integers(2) else None
    taken = x[index] if index is not None else x
    got = _cpu.matmul_rows(stack.native, x, isa=isa, expert=expert, index=index, row_begin=begin, row_end=end)
    w = stack.values[expert]
    assert got.shape == (len(taken), rows)
    bound = 1e-6 * (np.abs(taken) @ np.abs(w).T) + 1e-6
    assert (np.abs(got - taken @ w.T) <= bound)[:, begin:end].all()
    outside = np.ones(rows, bool)
    outside[begin:end] = False
    assert np.isnan(got[:, outside]).all()


def shapes(rng: np.random.Generator, group: int) -> Iterator[tuple[int, tuple[int, int, int]]]:
    for count in TOKENS:
        yield count, (int(rng.integers(1, 4)), int(rng.integers(1, 40)), group * int(rng.integers(1, 640 // group)))


@pytest.fixture(params=_cpu.supported_isas())
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_quantized(bits: int, group: int, dtype: str, isa: str) -> None:
    rng = np.random.default_rng([bits, group])
    for count, shape in shapes(rng, group):
        assert_product(rng, quantized(rng, bits, group, dtype, shape), isa, count)


def taken_for(x: npt.NDArray[np.float32], group: int, precision: str) -> npt.NDArray[np.float64]:
    """What int8 kernels take x for: what the first rounding leaves of groups with large values, in the fine mode of all
    groups, is rounded again."""
    codes, factors = rounded(x, group)
    rest_codes, rest_factors = rounded(x - (codes * factors).reshape(x.shape), group)
    rest = np.where(coarse(x, group, precision), rest_codes.astype(np.float64) * rest_factors, 0)
    return (codes.astype(np.float64) * factors + rest).reshape(x.shape)


def coarse(x: npt.NDArray[np.float32], group: int, precision: str) -> npt.NDArray[np.bool_]:
    """Groups whose peak, squared, is more than 1.2 times the mean of the row: [rows, groups, 1]."""
    squares = np.abs(x.reshape(len(x), x.shape[1] // group, group)).max(axis=-1) ** 2
    mean = np.cumsum(squares, axis=1, dtype=np.float32)[:, -1:] / np.float32(squares.shape[1])
    wide: npt.NDArray[np.bool_] = squares > np.float32(0 if precision == "fine" else 1.2) * mean
    return wide[..., None]


def rounded(x: npt.NDArray[np.float32], group: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """In each group of columns, the nearest multiples of a 127th of the peak: multiples and 127ths."""
    groups = x.reshape(len(x), x.shape[1] // group, group)
    peak = np.abs(groups).max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        inverse = np.where(peak > 1e-30, np.float32(127) / peak, np.float32(0))
    return np.rint(groups * inverse), peak / np.float32(127)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", WIDTHS[1:])
@pytest.mark.parametrize("precision", ["fast", "fine"])
def test_int8_is_the_product_of_rounded_inputs(precision: str, bits: int, group: int, dtype: str, isa: str) -> None:
    """To 1e-6 of the sum of magnitudes; and a row of the result is the same, bit for bit, alone and in company."""
    seen: set[bool] = set()  # groups that are rounded twice, and others
    rng = np.random.default_rng([bits, group, 1])
    for count, shape in shapes(rng, group):
        if isa == "amx" and count >= MANY:
            continue
        stack = quantized(rng, bits, group, dtype, shape)
        x = (rng.normal(size=(count, shape[2])) * rng.lognormal(0, 2, (count, 1))).astype(np.float32)
        x[: count // 3, :group] = 0
        x[1:2] *= np.float32(1e-15)
        x[2::3, -group:] *= 8
        expert = int(rng.integers(shape[0]))
        got = rounded_product(stack, x, isa, expert, precision)
        w, taken = stack.values[expert], taken_for(x, group, precision)
        if not count:
            continue
        twice = coarse(x, group, precision)
        seen |= {bool(each) for each in twice.flat}
        grouped = (count, shape[2] // group, group)
        bound = np.where(twice, 2e-5, 4e-3) * np.abs(x.reshape(grouped)).max(axis=-1, keepdims=True)
        assert (np.abs(taken - x).reshape(grouped) <= bound).all()
        assert (np.abs(got - taken @ w.T) <= 1e-6 * (np.abs(taken) @ np.abs(w).T) + 1e-30).all()
        for row in {0, count // 2, count - 1}:
            np.testing.assert_array_equal(rounded_product(stack, x[row : row + 1], isa, expert, precision)[0], got[row])
    assert seen >= ({True} if precision == "fine" else {True, False})


@pytest.mark.skipif("amx" not in _cpu.supported_isas(), reason="needs a processor with AMX")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", WIDTHS[1:])
@pytest.mark.parametrize("precision", ["fast", "fine"])
def test_many_rows_meet_bfloat16_on_amx(precision: str, bits: int, group: int, dtype: str) -> None:
    """The product of values rounded to bfloat16, or nearly the exact one; a row is the same beside any others."""
    rng = np.random.default_rng([bits, group, 2])
    for count, shape in shapes(rng, group):
        if count < MANY:
            continue
        stack = quantized(rng, bits, group, dtype, shape)
        x = rng.normal(size=(count, shape[2])).astype(np.float32)
        w, taken = stack.values[0].astype(np.float32), x
        if precision == "fast":
            w, taken = (a.astype(ml_dtypes.bfloat16).astype(np.float32) for a in (w, taken))
        got = rounded_product(stack, x, "amx", 0, precision)
        bound = 2e-5 * (np.abs(taken).astype(np.float64) @ np.abs(w).T)
        assert (np.abs(got - taken.astype(np.float64) @ w.T) <= bound + 1e-30).all()
        np.testing.assert_array_equal(rounded_product(stack, x[-MANY:], "amx", 0, precision), got[-MANY:])


def rounded_product(
    stack: Stack, x: npt.NDArray[np.float32], isa: str, expert: int, precision: str
) -> npt.NDArray[np.float32]:
    rows, kind = stack.values.shape[1], _cpu.Precision[precision]
    return _cpu.matmul_rows(
        stack.native, x, isa=isa, expert=expert, index=None, row_begin=0, row_end=rows, precision=kind
    )


@pytest.mark.parametrize("precision", ["fast", "fine"])
def test_int8_does_not_hide_what_is_not_finite(precision: str, isa: str) -> None:
    rng = np.random.default_rng(3)
    stack = quantized(rng, 4, 32, "bf16", (1, 5, 128))
    for bad in (np.nan, np.inf, -np.inf):
        x = rng.normal(size=(6, 128)).astype(np.float32)
        x[2, 40] = bad
        got = rounded_product(stack, x, isa, 0, precision)
        assert not np.isfinite(got[2]).any()
        assert np.isfinite(np.delete(got, 2, axis=0)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_of_any_length(dtype: str, isa: str) -> None:
    rng = np.random.default_rng(7)
    for count, shape in shapes(rng, 1):
        assert_product(rng, dense(rng, dtype, shape), isa, count)


@pytest.mark.parametrize("bits", WIDTHS)
def test_more_groups_than_are_converted_at_a_time(bits: int, isa: str) -> None:
    rng = np.random.default_rng(bits)
    for count in (1, 6):
        assert_product(rng, quantized(rng, bits, 32, "bf16", (1, 5, 32 * 131)), isa, count)


def test_extreme_half_precision_scales(isa: str) -> None:
    """Subnormal, largest, infinite and NaN values of 16 bits keep their meaning."""
    patterns = np.array([0x0001, 0x83FF, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0x8000], np.uint16)
    for name in ("f16", "bf16"):
        numpy_type, native_type = DTYPES[name]
        rows = patterns.view(numpy_type)[:, None]
        weight = _cpu.Weight(np.ascontiguousarray(rows).view(np.uint8), None, None, native_type, 0, 0, 1, len(rows), 1)
        x = np.ones((1, 1), np.float32)
        got = _cpu.matmul_rows(weight, x, isa=isa, expert=0, index=None, row_begin=0, row_end=len(rows))
        np.testing.assert_array_equal(got[0], rows[:, 0].astype(np.float32))


def test_an_isa_that_this_machine_lacks_is_refused_by_name() -> None:
    stack = dense(np.random.default_rng(0), "f32", (1, 1, 4))
    x = np.ones((1, 4), np.float32)
    with pytest.raises(ValueError, match="'sse9' cannot run here"):
        _cpu.matmul_rows(stack.native, x, isa="sse9", expert=0, index=None, row_begin=0, row_end=1)
