"""`mixbit generate` over a tiny model, in this process."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from mixbit.engine.tokenizer import load_tokenizer
from mixbit.server.cli.main import main
from tests.checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "moe"
    write_checkpoint(directory, "qwen3_moe")
    return directory


def generate(model: Path, *arguments: str) -> int:
    return main(["generate", "--model", str(model), "--device", "cpu", "--threads", "1", "--ignore-eos", *arguments])


def test_the_text_alone_is_on_stdout(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(model, "--prompt", "What is", "--tokens", "12", "--temperature", "0") == 0
    first = capsys.readouterr()
    assert first.out.strip()
    assert "preparing the device" in first.err
    assert generate(model, "--prompt", "What is", "--tokens", "12", "--temperature", "0") == 0
    assert capsys.readouterr().out == first.out


def test_timing_tells_where_the_time_went(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(model, "--prompt", "What is", "--tokens", "5", "--timing") == 0
    table = capsys.readouterr().err
    prompt = len(load_tokenizer(model).encode("What is", add_special_tokens=True))
    for words in ("attention", "moe", "batch_matvec", "tokens per second", f"prefill of {prompt}", "using cpu"):
        assert words in table


def test_timing_of_a_single_token_has_no_decode(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(model, "--prompt", "What is", "--tokens", "1", "--timing") == 0
    assert "tokens per second" in capsys.readouterr().err


def test_fewer_experts_change_the_text(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for k in ("3", "1"):
        assert generate(model, "--prompt", "What is", "--tokens", "30", "--temperature", "0", "--k", k) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] != texts[1]


def test_the_same_seed_writes_the_same_text(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        assert generate(model, "--prompt", "What is", "--tokens", "20", "--temperature", "1", "--seed", seed) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_chat_uses_the_template_and_a_dash_reads_stdin(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--tokens", "20", "--temperature", "0")
    assert generate(model, "--prompt", "What is", *options) == 0
    plain = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("What is"))
    assert generate(model, "--chat", "--prompt", "-", *options) == 0
    assert capsys.readouterr().out != plain


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", ""], "the prompt has no tokens"),
        (["--prompt", "a" * 9000], "maximum context length is 512 tokens"),
        (["--prompt", "a", "--top-p", "7"], "top_p is 7.0"),
        (["--prompt", "a", "--k", "99"], "99"),
        (["--prompt", "a", "--context-length", "100000"], "context_length is 100000"),
        (["--prompt", "\udcff"], "not valid UTF-8"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    model: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert generate(model, *arguments) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert words in errors[0]


def test_wrong_usage_exits_with_2(model: Path) -> None:
    with pytest.raises(SystemExit) as raised:
        generate(model, "--prompt", "a", "--tokens", "0")
    assert raised.value.code == 2
