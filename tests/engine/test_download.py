"""Resolving a model: directories, the demo, and a hub that is slow, broken, gated or away."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from mixbit.engine import download
from mixbit.engine.download import DownloadError, resolve_model
from mixbit.engine.loader import load
from tests.checkpoints import write_checkpoint
from tests.engine.fake_hub import COMMIT, FakeHub, fake_hub

NAME = "org/tiny-model"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A sharded checkpoint, and files that must not be fetched."""
    path = write_checkpoint(tmp_path_factory.mktemp("hub") / "model", "llama", shards=2)
    return {file.name: file.read_bytes() for file in path.iterdir()} | {
        "modeling_evil.py": b"import os",
        "pytorch_model.bin": b"pickle",
        "README.md": b"# model",
        "original/consolidated.safetensors": b"twice the bytes",
        "tokenizer_helper.py": b"import os",
    }


@pytest.fixture
def hub(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub({NAME: files, "org/pickles": {"config.json": b"{}", "pytorch_model.bin": b""}}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(download, "_POLL_SECONDS", 0.01)
        yield hub


def test_downloads_only_what_a_model_needs_and_then_needs_no_network(hub: FakeHub, files: dict[str, bytes]) -> None:
    calls: list[tuple[str, int, int]] = []
    path = resolve_model(NAME, progress=lambda *call: calls.append(call))
    wanted = {name for name in files if name.endswith((".json", ".safetensors")) and "/" not in name}
    assert {file.name for file in path.iterdir()} == wanted
    assert load(path).model_type == "llama"
    total = sum(len(files[name]) for name in wanted)
    downloading = [call for call in calls if call[0] == "downloading"]
    assert downloading[-1] == ("downloading", total, total)
    assert [done for _, done, _ in downloading] == sorted(done for _, done, _ in downloading)
    before = len(hub.requests)
    assert resolve_model(NAME) == path
    assert len(hub.requests) == before
    assert resolve_model(NAME, refresh=True) == path
    assert len(hub.requests) > before


def test_a_broken_transfer_is_resumed_where_it_broke(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits between its retries
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.break_after = 75_000
    assert load(resolve_model(NAME)).model_type == "llama"
    assert [line for line in hub.requests if "bytes=70000-" in line]


def test_a_download_that_failed_is_explained_and_completed_later(
    hub: FakeHub, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.break_after, hub.fail_after_break = 75_000, True
    with pytest.raises(DownloadError, match=r"org/tiny-model: http://127\.0\.0\.1:\d+ answers with HTTP status 500"):
        resolve_model(NAME)
    hub.broken = False
    finished = {f"GET /{NAME}/resolve/{COMMIT}/{file.name}" for file in (tmp_path / "hub").glob("*/snapshots/*/*")}
    hub.requests.clear()
    path = resolve_model(NAME)
    assert load(path).model_type == "llama"
    assert all((path / file.name).read_bytes() == files[file.name] for file in path.iterdir())
    assert not finished & set(hub.requests)


def test_revisions(hub: FakeHub) -> None:
    assert resolve_model(NAME, revision=COMMIT).name == COMMIT
    with pytest.raises(DownloadError, match="org/tiny-model: has no revision 'v9'"):
        resolve_model(NAME, revision="v9")


def test_unknown_gated_failing_and_unsuitable_repositories(hub: FakeHub) -> None:
    with pytest.raises(DownloadError, match="org/unknown: no such directory, and no such model at http"):
        resolve_model("org/unknown")
    with pytest.raises(DownloadError, match="org/pickles: not a model in safetensors format"):
        resolve_model("org/pickles")
    hub.gated.add(NAME)
    with pytest.raises(DownloadError, match=r"accept the terms at http://.*/org/tiny-model, then log in"):
        resolve_model(NAME)
    hub.gated.clear()
    hub.failing = True
    with pytest.raises(DownloadError, match="answers with HTTP status 500"):
        resolve_model(NAME)


def test_a_disk_that_is_too_small(hub: FakeHub) -> None:
    hub.claimed_size = 10**18
    with pytest.raises(DownloadError, match=r"are to be downloaded, but .* has .* GB free"):
        resolve_model(NAME)
    assert not [line for line in hub.requests if "/resolve/" in line]


def test_without_a_network(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        DownloadError, match=r"not \(wholly\) in the local cache, and http://127.0.0.1:9 cannot be reached"
    ):
        resolve_model(NAME)


def test_directories_and_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "demo").mkdir()
    assert resolve_model("org/name") == Path("org/name")
    monkeypatch.setattr(download, "ensure_demo", lambda progress: tmp_path / "the demo")
    assert resolve_model("demo") == tmp_path / "the demo"
    assert resolve_model("./demo") == Path("demo")
    with pytest.raises(DownloadError, match="--revision v1 is for models of the hub"):
        resolve_model("demo", revision="v1")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("/no/such/place", "/no/such/place: no such directory"),
        ("./missing", "./missing: no such directory"),
        ("a/b/c", "a/b/c: no such directory"),
        ("", "the name of the model is empty"),
        ("gpt-4", "gpt-4: no such directory, and not a hub id; those are ORG/NAME"),
        ("org/na me", "not a hub id"),
        ("model.gguf", "a file, not a model directory; convert it first: mixbit convert model.gguf OUT/"),
        ("notes.txt", "a file, not a model directory; give its directory"),
    ],
)
def test_names_that_cannot_be_models(
    reference: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").touch()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DownloadError) as error:
        resolve_model(reference)
    assert message in str(error.value)
