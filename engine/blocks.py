"""Numbered cache blocks and state slots: who may use which. Integers only."""

from __future__ import annotations

from collections.abc import Iterable


class BlockPool:
    """The numbers 0 .. size - 1, each free or held by exactly one owner.

    `take` hands numbers over, `give_back` returns them; giving back what is not held is an error, so
    that a block can never be in two tables. Lowest numbers are used first, and again soonest.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = list(range(size - 1, -1, -1))
        self._held = bytearray(size)

    @property
    def free(self) -> int:
        """How many are free."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` numbers that are now the caller's. Raises ValueError if fewer are free."""
        if count > len(self._free):
            raise ValueError(f"{count} blocks asked for, {len(self._free)} free")
        taken = [self._free.pop() for _ in range(count)]
        for number in taken:
            self._held[number] = 1
        return taken

    def give_back(self, numbers: Iterable[int]) -> None:
        """Free these numbers. Raises ValueError if one is not held."""
        for number in numbers:
            if not self._held[number]:
                raise ValueError(f"block {number} is given back but not held")
            self._held[number] = 0
            self._free.append(number)

    def held(self) -> set[int]:
        """The numbers that are not free."""
        return {number for number, held in enumerate(self._held) if held}
