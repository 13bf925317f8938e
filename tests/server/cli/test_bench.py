"""`mixbit bench`: its table, JSON and plot on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mixbit.server.cli.main import main
from tests.checkpoints import write_checkpoint

Output = pytest.CaptureFixture[str]
QUICK = ["--prompt", "16", "--contexts", "16,8", "--batches", "2", "--tokens", "2", "--repeat", "1", "--threads", "1"]


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(write_checkpoint(tmp_path / "model", "llama"))


def test_json_is_all_of_stdout(model: str, capsys: Output) -> None:
    assert main(["bench", model, *QUICK, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    rows = [(each["work"], each["context"], each["sequences"]) for each in document["measurements"]]
    assert rows == [("prefill", 16, 1), ("decode", 8, 1), ("decode", 16, 1), ("decode", 8, 2)]
    assert document["bandwidth"] > 0


def test_table_and_plot(model: str, tmp_path: Path, capsys: Output) -> None:
    assert main(["bench", model, *QUICK, "--plot", str(tmp_path / "speed.png")]) == 0
    output = capsys.readouterr()
    rows = [" ".join(line.replace("│", " ").split()) for line in output.out.splitlines()]
    for start in ("prefill 16 ", "decode at 8 ", "decode at 16 ", "decode at 8, 2 together "):
        assert [row for row in rows if row.startswith(start)], start
    assert f"written: {tmp_path / 'speed.png'}" in output.err
    header = (tmp_path / "speed.png").read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert int.from_bytes(header[16:20]) == 1200


def test_a_plot_without_matplotlib_is_refused_at_once(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", model, "--plot", "out.png"]) == 1
    output = capsys.readouterr()
    assert "pip install 'mixbit[plot]'" in output.err
    assert output.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contexts", "128,x"], "'x' is not a number above 0"),
        (["--batches", "0"], "'0' is not a number above 0"),
        (["--context", "128"], "did you mean --contexts?"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: Output) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_more_tokens_than_the_model_was_made_for(model: str, capsys: Output) -> None:
    assert main(["bench", model, "--contexts", "8192"]) == 1
    assert "the model was made for 512" in capsys.readouterr().err
