"""KV and state pools. Updates are functional; MLX reuses the memory of a pool that nobody else reads."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx

from mixbit.kernels.executor import CacheConfig
from mixbit.kernels.mlx.step import Group
from mixbit.kernels.ops import AttentionSpec, GatedDeltaSpec


class KvPool:
    """Keys and values of one attention layer: [blocks * block_size, kv_heads, head_dim] each."""

    def __init__(self, spec: AttentionSpec, cache: CacheConfig, dtype: mx.Dtype) -> None:
        self.block_size = cache.block_size
        shape = (cache.blocks * cache.block_size, spec.kv_heads, spec.head_dim)
        self._keys, self._values = mx.zeros(shape, dtype), mx.zeros(shape, dtype)

    def write(self, places: mx.array, keys: mx.array, values: mx.array) -> None:
        """Put keys and values [tokens, kv_heads, head_dim] at `places` [tokens]."""
        self._keys[places] = keys
        self._values[places] = values

    def read(self, group: Group) -> tuple[mx.array, mx.array]:
        """Keys and values of the group's sequences: [sequences, kv_heads, context, head_dim] each."""
        return self._pages(self._keys, group), self._pages(self._values, group)

    def _pages(self, pool: mx.array, group: Group) -> mx.array:
        blocks = pool.reshape(-1, self.block_size, *pool.shape[1:])
        pages = blocks[group.tables].reshape(len(group.slots), -1, *pool.shape[1:])
        return pages[:, : group.context].swapaxes(1, 2)

    def get(self, block: int) -> tuple[mx.array, mx.array]:
        """Keys and values of a block: [block_size, kv_heads, head_dim] each."""
        places = mx.arange(block * self.block_size, (block + 1) * self.block_size)
        return _gathered(self._keys, self._values, places)

    def put(self, block: int, pieces: tuple[mx.array, mx.array]) -> None:
        """Replace keys and values of a block."""
        places = slice(block * self.block_size, (block + 1) * self.block_size)
        self._keys[places], self._values[places] = pieces
        mx.eval(*self.arrays())

    def arrays(self) -> Iterator[mx.array]:
        """What a step must evaluate."""
        yield self._keys
        yield self._values


class StatePool:
    """Recurrent states of one gated delta layer.

    conv: [slots, kernel - 1, channels]; memory: float32 [slots, value_heads, value_dim, key_dim].
    The states that the last steps worked on are kept aside as they are, by the slots they belong to, and go
    back to the pool only when one of the slots is wanted in another company: a steady decode moves nothing.
    """

    def __init__(self, spec: GatedDeltaSpec, cache: CacheConfig, dtype: mx.Dtype) -> None:
        self._conv = mx.zeros((cache.state_slots, spec.kernel - 1, spec.channels), dtype)
        self._memory = mx.zeros((cache.state_slots, spec.value_heads, spec.value_dim, spec.key_dim), mx.float32)
        self._aside: dict[tuple[int, ...], tuple[mx.array, mx.array]] = {}

    def read(self, group: Group) -> tuple[mx.array, mx.array]:
        """(conv, memory) of the group's sequences, zero for new ones."""
        if group.slots in self._aside:
            conv, memory = self._aside.pop(group.slots)
        else:
            self._put_back(set(group.slots))
            index = mx.array(group.slots)
            conv, memory = self._conv[index], self._memory[index]
        if group.continued is not None:
            conv = mx.where(group.continued[:, None, None], conv, mx.zeros_like(conv))
            memory = mx.where(group.continued[:, None, None, None], memory, mx.zeros_like(memory))
        return conv, memory

    def write(self, group: Group, conv: mx.array, memory: mx.array) -> None:
        """Replace the states of the group's sequences."""
        self._aside[group.slots] = (conv, memory)

    def _put_back(self, wanted: set[int]) -> None:
        for slots in [slots for slots in self._aside if not wanted.isdisjoint(slots)]:
            conv, memory = self._aside.pop(slots)
            index = mx.array(slots)
            self._conv[index] = conv
            self._memory[index] = memory

    def get(self, slot: int) -> tuple[mx.array, mx.array]:
        """(conv, memory) of a slot."""
        self._put_back({slot})
        conv, memory = _gathered(self._conv, self._memory, mx.array([slot]))
        return conv[0], memory[0]

    def put(self, slot: int, pieces: tuple[mx.array, mx.array]) -> None:
        """Replace (conv, memory) of a slot."""
        self._put_back({slot})
        self._conv[slot], self._memory[slot] = pieces
        mx.eval(*self.arrays())

    def arrays(self) -> Iterator[mx.array]:
        """What a step must evaluate."""
        yield self._conv
        yield self._memory
        for state in self._aside.values():
            yield from state


def _gathered(one: mx.array, two: mx.array, index: mx.array) -> tuple[mx.array, mx.array]:
    """Copies, not slices: a view of a pool would keep it from being updated in place."""
    copies = one[index], two[index]
    mx.eval(*copies)
    return copies
