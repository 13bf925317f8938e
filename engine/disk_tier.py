"""The prefix cache's second tier: blocks and states on disk, written behind, read when a prompt begins.

An entry is named by a hash over the model's fingerprint and all tokens up to its end, so that a name that fits is
a prefix that fits: `b-HASH` for a block, `s-POSITION-HASH` for a recurrent state. A state within a block has that
part of the block as an entry of its own.
"""

from __future__ import annotations

import hashlib
import logging
from array import array
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mixbit.engine.config import EngineConfig
from mixbit.engine.disk_restore import Device, Restore
from mixbit.engine.disk_store import DiskStore
from mixbit.engine.prefix_cache import Checkpoint, Node, PrefixCache
from mixbit.engine.runner import Runner
from mixbit.engine.scheduler import Scheduler

log = logging.getLogger("mixbit.engine")

_READERS = 4


class DiskTier:
    """Fills the cache from the disk before a request begins, and the disk from the cache behind it.

    For the device's thread.
    """

    def __init__(self, store: DiskStore, scheduler: Scheduler, runner: Runner, fingerprint: str) -> None:
        self._store, self._scheduler, self._runner = store, scheduler, runner
        self._cache: PrefixCache = scheduler.cache
        self._new: deque[Node | Checkpoint] = deque()
        self._cache.inserted = self._new
        self._root = bytes.fromhex(fingerprint)
        self._positions = {int(name.split("-")[1]) for name in store.names() if name.startswith("s-")}
        readers = ThreadPoolExecutor(_READERS, thread_name_prefix="disk cache reader")
        self._device = Device(store, scheduler, runner, readers)
        self._restores: dict[str, Restore] = {}  # by the name of the last entry

    # --- from the disk ---

    def restore(self, tokens: Sequence[int]) -> Restore | None:
        """What the disk has of a prompt beyond what memory has, now on its way; None if that is nothing.

        The same prefix is read once for all that ask while it is on its way.
        """
        size, limit = self._cache.block_size, len(tokens) - 1
        length, names = self._known(tokens, self._chain(tokens), limit)
        if length < self._cache.match(tokens, limit).length + size:
            return None
        found = self._restores.get(names[-1])
        if found is None or found.closed:
            state = names.pop() if self._cache.recurrent else None
            found = Restore(self._device, tokens, length, names, state)
            self._restores = {name: each for name, each in self._restores.items() if not each.closed}
            self._restores[state or names[-1]] = found
        return found

    def _known(self, tokens: Sequence[int], keys: list[bytes], limit: int) -> tuple[int, list[str]]:
        """The longest usable prefix on disk: its length, and the names of its entries (the state's the last)."""
        size, store = self._cache.block_size, self._store
        whole = 0
        while whole < len(keys) - 1 and _block(keys[whole + 1]) in store:
            whole += 1
        blocks = [_block(key) for key in keys[1 : whole + 1]]
        if not self._cache.recurrent:
            return whole * size, blocks
        for position in sorted((p for p in self._positions if p <= min(limit, (whole + 1) * size)), reverse=True):
            full = position // size
            key = keys[full] if position % size == 0 else _key(keys[full], tokens[full * size : position])
            part = [_block(key)] if position % size else []
            if full <= whole and all(name in store for name in (_state(position, key), *part)):
                return position, [*blocks[:full], *part, _state(position, key)]
        return 0, []

    # --- to the disk ---

    @property
    def pending(self) -> bool:
        """Whether there is more to write."""
        return bool(self._new)

    def save(self, count: int) -> bool:
        """Hand over to the writing thread what is new, a few entries; false if it has no room now."""
        if self._new:
            self._runner.make(self._scheduler.moves)  # some may not have reached their place yet
        while self._new and count:
            if not self._store.writing:
                self._new.clear()
                self._cache.inserted = None
                return True
            if not self._store.room:
                return False
            count -= self._save(self._new.popleft())
        return True

    def close(self, seconds: float) -> None:
        """Write what can be written in so many seconds."""
        while self.pending and self.save(64):
            pass
        self._store.flush(seconds)

    def _save(self, item: Node | Checkpoint) -> bool:
        """Whether anything was exported."""
        if item.saved or not item.alive:
            return False
        item.saved = True
        executor, size = self._runner.executor, self._cache.block_size
        if isinstance(item, Node):
            if len(item.tokens) < size:
                return False  # of use with a state only, which brings it
            keys = self._keys(item)
            return self._write(_block(keys[-1]), executor.export_block(item.block).data, keys[:-1])
        node = item.node
        if node is None:
            return False
        keys = self._keys(node)
        if item.place < size:
            keys[-1] = _key(keys[-2] if len(keys) > 1 else self._root, node.tokens[: item.place])
            self._write(_block(keys[-1]), executor.export_block(node.block).data, keys[:-1])
        self._positions.add(item.position)
        return self._write(_state(item.position, keys[-1]), executor.export_state(item.slot).data, keys)

    def _write(self, name: str, data: memoryview, ancestors: list[bytes]) -> bool:
        if name in self._store:
            return False
        self._store.write(name, data, [_block(key) for key in ancestors])
        return True

    def _keys(self, node: Node) -> list[bytes]:
        """Keys of the path to a node, from the first block on. Each is made once."""
        path: list[Node] = []
        while node.parent is not None:
            path.append(node)
            node = node.parent
        keys, key = [], self._root
        for step in reversed(path):
            if not step.key:
                step.key = _key(key, step.tokens)
            key = step.key
            keys.append(key)
        return keys

    def _chain(self, tokens: Sequence[int]) -> list[bytes]:
        """The root's key, then that of each full block."""
        size, keys = self._cache.block_size, [self._root]
        for start in range(0, len(tokens) - size + 1, size):
            keys.append(_key(keys[-1], tokens[start : start + size]))
        return keys


