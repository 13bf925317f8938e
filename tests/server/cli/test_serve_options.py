"""The options of `serve`: who may come in, under which names."""

from __future__ import annotations

import argparse
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from mixbit.engine import shipped
from mixbit.engine.download import resolve_model
from mixbit.server.cli import serve
from mixbit.server.settings import LOOPBACK_HOSTS
from tests.checkpoints import write_checkpoint


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.add_parser(parser.add_subparsers())
    return parser.parse_args(["serve", *arguments])


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "localhost", "LocalHost", "::1", "[::1]"])
def test_loopback(host: str) -> None:
    assert serve.is_loopback(host)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.168.1.5", "example.com", "localhost.example.com", "", "127.0.0.1.nip.io"]
)
def test_not_loopback(host: str) -> None:
    assert not serve.is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5"])
def test_other_machines_need_a_key_or_a_word(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MIXBIT_API_KEY", raising=False)
    with pytest.raises(serve.ServeError, match="--allow-unauthenticated"):
        serve.run(parse("--host", host))


def test_keys_of_all_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nfrom-file\n\n  spaced  \n")
    monkeypatch.setenv("MIXBIT_API_KEY", "from-environment")
    args = parse("--api-key", "one", "--api-key", "two", "--api-key-file", str(file))
    assert serve.read_keys(args) == ("one", "two", "from-environment", "from-file", "spaced")
    monkeypatch.delenv("MIXBIT_API_KEY")
    assert serve.read_keys(parse()) == ()


def test_sources_without_a_key_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MIXBIT_API_KEY", raising=False)
    empty = tmp_path / "keys"
    empty.write_text("# none\n")
    for arguments in (
        ["--api-key-file", str(empty)],
        ["--api-key-file", str(tmp_path / "missing")],
        ["--api-key", " "],
    ):
        with pytest.raises(serve.ServeError):
            serve.read_keys(parse(*arguments))
    monkeypatch.setenv("MIXBIT_API_KEY", "")
    with pytest.raises(serve.ServeError, match="empty"):
        serve.read_keys(parse())


def test_who_may_come_in() -> None:
    local = serve.access_rules(parse(), ())
    assert local.hosts == LOOPBACK_HOSTS
    assert not local.origins
    named = serve.access_rules(
        parse("--host", "::1", "--allow-host", "My.Machine", "--allow-origin", "http://a"), ("k",)
    )
    assert named.hosts == LOOPBACK_HOSTS | {"my.machine"}
    assert named.origins == {"http://a"}
    assert named.keys == ("k",)
    assert serve.access_rules(parse("--host", "0.0.0.0"), ("k",)).hosts is None
    limited = serve.access_rules(parse("--host", "0.0.0.0", "--allow-host", "my.machine"), ("k",)).hosts
    assert limited == LOOPBACK_HOSTS | {"0.0.0.0", "my.machine"}


def test_names(tmp_path: Path) -> None:
    directory = tmp_path / "snapshot-of-it"
    directory.mkdir()
    assert serve.served_names("demo", directory, None, []) == ("snapshot-of-it",)
    assert serve.served_names("org/name", directory, None, []) == ("org/name",)
    assert serve.served_names(f"{directory}/", directory, None, []) == ("snapshot-of-it",)
    assert serve.served_names("org/name", directory, "mine", ["a", "mine"]) == ("mine", "a")


def test_models_wanted(tmp_path: Path) -> None:
    odd = tmp_path / "a=b"
    odd.mkdir()
    assert serve.models_wanted(parse())[0] == ("demo", [])
    assert serve.models_wanted(parse("--model", "x", "--alias", "y")) == [("x", ["y"])]
    assert serve.models_wanted(parse("--model", "x=y", "--model", str(odd))) == [("x", ["y"]), (str(odd), [])]


def test_what_ships_is_served_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "find_spec", lambda name: ModuleSpec(name, None, is_package=True))
    assert serve.models_wanted(parse()) == [("demo", [])]
    spec = ModuleSpec("mixbit.models", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(shipped, "find_spec", lambda name: spec)
    assert serve.models_wanted(parse()) == [("demo", [])]
    coder = write_checkpoint(tmp_path / "tiny-coder", "qwen3_next")
    assert serve.models_wanted(parse()) == [("demo", []), ("tiny-coder", ["autocomplete"])]
    assert serve.models_wanted(parse("--alias", "x")) == [("demo", ["x"])]
    assert resolve_model("tiny-coder") == coder
    assert serve.served_names("tiny-coder", coder, None, []) == ("tiny-coder",)


def test_no_package_of_models_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "find_spec", lambda name: None)
    assert shipped.default_models() == ["demo"]
    assert shipped.shipped_model("tiny-coder") is None
    assert shipped.shipped_model("../tiny-coder") is None


@pytest.mark.parametrize(
    ("text", "count"), [("123", 123), ("2G", 2**31), ("1.5g", 3 * 2**29), ("512MiB", 2**29), ("4KB", 4096)]
)
def test_sizes(text: str, count: int) -> None:
    assert parse("--cache-memory", text).cache_memory == count


@pytest.mark.parametrize("text", ["", "G", "2X", "1e999", "nan", "2GG", "-1G"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(SystemExit):
        parse(f"--cache-memory={text}")
