"""The machine beside a measurement: what memory the sides get, what the disk gives, what a process takes.

Memory is bounded and emptied by a memory cgroup (version 1, as root).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from mixbit.kernels.cpu._cpu import Access, ReadTimer
from mixbit.kernels.cpu.backend import READERS

_CGROUP = Path("/sys/fs/cgroup/memory/mixbit-bench")
_READ_BYTES, _READS, _TOGETHER = 512 << 10, 1500, 30  # an expert's long array; those of ten experts at a time
_EMPTY_TRIES = 20


class Memory:
    """A cgroup for the processes of the sides, so that what the page cache holds of their files is theirs.

    limit: bytes, page cache included; None for all that the machine has.
    """

    def __init__(self, limit: int | None) -> None:
        _CGROUP.mkdir(exist_ok=True)
        (_CGROUP / "memory.limit_in_bytes").write_text(str(-1 if limit is None else limit))

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Processes that are started here live in the cgroup."""
        (_CGROUP / "tasks").write_text(str(os.getpid()))
        try:
            yield
        finally:
            (_CGROUP.parent / "tasks").write_text(str(os.getpid()))

    def cached(self) -> int:
        """Bytes of files, mapped ones too."""
        fields = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return int(fields["total_cache"])

    def empty(self) -> None:
        """Have the system take back all it can: pages of files that nobody has locked, though they be mapped."""
        before = self.cached()
        for _ in range(_EMPTY_TRIES):
            with contextlib.suppress(OSError):  # busy: not all could be taken
                (_CGROUP / "memory.force_empty").write_text("0")
            if before - (before := self.cached()) < 1 << 20:
                return


class Disk:
    """What the disk gives for random reads of files past the page cache, as our store reads experts."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._counts = [file.stat().st_size // _READ_BYTES for file in files]
        room = _TOGETHER * (_READ_BYTES + mmap.PAGESIZE)
        names = [str(file) for file in files]
        self._timer = ReadTimer(files=names, access=Access.direct, threads=READERS, bytes=room)

    def rate(self) -> float:
        """Bytes per second now."""
        places = [
            [(file, _READ_BYTES * random.randrange(self._counts[file]), _READ_BYTES)]
            for file in random.choices(range(len(self._counts)), self._counts, k=_READS)
        ]
        return _READ_BYTES * _READS / self._timer.seconds(places, together=_TOGETHER)


@contextlib.contextmanager
def read_ahead(file: Path, kilobytes: int | None) -> Iterator[None]:
    """The disk that holds `file` reads so much around a page of a map that is not in memory; None: as it is set."""
    device = file.stat().st_dev
    place = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    setting = next(found for at in (place, place.parent) if (found := at / "queue/read_ahead_kb").exists())
    before = setting.read_text()
    if kilobytes is not None:
        setting.write_text(str(kilobytes))
    try:
        yield
    finally:
        setting.write_text(before)


class Peak(threading.Thread):
    """The most private and locked memory that a process has had while this runs."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._status, self._over, self.bytes = Path(f"/proc/{pid}/status"), threading.Event(), 0

    def run(self) -> None:
        while not self._over.wait(0.02):
            with contextlib.suppress(OSError):
                fields = dict(line.split(":", 1) for line in self._status.read_text().splitlines() if ":" in line)
                count = sum(int(fields[name].split()[0]) for name in ("RssAnon", "VmLck") if name in fields)
                self.bytes = max(self.bytes, 1024 * count)

    def stop(self) -> int:
        self._over.set()
        self.join()
        return self.bytes


def bytes_from_disk(pid: int) -> int:
    """What a process has had read, by faults of a map too."""
    fields = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(fields["read_bytes"])


def forget(files: Sequence[Path]) -> None:
    """Drop what the page cache holds of files that nobody has mapped."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
