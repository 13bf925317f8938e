"""The files of the disk cache."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mixbit.engine.disk_store import DiskStore, clear, entries, models


def store(root: Path, limit: int = 1 << 20, model: str = "m") -> DiskStore:
    return DiskStore(root, model, about="a model", limit=limit)


def put(where: DiskStore, name: str, data: bytes, ancestors: tuple[str, ...] = ()) -> None:
    where.write(name, memoryview(data), ancestors)
    where.flush(10)


def test_an_entry_survives_the_process_that_wrote_it(tmp_path: Path) -> None:
    put(store(tmp_path / "c"), "b-1", b"contents")
    again = store(tmp_path / "c")
    assert "b-1" in again
    assert bytes(again.read("b-1") or b"") == b"contents"
    assert again.read("b-2") is None
    assert "b-1" not in store(tmp_path / "c", model="other")


def test_directories_and_files_are_private(tmp_path: Path) -> None:
    root = tmp_path / "c"
    root.mkdir(mode=0o755)
    put(store(root), "b-1", b"contents")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (root, root / "m", root / "m" / "b-1")}
    assert modes == {"c": 0o700, "m": 0o700, "b-1": 0o600}


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "mark"])
def test_a_broken_entry_is_a_miss_and_is_deleted(tmp_path: Path, damage: str) -> None:
    put(store(tmp_path), "b-1", b"contents" * 100)
    path = tmp_path / "m" / "b-1"
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[:-1]
    elif damage == "empty":
        data = bytearray()
    else:
        data[0 if damage == "mark" else -1] ^= 1
    path.write_bytes(data)
    again = store(tmp_path)
    assert again.read("b-1") is None
    assert not path.exists()
    assert "b-1" not in again


def test_the_least_recently_used_goes_first_and_reading_refreshes(tmp_path: Path) -> None:
    one = store(tmp_path, limit=4000)
    for number in range(3):
        put(one, f"b-{number}", bytes(1000))
        os.utime(tmp_path / "m" / f"b-{number}", (1000 + number, 1000 + number))
    assert one.read("b-0") is not None
    put(one, "b-3", bytes(1000))
    put(one, "b-4", bytes(1000))
    left = {entry.path.name for entry in entries(tmp_path)}
    assert {"b-0", "b-4"} <= left
    assert "b-1" not in left
    assert sum(entry.size for entry in entries(tmp_path)) <= 4000
    assert "b-1" not in one


def test_what_an_entry_stands_on_is_used_with_it(tmp_path: Path) -> None:
    one = store(tmp_path)
    put(one, "b-1", b"1")
    os.utime(tmp_path / "m" / "b-1", (1000, 1000))
    put(one, "b-2", b"2", ("b-1",))
    assert time.time() - (tmp_path / "m" / "b-1").stat().st_mtime < 60


def test_a_failing_disk_ends_writing_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one = store(tmp_path)
    put(one, "b-1", b"contents")

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        put(one, "b-2", b"contents")
        put(one, "b-3", b"contents")
    assert not one.writing
    assert [record.message for record in caplog.records if "No space left" in record.message] != []
    assert len(caplog.records) == 1
    assert one.read("b-1") is not None
    assert [path.name for path in (tmp_path / "m").iterdir() if path.name.startswith(".new-")] == []


def test_a_directory_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "c").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError, match="not a directory of this user"):
        store(tmp_path / "c")


def test_clear(tmp_path: Path) -> None:
    put(store(tmp_path), "b-1", bytes(500))
    assert list(models(tmp_path).values()) == ["a model"]
    assert clear(tmp_path) > 500
    assert list(entries(tmp_path)) == []
    assert clear(tmp_path / "none") == 0


WRITER = """
import sys
from mixbit.engine.disk_store import DiskStore
from pathlib import Path
store = DiskStore(Path(sys.argv[1]), "m", about="a model", limit=1 << 30, queue_bytes=1 << 20)
for number in range(1_000_000):
    while not store.room:
        pass
    store.write(f"b-{number % 50}", memoryview(bytes([number % 50]) * 300_000))
    store.delete(f"b-{(number + 25) % 50}")
"""


def test_killed_at_any_moment_it_leaves_whole_entries_or_none(tmp_path: Path) -> None:
    inside = 0
    for round_ in range(6):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)])
        directory, deadline = tmp_path / "m", time.monotonic() + 20
        while not list(directory.glob("b-*")):
            assert time.monotonic() < deadline
        time.sleep(0.013 * round_)
        while not list(directory.glob(".new-*")):  # in the middle of a write
            assert time.monotonic() < deadline
        writer.kill()
        writer.wait()
        inside += bool(list(directory.glob(".new-*")))
        again = store(tmp_path, limit=1 << 30)
        for name in again.names():
            found = again.read(name)
            assert found is not None
            assert found.tobytes() == bytes([int(name[2:])]) * 300_000
    assert inside > 0
