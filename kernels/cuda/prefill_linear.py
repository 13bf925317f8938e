"""Matrices of any formats applied to one input of many rows, in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mixbit.kernels.cuda.compiler import Source
from mixbit.kernels.cuda.driver import Addressed, Buffer, Device, Launch
from mixbit.kernels.cuda.prefill import (
    BF16,
    LOW,
    MOST_SHARED,
    SQUARE,
    Block,
    Format,
    Modules,
    Weights,
    ceil_div,
)
from mixbit.kernels.spec import Matrix

# As `struct Matrix` of prefill_linear.cu.
_ROW = np.dtype(
    [
        ("codes", "<u8"),
        ("scales", "<u8"),
        ("biases", "<u8"),
        ("rows", "<i4"),
        ("padding", "<i4"),
        ("format", "<i4"),
        ("first_block", "<i4"),
        ("out_dtype", "<i4"),
        ("bias_dtype", "<i4"),
        ("bias", "<u8"),
        ("out", "<u8"),
    ]
)


@dataclass(frozen=True, eq=False)
class Output:
    """One matrix, its additive bias [rows] if any, and where its result goes: [tokens, rows], BF16 or F32."""

    weights: Weights
    out: Addressed
    out_dtype: int = BF16
    bias: Addressed | None = None
    bias_dtype: int = BF16


def applies(matrices: Sequence[Matrix]) -> bool:
    """Whether the kernel serves these matrices."""
    return all(matrix.in_dim % 32 == 0 for matrix in matrices)


def choose_block(blocks: Sequence[Block], rows: Sequence[int], tokens: int, multiprocessors: int) -> Block:
    """The largest of the blocks, ordered by size, that gives every multiprocessor work; else the last."""
    for block in blocks:
        count = sum(ceil_div(n, block.columns) for n in rows) * ceil_div(tokens, block.tokens)
        if count >= multiprocessors * block.resident * 0.75:
            return block
    return blocks[-1]


class Linear:
    """y = W x (+ bias) for each output. x: bfloat16 [tokens, depth]."""

    def __init__(self, device: Device, x: Addressed, outputs: Sequence[Output]) -> None:
        self._device, self._x, self._outputs = device, x, tuple(outputs)
        self._formats = tuple(dict.fromkeys(output.weights.format for output in outputs))
        self._widest = max(form.bits for form in self._formats)
        self._blocks = [block for block in (SQUARE, LOW) if block.shared(self._widest) <= MOST_SHARED]
        self._rows = [output.weights.rows for output in outputs]
        self._tables: dict[int, Buffer] = {}

    @cached_property
    def sources(self) -> tuple[Source, ...]:
        """What must be compiled."""
        return tuple(self._source(block) for block in self._blocks)

    def _source(self, block: Block) -> Source:
        return Source("prefill_linear.cu", (formats_define(self._formats), *block.defines))

    def launches(self, modules: Modules, tokens: int) -> list[Launch]:
        """The product for `tokens` rows."""
        block = choose_block(self._blocks, self._rows, tokens, self._device.multiprocessors)
        kernel = modules[self._source(block)].function("prefill_linear", block.shared(self._widest))
        columns = sum(ceil_div(rows, block.columns) for rows in self._rows)
        arguments = (
            self._table(block.columns),
            np.int32(len(self._outputs)),
            self._x,
            np.int32(tokens),
            np.int32(self._outputs[0].weights.depth),
        )
        return [Launch(kernel, (columns, ceil_div(tokens, block.tokens), 1), (block.threads, 1, 1), arguments)]

    def _table(self, columns: int) -> Buffer:
        if columns not in self._tables:
            table = np.zeros(len(self._outputs), _ROW)
            first = 0
            for row, output in zip(table, self._outputs, strict=True):
                weights = output.weights
                row["codes"] = weights.codes.address
                row["scales"] = _address(weights.scales)
                row["biases"] = _address(weights.biases)
                row["rows"], row["format"] = weights.rows, self._formats.index(weights.format)
                row["first_block"], row["out_dtype"], row["out"] = first, output.out_dtype, output.out.address
                row["bias"], row["bias_dtype"] = _address(output.bias), output.bias_dtype
                first += ceil_div(weights.rows, columns)
            self._tables[columns] = self._device.put(table)
        return self._tables[columns]


def formats_define(formats: Sequence[Format]) -> str:
    """The macro FORMATS(X): X(index, bits, group size, dtype) for each."""
    calls = (f"X({i}, {form.bits}, {form.group_size}, {form.dtype})" for i, form in enumerate(formats))
    return f"FORMATS(X) {' '.join(calls)}"


def _address(place: Addressed | None) -> int:
    return 0 if place is None else place.address
