"""The files of the disk cache: one entry a file, checked when read, written whole or not at all.

Layout: ROOT/MODEL/NAME, where MODEL is a fingerprint of all that the contents depend on. An entry is a mark, the
BLAKE2b digest of the contents, and the contents. Directories are for their owner alone (0700), files too (0600).
What is used least recently, by modification time, goes first when the files of all models exceed the limit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import queue
import shutil
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger("mixbit.engine")

_MARK = b"MIXBIT-PREFIX-1\n"
_DIGEST = 32
_ABOUT = "about.json"
_TEMPORARY = ".new-"
_STALE_SECONDS = 60.0  # a path whose parent was used longer ago is marked as used again


def _digest(data: bytes | memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST).digest()


@dataclass(frozen=True)
class _Job:
    name: str
    data: memoryview
    ancestors: Sequence[str]  # names of the entries that this one is of no use without, the nearest last


class DiskStore:
    """Entries of one model. Reading is for any thread; `write` queues for a thread of its own."""

    def __init__(self, root: Path, model: str, *, about: str, limit: int, queue_bytes: int = 128 << 20) -> None:
        """about: the model's name for people. limit: bytes of all models' entries. Raises OSError."""
        self._root, self._directory, self._limit = root, root / model, limit
        self._queue_bytes = queue_bytes
        _make_private(root)
        _make_private(self._directory)
        if models(root).get(self._directory) != about:  # else a full disk can still be read
            (self._directory / _ABOUT).write_text(json.dumps({"model": about}))
        self._names = {path.name for path in self._directory.iterdir() if not path.name.startswith(".")} - {_ABOUT}
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._queued = 0
        self._total = 0  # bytes of all models' entries, about
        self.writing = True  # until something goes wrong
        threading.Thread(target=self._work, name="disk cache", daemon=True).start()

    @property
    def room(self) -> bool:
        """Whether more may be queued for writing now."""
        return self._queued < self._queue_bytes

    @property
    def queued(self) -> int:
        """Bytes that are not written yet."""
        return self._queued

    def names(self) -> set[str]:
        """Names of the entries that are there, or were a moment ago."""
        return set(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def read(self, name: str) -> memoryview | None:
        """The contents of an entry, which now counts as used. None if it is not there; a broken one is deleted."""
        path = self._directory / name
        try:
            data = path.read_bytes()
            body = memoryview(data)[len(_MARK) + _DIGEST :]
            if data.startswith(_MARK) and data[len(_MARK) : len(_MARK) + _DIGEST] == _digest(body):
                os.utime(path)
                return body
            log.warning("an entry of the disk cache is broken and is deleted: %s", path)
        except OSError:
            pass
        self.delete(name)
        return None

    def delete(self, name: str) -> None:
        """Remove an entry, if it is there."""
        self._names.discard(name)
        with contextlib.suppress(OSError):
            (self._directory / name).unlink()

    def write(self, name: str, data: memoryview, ancestors: Sequence[str] = ()) -> None:
        """Queue an entry for writing."""
        with self._lock:
            self._queued += data.nbytes
        self._jobs.put(_Job(name, data, ancestors))

    def flush(self, seconds: float) -> None:
        """Wait until all is written, at most so long."""
        end = time.monotonic() + seconds
        while self._queued and self.writing and time.monotonic() < end:
            time.sleep(0.01)

    # --- the writing thread ---

    def _work(self) -> None:
        try:
            for path in self._directory.glob(_TEMPORARY + "*"):  # left by a process that was killed
                if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    path.unlink()
            self._trim()
        except OSError:
            log.debug("the disk cache could not be tidied", exc_info=True)
        while True:
            job = self._jobs.get()
            try:
                if self.writing and job.name not in self._names:
                    self._store(job)
            except OSError as error:
                self.writing = False
                log.warning("%s cannot be written to and takes no more entries: %s", self._root, error)
            finally:
                with self._lock:
                    self._queued -= job.data.nbytes

    def _store(self, job: _Job) -> None:
        temporary = self._directory / f"{_TEMPORARY}{os.getpid()}"
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(_MARK + _digest(job.data))
                file.write(job.data)
            temporary.replace(self._directory / job.name)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        self._names.add(job.name)
        self._refresh(job.ancestors)
        self._total += job.data.nbytes
        if self._total > self._limit:
            self._trim()

    def _refresh(self, ancestors: Sequence[str]) -> None:
        """Whoever uses an entry uses what it stands on."""
        with contextlib.suppress(OSError):
            if ancestors and time.time() - (self._directory / ancestors[-1]).stat().st_mtime > _STALE_SECONDS:
                for name in ancestors:
                    os.utime(self._directory / name)

    def _trim(self) -> None:
        """Delete the least recently used entries of all models, until nine tenths of the limit are used."""
        found = sorted((entry for entry in entries(self._root)), key=lambda entry: entry.used)
        self._total = sum(entry.size for entry in found)
        if self._total <= self._limit:
            return
        for entry in found:
            if self._total <= self._limit * 9 // 10:
                break
            with contextlib.suppress(OSError):
                entry.path.unlink()
            self._total -= entry.size
            if entry.path.parent == self._directory:
                self._names.discard(entry.path.name)


@dataclass(frozen=True)
class Entry:
    """A file of the cache. used: seconds since the epoch."""

    path: Path
    size: int
    used: float


def entries(root: Path) -> Iterator[Entry]:
    """Every entry of every model."""
    for directory in _directories(root):
        with contextlib.suppress(OSError), os.scandir(directory) as files:
            for file in files:
                if file.name != _ABOUT and not file.name.startswith("."):
                    with contextlib.suppress(OSError):
                        status = file.stat(follow_symlinks=False)
                        yield Entry(Path(file.path), status.st_size, status.st_mtime)


def models(root: Path) -> dict[Path, str]:
    """The directory of each model, with the model's name for people."""
    found = {}
    for directory in _directories(root):
        try:
            found[directory] = str(json.loads((directory / _ABOUT).read_text())["model"])
        except (OSError, ValueError, KeyError, TypeError):
            found[directory] = "unknown"
    return found


def clear(root: Path) -> int:
    """Delete every entry of every model; the bytes that they had."""
    freed = sum(entry.size for entry in entries(root))
    for directory in _directories(root):
        shutil.rmtree(directory, ignore_errors=True)
    return freed


def _directories(root: Path) -> list[Path]:
    try:
        return sorted(path for path in root.iterdir() if path.is_dir() and not path.is_symlink())
    except OSError:
        return []


def _make_private(directory: Path) -> None:
    """A directory that only its owner, this user, can look into. Raises OSError."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise PermissionError(f"{directory} is not a directory of this user")
    if stat.S_IMODE(status.st_mode) != 0o700:
        directory.chmod(0o700)
