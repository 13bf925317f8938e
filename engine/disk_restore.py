"""A prefix on its way from the disk into the cache: threads read it, the device's thread takes it in between steps."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass

import numpy as np

from mixbit.engine.disk_store import DiskStore
from mixbit.engine.prefix_cache import Checkpoint, Node
from mixbit.engine.runner import Runner
from mixbit.engine.scheduler import Scheduler

log = logging.getLogger("mixbit.engine")

_READ_AHEAD = 32  # entries


@dataclass(frozen=True, eq=False)
class Device:
    """Where entries come from and go to."""

    store: DiskStore
    scheduler: Scheduler
    runner: Runner
    readers: Executor


class Restore:
    """The first `length` of `tokens`, from entries named `blocks` from the root on, and `state` of a recurrent model.

    What the cache has already, or gets meanwhile, is left as it is. Until `close`, what has arrived stays there. For
    the device's thread.
    """

    def __init__(
        self, device: Device, tokens: Sequence[int], length: int, blocks: Sequence[str], state: str | None
    ) -> None:
        self._device, self._cache = device, device.scheduler.cache
        self._tokens, self._length = tokens, length
        self._node = self._here()
        self._cache.acquire(self._node)
        self._names = deque([*([state] if state else ()), *blocks[self._node.depth :]])
        self._reading: deque[tuple[str, Future[memoryview | None]]] = deque()
        self._state_name = state
        self._state: memoryview | None = None
        self.closed = False
        self._read_ahead()

    def advance(self, seconds: float, *, waiting: bool) -> bool:
        """Take in what has been read, for about so long; whether this is over, and closed.

        waiting: there is nothing else to do for so long.
        """
        end = time.monotonic() + seconds
        self._device.runner.make(self._device.scheduler.moves)  # before blocks and slots that they touch are used anew
        while self._reading:
            name, data = self._reading[0]
            if waiting:
                wait([data], max(0.0, end - time.monotonic()))
            if not data.done():
                return False
            self._reading.popleft()
            self._read_ahead()
            if not self._take(name, data.result()):
                break
            if self._reading and time.monotonic() > end:
                return False
        else:
            self._take_state()
        self.close()
        return True

    def close(self) -> None:
        """Read no more, and let go of what has arrived: it stays until its memory is wanted."""
        self.closed = True
        for _, data in self._reading:
            data.cancel()
        self._reading.clear()
        self._names.clear()
        self._cache.release(self._node)

    def _here(self) -> Node:
        """The deepest whole block of the prefix that is in the cache."""
        size, node = self._cache.block_size, self._cache.root
        while (node.depth + 1) * size <= self._length:
            child = node.children.get(self._piece(node))
            if child is None:
                break
            node = child
        return node

    def _piece(self, node: Node) -> tuple[int, ...]:
        """The prefix's tokens in the block after `node`."""
        size = self._cache.block_size
        return tuple(self._tokens[node.depth * size : min((node.depth + 1) * size, self._length)])

    def _read_ahead(self) -> None:
        while self._names and len(self._reading) < _READ_AHEAD:
            name = self._names.popleft()
            self._reading.append((name, self._device.readers.submit(self._device.store.read, name)))

    def _take(self, name: str, data: memoryview | None) -> bool:
        """Put an entry into its place; false if that cannot be, and all that follows is of no use."""
        cache, store = self._cache, self._device.store
        if data is None:
            return False
        if name == self._state_name:
            self._state = data
            return True
        piece = self._piece(self._node)
        if (child := self._node.children.get(piece)) is not None:  # computed meanwhile
            cache.acquire(child)
            cache.release(self._node)
            self._node = child
            return True
        if cache.available <= len(self._device.scheduler.running):
            return False
        (block,) = cache.take_blocks(1)
        try:
            self._device.runner.executor.import_block(block, np.frombuffer(data, np.uint8))
        except Exception:  # whatever is wrong with an entry, its tokens can be computed
            log.exception("an entry of the disk cache cannot be used: %s", name)
            cache.blocks.give_back([block])
            store.delete(name)
            return False
        if len(piece) == cache.block_size:
            self._node = cache.extend(self._node, piece, block, {})
            self._node.saved = True
        else:
            cache.leave(self._node, piece, block, {})
        return True

    def _take_state(self) -> None:
        node, cache = self._node, self._cache
        if self._state is None:
            return
        rest = tuple(self._tokens[node.depth * cache.block_size : self._length])
        end = next((child for child in node.children.values() if child.tokens[: len(rest)] == rest), None)
        end = end if rest else node
        if end is None or (slot := cache.take_slot(lasting=True)) is None:
            return
        try:
            self._device.runner.executor.import_state(slot, np.frombuffer(self._state, np.uint8))
        except Exception:
            log.exception("a state from the disk cache cannot be used")
            cache.slots.give_back([slot])
            return
        home: dict[int, Checkpoint] = {}
        cache.keep(slot, self._length, home, lasting=True).saved = True
        cache.adopt(end, home)
