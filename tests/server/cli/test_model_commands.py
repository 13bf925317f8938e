"""`mixbit convert`, `synth`, `inspect`, `download` and `doctor`: what they print, where, and how they end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from mixbit.engine import machine
from mixbit.engine.loader import load
from mixbit.kernels.registry import BackendError
from mixbit.server.cli.main import main
from tests.checkpoints import write_checkpoint
from tests.engine.fake_hub import fake_hub
from tests.engine.gguf_models import TinyGguf

Output = pytest.CaptureFixture[str]
COMMANDS = ["convert", "synth", "bench", "inspect", "download", "doctor"]


def widths(path: Path) -> dict[str, int | None]:
    schemes = {name: binding.scheme for name, binding in load(path).bindings.items()}
    return {name: None if scheme is None else scheme.bits for name, scheme in schemes.items()}


def test_help_is_light_and_fits_a_terminal() -> None:
    """No command imports a tensor library, or the hub's client, to print its help."""
    program = (
        "import contextlib, io, sys\n"
        "from mixbit.server.cli.main import main\n"
        f"for command in {COMMANDS}:\n"
        "    text = io.StringIO()\n"
        "    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):\n"
        "        main([command, '--help'])\n"
        "    assert 'examples:' in text.getvalue(), command\n"
        "    assert max(map(len, text.getvalue().splitlines())) <= 80, command\n"
        "heavy = {'numpy', 'mlx', 'gguf', 'huggingface_hub', 'tokenizers', 'rich'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], env={"COLUMNS": "80"}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_convert_gguf_then_requantize(tmp_path: Path, capsys: Output) -> None:
    source, first, second = TinyGguf(layers=1).write(tmp_path / "in.gguf"), tmp_path / "first", tmp_path / "second"
    assert main(["convert", str(source), str(first)]) == 0
    assert capsys.readouterr().out == f"{first}\n"
    assert set(widths(first).values()) == {4}
    options = ["--bits", "6", "--group-size", "32", "--override", "*.v_proj=3:64", "--override", "*.k_proj=none"]
    assert main(["convert", str(first), str(second), *options]) == 0
    found = widths(second)
    assert found.pop("model.layers.0.self_attn.v_proj") == 3
    assert found.pop("model.layers.0.self_attn.k_proj") is None
    assert set(found.values()) == {6}
    assert main(["convert", str(first), str(second)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["convert", str(first), str(second), "--force"]) == 0
    assert set(widths(second).values()) == {4}


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["missing.gguf", "out"], 1, "error: missing.gguf: no such file"),
        (["./missing", "out"], 1, "error: ./missing: no such directory"),
        (["broken.gguf", "out"], 1, "error: broken.gguf: not a GGUF file"),
        (["empty", "out"], 1, "not a model directory: it has no config.json"),
        (["broken.gguf", "out", "--bits", "4"], 2, "a GGUF file is imported as it is"),
        (["empty", "out", "--bits", "7"], 2, "7 bits: choose one of 1, 2, 3, 4, 5, 6, 8"),
        (["empty", "out", "--bits", "four"], 2, "invalid int value: 'four'"),
        (["empty", "out", "--override", "*.gate"], 2, "override '*.gate': expected GLOB=BITS"),
        (["empty", "out", "--group-size", "32"], 2, "--group-size has no effect without --bits"),
        (["empty"], 2, "the following arguments are required: OUT"),
        (["empty", "out", "--bit", "4"], 2, "unknown argument --bit; did you mean --bits?"),
    ],
)
def test_convert_refusals(
    arguments: list[str], status: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.gguf").write_bytes(b"not a model")
    (tmp_path / "empty").mkdir()
    try:
        result = main(["convert", *arguments])
    except SystemExit as stop:
        result = int(stop.code or 0)
    output = capsys.readouterr()
    assert result == status
    assert message in output.err
    assert output.out == ""
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["broken.gguf", "empty"]


def test_synth_writes_what_can_be_inspected(tmp_path: Path, capsys: Output) -> None:
    like, out = write_checkpoint(tmp_path / "like", "qwen3_5_moe"), tmp_path / "out"
    assert main(["synth", "--like", str(like), str(out), "--layers", "2", "--bits", "5", "--group-size", "32"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert set(widths(out).values()) == {5, 8}
    assert main(["synth", "--like", str(like), str(out)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["synth", "--like", str(like), str(out), "--layers", "1", "--bits", "16", "--force"]) == 0
    assert set(widths(out).values()) == {None}
    assert main(["synth", "--like", "nothing", str(tmp_path / "other")]) == 1
    assert "neither a config.json nor one of: qwen3-coder-next" in capsys.readouterr().err
    for wrong in (["--layers", "0"], ["--seed", "-1"], ["--bits", "7"], ["--override", "x"]):
        with pytest.raises(SystemExit) as stop:
            main(["synth", "--like", str(like), str(tmp_path / "other"), *wrong])
        assert stop.value.code == 2
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("columns", ["80", "120"])
def test_inspect_prints_a_table_that_fits(
    columns: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    path = write_checkpoint(
        tmp_path / "model", "qwen3_next", overrides={"*.mlp.gate": (8, 64), "*.switch_mlp.*": (2, 32)}
    )
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert lines[0] == str(path)
    assert max(map(len, lines[1:])) <= int(columns)
    assert "…" not in text
    rows = {" ".join(line.split()) for line in lines}
    assert "router 4 8x128 8 64 affine 4.61 kB 4.61 kB" in rows
    assert "experts gate/up 8 8x64x128 2 32 affine 262 kB 98.3 kB" in rows
    assert "delta net conv 2 448x4 f32 - dense 14.3 kB 14.3 kB" in rows
    assert "model.layers.*.mlp.gate 8 bits, group 64 in 4 layers" in rows
    assert [row for row in rows if row.startswith("verdict fits")]


def test_inspect_draws_the_load_of_experts(tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    path, text = write_checkpoint(tmp_path / "m", "qwen3_next"), tmp_path / "text.py"
    text.write_text("the capital of the lighthouse\n" * 4)
    assert main(["inspect", str(path), "--json", "--routing", str(text)]) == 0
    routing = json.loads(capsys.readouterr().out)["routing"]
    experts = len(routing["counts"][0])
    assert main(["inspect", str(path), "--routing", str(text)]) == 0
    out = capsys.readouterr().out
    rows = [line.split()[2] for line in out.splitlines() if line.startswith("layer ")]
    assert [len(row) for row in rows] == [experts] * 4
    dead = [(layer, e) for layer, row in enumerate(routing["counts"]) for e, count in enumerate(row) if not count]
    assert [(layer, e) for layer, row in enumerate(rows) for e, sign in enumerate(row) if sign == "x"] == dead
    for layer, expert in dead:
        assert f"layer {layer} expert {expert}" in out
    assert ("No dead experts" in out) == (not dead)
    assert main(["inspect", str(path), "--routing", str(tmp_path / "none.txt")]) == 1
    assert "none.txt: cannot be read" in capsys.readouterr().err


def test_inspect_json_is_all_of_stdout(tmp_path: Path, capsys: Output) -> None:
    path = write_checkpoint(tmp_path / "model", "qwen3_5")
    assert main(["inspect", str(path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["model_type"] == "qwen3_5"
    assert document["skipped"] == {"vision_tower": 1}
    assert document["memory"]["fits"] is True
    assert main(["inspect", str(tmp_path)]) == 1
    assert "it has no config.json" in capsys.readouterr().err


def test_download_prints_the_directory_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    source = write_checkpoint(tmp_path / "source", "llama")
    files = {file.name: file.read_bytes() for file in source.iterdir()}
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with fake_hub({"org/model": files}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        assert main(["download", "org/model", "--revision", "main"]) == 0
        path = Path(capsys.readouterr().out.removesuffix("\n"))
        assert load(path).model_type == "llama"
        assert main(["download", "org/other"]) == 1
        assert f"no such model at {hub.url}" in capsys.readouterr().err


def test_doctor_tells_what_runs_here(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    assert main(["doctor", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    runs = {backend["name"]: backend["available"] for backend in document["backends"]}
    assert runs[document["chosen"]]
    assert set(runs) == {"metal", "cuda", "mlx-cuda", "cpu"}
    assert 1 <= document["machine"]["usable_cores"] <= document["machine"]["cores"]
    assert 0 < document["machine"]["memory_available"] <= document["machine"]["memory_total"]
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "(chosen)" in text
    assert max(map(len, text.splitlines())) <= 80


def test_doctor_fails_where_nothing_runs(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    def none(device: str = "auto") -> None:
        raise BackendError("no backend can run here: cpu: not built")

    monkeypatch.setattr(machine, "choose", none)
    monkeypatch.setattr(machine, "availability", lambda: (("cpu", "not built"),))
    assert main(["doctor"]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "✗ cpu not built" in text
    assert "No backend can run here; the reasons stand above." in text
