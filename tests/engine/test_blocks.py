"""The pool of cache blocks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixbit.engine.blocks import BlockPool


@given(st.lists(st.integers(-4, 4)))
def test_every_block_is_free_or_held_exactly_once(moves: list[int]) -> None:
    pool = BlockPool(7)
    held: list[int] = []
    for move in moves:
        if move >= 0:
            if move > pool.free:
                with pytest.raises(ValueError, match="free"):
                    pool.take(move)
                continue
            held += pool.take(move)
        else:
            returned, held = held[:-move], held[-move:]
            pool.give_back(returned)
        assert len(set(held)) == len(held)
        assert pool.held() == set(held)
        assert pool.free == 7 - len(held)
        assert all(0 <= number < 7 for number in held)


def test_giving_back_what_is_free_is_an_error() -> None:
    pool = BlockPool(3)
    taken = pool.take(2)
    pool.give_back(taken)
    with pytest.raises(ValueError, match="not held"):
        pool.give_back(taken[:1])
