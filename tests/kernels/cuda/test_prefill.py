"""The prefill kernels: plans of batches anywhere, parity with the reference where there is a CUDA device."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mixbit.kernels.cuda.driver import unavailable
from mixbit.kernels.cuda.prefill import CHUNK, LOW, QUERIES, SQUARE, Plan
from mixbit.kernels.cuda.prefill_linear import choose_block
from mixbit.kernels.cuda.prefill_moe import most_tiles
from mixbit.kernels.executor import CacheConfig
from tests.kernels.builders import Sequences
from tests.kernels.cuda.prefill_cases import GROUPS, TOLERANCE, Rig, the_rig

CASES = {name: case for cases in GROUPS.values() for name, case in cases()}


@pytest.mark.parametrize("name", CASES)
def test_like_reference(name: str) -> None:
    reason = unavailable()
    if reason is not None:
        pytest.skip(reason)
    case: Callable[[Rig], float] = CASES[name]
    assert case(the_rig()) < TOLERANCE


def test_plan_covers_every_row_once() -> None:
    sequences = Sequences(CacheConfig(blocks=400, block_size=16, state_slots=5), count=4)
    for lengths in ({0: 70, 1: 1}, {2: 300, 0: 129, 3: 1}, {0: 128, 1: 64}):
        batch = sequences.step({s: range(n) for s, n in lengths.items()})
        plan = Plan.of(batch)
        for pieces, most in ((plan.chunks, CHUNK), (plan.tiles, QUERIES)):
            covered = np.concatenate([np.arange(first, first + rows) for _, first, rows, _ in pieces])
            assert sorted(covered) == list(range(len(batch.tokens)))
            assert (pieces[:, 2] <= most).all()
            assert len(pieces) <= Plan.most(len(batch.tokens), len(lengths), most)
            for sequence, first, rows, _ in pieces:
                assert batch.query_starts[sequence] <= first
                assert first + rows <= batch.query_starts[sequence + 1]
        for s, first in enumerate(plan.first_chunks):
            assert plan.chunks[first][0] == s
            assert plan.chunks[first][3] == 0
        assert [int(p) for _, first, _, p in plan.tiles] == [
            int(batch.positions[first]) for _, first, _, _ in plan.tiles
        ]
        assert plan.size.chunks == len(plan.chunks)
        assert plan.size.tiles == len(plan.tiles)


def test_most_tiles_is_enough_for_the_worst_split() -> None:
    """All experts but one have one row more than fills their tiles."""
    for experts, pairs in ((8, 900), (512, 20480), (512, 90), (1, 64)):
        counts = np.ones(experts, int) if pairs >= experts else np.array([1] * pairs + [0] * (experts - pairs))
        counts[0] += pairs - counts.sum()
        assert sum(-(-counts // LOW.tokens)) <= most_tiles(pairs, experts)


def test_small_products_take_small_blocks() -> None:
    assert choose_block((SQUARE, LOW), [2048], 2048, 132) is SQUARE
    assert choose_block((SQUARE, LOW), [12288], 300, 132) is SQUARE
    assert choose_block((SQUARE, LOW), [512], 2048, 132) is LOW
    assert choose_block((SQUARE, LOW), [12288], 16, 132) is LOW