def _key(parent: bytes, tokens: Sequence[int]) -> bytes:
    return hashlib.blake2b(parent + array("i", tokens).tobytes(), digest_size=20).digest()


def _block(key: bytes) -> str:
    return f"b-{key.hex()}"


def _state(position: int, key: bytes) -> str:
    return f"s-{position}-{key.hex()}"


def fingerprint(config: EngineConfig, *layout: object) -> str:
    """Hash of all that the cached values depend on: the checkpoint's files, how they are run, the layout.

    Of weight files name, size and time are taken, of all others (configuration, tokenizer, templates) the contents.
    """
    digest = hashlib.blake2b(digest_size=20)
    for file in sorted(Path(config.model).iterdir()):
        if file.suffix == ".safetensors":
            status = file.stat()
            digest.update(repr((file.name, status.st_size, status.st_mtime_ns)).encode())
        elif file.suffix in {".json", ".jinja", ".model"} and file.is_file():
            digest.update(repr((file.name, hashlib.blake2b(file.read_bytes()).hexdigest())).encode())
    settings = (config.block_size, config.top_k_experts, config.dtype, config.isa, config.precision)
    digest.update(repr((settings, layout)).encode())
    return digest.hexdigest()


def open_tier(config: EngineConfig, scheduler: Scheduler, runner: Runner, backend: str) -> DiskTier | None:
    """The tier in the directory that the configuration names; None, with a warning, if it cannot be used."""
    if config.disk_cache is None:
        return None
    executor = runner.executor
    mark = fingerprint(config, backend, executor.export_block(0).nbytes, executor.export_state(0).nbytes)
    try:
        store = DiskStore(
            Path(config.disk_cache), mark, about=Path(config.model).resolve().name, limit=config.disk_cache_bytes
        )
    except OSError as error:
        log.warning("the disk cache is off: %s", error)
        return None
    return DiskTier(store, scheduler, runner, mark)
