"""Embed, batch_matvec, norms and select_rows: what works row by row."""

from __future__ import annotations

import numpy as np
import pytest

from mixbit.kernels.ops import ProgramBuilder
from mixbit.kernels.reference.matrix import batch_matvec, dequantize
from mixbit.kernels.reference.norm import rms_norm
from mixbit.kernels.spec import BITS, GROUP_SIZES, BatchMatvecSpec, Matrix
from tests.kernels.builders import DTYPES, Tensors, all_rows, assert_close, feed, program_of
from tests.kernels.conftest import Candidate

WIDTHS = (None, *BITS)


def run_matrix(candidate: Candidate, matrix: Matrix, x: np.ndarray) -> np.ndarray:
    program = program_of(x, lambda b, value: b.batch_matvec(value, BatchMatvecSpec(matrix))[0])
    return candidate.compile(program).run(all_rows(range(len(x))))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", WIDTHS)
def test_matvec_at_every_width(candidate: Candidate, bits: int | None, dtype: str) -> None:
    for group_size in GROUP_SIZES:
        tensors = Tensors(seed=group_size)
        matrix = tensors.matrix(37, 256, bits=bits, group_size=group_size, dtype=dtype)
        for rows in (1, 2, 9, 40):
            x = tensors.values(rows, 256)
            assert_close(run_matrix(candidate, matrix, x), x @ dequantize(matrix).T)


@pytest.mark.parametrize("bits", WIDTHS)
def test_matvec_of_odd_sizes(candidate: Candidate, bits: int | None) -> None:
    tensors = Tensors(seed=11)
    for out_dim, in_dim in ((1, 32), (3, 96), (130, 160), (64, 1056)):
        matrix = tensors.matrix(out_dim, in_dim, bits=bits, dtype="bfloat16")
        x = tensors.values(5, in_dim)
        assert_close(run_matrix(candidate, matrix, x), x @ dequantize(matrix).T)


def test_dense_columns_need_no_alignment(candidate: Candidate) -> None:
    tensors = Tensors(seed=12)
    for dtype in DTYPES:
        matrix = tensors.dense(6, 77, dtype=dtype)
        x = tensors.values(3, 77)
        assert_close(run_matrix(candidate, matrix, x), x @ dequantize(matrix).T)


def test_outliers_keep_float32_accuracy(candidate: Candidate) -> None:
    """Activations of very different sizes, as models have them: the small ones must not be lost."""
    tensors = Tensors(seed=13)
    x = tensors.values(4, 256)
    x[:, 7] *= 1000
    for bits in WIDTHS:
        matrix = tensors.matrix(16, 256, bits=bits, group_size=64)
        assert_close(run_matrix(candidate, matrix, x), x @ dequantize(matrix).T)


def test_one_batch_of_every_width(candidate: Candidate) -> None:
    """Matrices that share an input, each at its own width, group size, dtype and size."""
    tensors = Tensors(seed=1)
    specs = tuple(
        BatchMatvecSpec(
            tensors.matrix(
                1 + 13 * place, 384, bits=bits, group_size=GROUP_SIZES[place % 3], dtype=[*DTYPES][place % 3]
            ),
            tensors.dense(1 + 13 * place, dtype=[*DTYPES][place % 3]) if place % 2 else None,
        )
        for place, bits in enumerate(WIDTHS)
    )
    x = tensors.values(6, 384)
    for place, expected in enumerate(batch_matvec(specs, x)):
        program = program_of(x, lambda b, value, place=place: b.batch_matvec(value, *specs)[place])  # type: ignore[misc]
        assert_close(candidate.compile(program).run(all_rows(range(6))), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", WIDTHS)
def test_embedding_rows(candidate: Candidate, bits: int | None, dtype: str) -> None:
    table = Tensors(seed=2).matrix(50, 128, bits=bits, group_size=64, dtype=dtype)
    tokens = [49, 0, 7, 7, 31]
    builder = ProgramBuilder()
    program = builder.build(builder.select_rows(builder.embed(table)))
    assert_close(candidate.compile(program).run(all_rows(tokens)), dequantize(table)[tokens], 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_rms_norm(candidate: Candidate, eps: float, dtype: str) -> None:
    tensors = Tensors(seed=3)
    x = tensors.values(7, 130) * np.array([[1e-3], [1], [1e3], [0], [1], [1], [1]], np.float32)
    norm = tensors.norm(130, eps, dtype)
    program = program_of(x, lambda b, value: b.rms_norm(value, norm))
    assert_close(candidate.compile(program).run(all_rows(range(7))), rms_norm(norm, x))


@pytest.mark.parametrize("output", [0, 1])
def test_add_norm_gives_sum_and_norm(candidate: Candidate, output: int) -> None:
    tensors = Tensors(seed=4)
    x, norm = tensors.values(5, 64), tensors.norm(64)
    matrix = tensors.dense(64, 64)

    builder, value = feed(x)
    (delta,) = builder.batch_matvec(value, BatchMatvecSpec(matrix))
    program = builder.build(builder.select_rows(builder.add_norm(value, delta, norm)[output]))
    total = x + x @ matrix.data.T
    expected = (total, rms_norm(norm, total))[output]
    assert_close(candidate.compile(program).run(all_rows(range(5))), expected)


def test_a_value_survives_its_later_uses(candidate: Candidate) -> None:
    """A residual is read again after its norm and after a second sum: no op may write over it."""
    tensors = Tensors(seed=5)
    x = tensors.values(4, 64)
    first, second = tensors.norm(64), tensors.norm(64)
    builder, value = feed(x)
    normed = builder.rms_norm(value, first)
    total, other = builder.add_norm(value, normed, second)
    last, _ = builder.add_norm(total, other, first)
    program = builder.build(builder.select_rows(last))
    total_expected = x + rms_norm(first, x)
    expected = total_expected + rms_norm(second, total_expected)
    assert_close(candidate.compile(program).run(all_rows(range(4))), expected)


@pytest.mark.parametrize("rows", [[], [3], [4, 0, 2, 2]])
def test_select_rows_in_the_order_asked(any_candidate: Candidate, rows: list[int]) -> None:
    tensors = Tensors(seed=6)
    x = tensors.values(5, 64)
    matrix = tensors.quantized(10, 64, bits=6)
    builder, value = feed(x)
    (logits,) = builder.batch_matvec(builder.select_rows(value), BatchMatvecSpec(matrix))
    executor = any_candidate.compile(builder.build(logits))
    batch = all_rows(range(5))
    chosen = type(batch)(**{**vars(batch), "logit_rows": np.array(rows, np.int32)})
    got = executor.run(chosen)
    assert got.dtype == np.float32
    assert_close(got, x[rows] @ dequantize(matrix).T)
