"""Attention in the fast mode: keys and values in bfloat16, which rounds to 8 bits, half of 2^-7 of a value.

Queries and softmax weights are rounded so too where the processor multiplies bfloat16. A score of size 4 is then off
by some 4 * 2^-8 at worst, and with it a weight; a weighted mean of values is off by about as much.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from mixbit.kernels.cpu import _cpu
from mixbit.kernels.cpu.backend import CpuBackend
from mixbit.kernels.executor import CacheConfig, Executor, ExecutorOptions
from mixbit.kernels.ops import Program
from tests.kernels.builders import CACHE, Sequences, Tensors, assert_close, program_of, run_in_pieces
from tests.kernels.conftest import REFERENCE, Candidate
from tests.kernels.test_attention import SHAPES, Shape, attend, layer

TOLERANCE = 4 * 2.0**-8


@dataclass(frozen=True)
class Narrow:
    """The CPU in its fast mode, held to an instruction set. The programs here have no quantized matrices."""

    isa: str

    def compile(self, program: Program, cache: CacheConfig = CACHE) -> Executor:
        options = ExecutorOptions(max_tokens=256, threads=2, isa=self.isa, precision="fast")
        return CpuBackend().compile(program, cache, options)


@pytest.fixture(params=_cpu.supported_isas())
def narrow(request: pytest.FixtureRequest) -> Narrow:
    """Each instruction set."""
    return Narrow(request.param)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_like_reference_over_mixed_steps(narrow: Narrow, shape: Shape) -> None:
    program = layer(shape)
    ours, reference = narrow.compile(program), REFERENCE.compile(program)
    sequences = Sequences(CACHE, count=4, seed=3)
    rng = np.random.default_rng(1)
    for lengths in ({0: 5}, {1: 1, 0: 1, 2: 9}, {2: 3, 3: 3, 1: 3}, {0: 7, 3: 1, 1: 2}, {0: 1, 1: 1, 2: 1, 3: 1}):
        batch = sequences.step({s: rng.integers(0, 24, n) for s, n in lengths.items()})
        assert_close(ours.run(batch), reference.run(batch), TOLERANCE)


@pytest.mark.parametrize("block_size", [1, 3, 16, 32])
def test_any_block_size(narrow: Narrow, block_size: int) -> None:
    """Odd blocks end within a pair of positions."""
    program = layer(SHAPES["plain"])
    cache = CacheConfig(blocks=-(-220 // block_size), block_size=block_size, state_slots=1)
    tokens = np.random.default_rng(6).integers(0, 24, 200)
    whole = run_in_pieces(REFERENCE.compile(program, cache), cache, tokens, [200])
    assert_close(run_in_pieces(narrow.compile(program, cache), cache, tokens, [17, 1, 1, 1, 180]), whole, TOLERANCE)


def test_odd_heads(narrow: Narrow) -> None:
    """Heads of an odd size end within a pair of values."""
    shape = Shape(head_dim=19, rotated=18)
    tokens = np.random.default_rng(7).integers(0, 24, 40)
    whole = run_in_pieces(REFERENCE.compile(layer(shape)), CACHE, tokens, [40])
    assert_close(run_in_pieces(narrow.compile(layer(shape)), CACHE, tokens, [33, 1, 6]), whole, TOLERANCE)


def test_long_context_is_split_over_threads(narrow: Narrow) -> None:
    """One new token after 1,500 and 700 others, two sequences together."""
    program = layer(SHAPES["one-kv-head"])
    cache = CacheConfig(blocks=100, block_size=32, state_slots=2)
    ours, reference = narrow.compile(program, cache), REFERENCE.compile(program, cache)
    sequences = Sequences(cache, count=2, seed=3)
    rng = np.random.default_rng(8)
    for lengths in (*({0: 250},) * 6, *({1: 234},) * 3, {1: 1, 0: 1}, {0: 1}, {0: 3, 1: 5}):
        batch = sequences.step({s: rng.integers(0, 24, n) for s, n in lengths.items()})
        assert_close(ours.run(batch), reference.run(batch), TOLERANCE)


def test_a_broken_sequence_leaves_nothing_to_the_next(narrow: Narrow) -> None:
    """A sequence whose values are not numbers had the blocks before."""
    shape = SHAPES["plain"]
    tensors = Tensors(0)
    x = tensors.values(24, shape.width)
    x[23] = np.nan
    program = program_of(x, lambda builder, value: attend(builder, value, shape, tensors, 0))
    executor = narrow.compile(program)
    sequences = Sequences(CACHE, count=1)
    executor.run(sequences.step({0: [23] * 20}))
    sequences.restart(0)
    fresh = narrow.compile(program).run(Sequences(CACHE, count=1).step({0: [3, 1, 2]}))
    np.testing.assert_array_equal(executor.run(sequences.step({0: [3, 1, 2]})), fresh)


def test_blocks_are_half_as_large_and_move(narrow: Narrow) -> None:
    program = layer(SHAPES["two-layers"])
    wide = Candidate(CpuBackend(), narrow.isa).compile(program)
    executor, other = narrow.compile(program), narrow.compile(program)
    assert 2 * executor.cache_bytes == wide.cache_bytes
    first = Sequences(CACHE, count=1).step({0: [5, 6, 7]})
    want = executor.run(first)
    data = executor.export_block(int(first.block_tables[0, 0]))
    assert 2 * len(data) == len(wide.export_block(0))
    other.import_block(2, data)
    other.copy_block(2, int(first.block_tables[0, 0]))
    sequences = Sequences(CACHE, count=1)
    sequences.step({0: [5, 6]})
    np.testing.assert_allclose(other.run(sequences.step({0: [7]}))[0], want[2], rtol=0, atol=1e-5)
