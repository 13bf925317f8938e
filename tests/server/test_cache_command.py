"""`mixbit cache` and the flags of the disk cache."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from mixbit.engine.disk_store import DiskStore, entries
from mixbit.server.cli.main import main
from tests.server.running import start


def test_ls_shows_each_model_and_clear_deletes_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    root = tmp_path / "mixbit" / "prefixes"
    assert main(["cache", "ls"]) == 0
    assert "0 entries" in capsys.readouterr().out
    store = DiskStore(root, "fingerprint", about="some-model", limit=1 << 30)
    store.write("b-1", memoryview(bytes(3_000_000)))
    store.flush(10)
    assert main(["cache", "ls"]) == 0
    shown = capsys.readouterr().out
    assert "some-model" in shown
    assert "3.0" in shown
    assert main(["cache", "clear"]) == 0
    assert "3.0 MB deleted" in capsys.readouterr().out
    assert list(entries(root)) == []


def test_a_server_keeps_prefixes_on_disk_unless_told_not_to(demo_checkpoint: Path, tmp_path: Path) -> None:
    body = {"model": demo_checkpoint.name, "prompt": "one two three " * 20, "max_tokens": 2, "temperature": 0}
    cached = {}
    for name, flags in (("first", ()), ("second", ()), ("off", ("--no-disk-cache",))):
        with start("--model", str(demo_checkpoint), "--disk-cache", str(tmp_path / "disk"), *flags) as server:
            answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            cached[name] = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached["first"] == cached["off"] == 0
    assert cached["second"] >= 32
