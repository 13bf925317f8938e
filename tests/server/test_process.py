"""The life of a server process: how it starts, is refused, breaks, and ends."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.server.running import RunningServer, command, run, start, until
from tests.server.support import error_of

CHAT = "/v1/chat/completions"
LONG: dict[str, Any] = {
    "messages": [{"role": "user", "content": "hello"}],
    "max_tokens": 3900,
    "ignore_eos": True,
    "stream": True,
}
SHORT: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}


def refusal_of(result: subprocess.CompletedProcess[str], status: int = 1) -> str:
    """The one line on stderr of a command that failed as it should."""
    assert result.returncode == status, result
    assert "Traceback" not in result.stderr + result.stdout
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return line


def test_startup_tells_the_way_in(tiny_server: RunningServer) -> None:
    text = tiny_server.text()
    for words in (
        "tiny-llama",
        "org/alias",
        "4-bit, group 64; 8-bit: 3 matrices",
        "cpu",
        "4,096 tokens",
        "this machine",
    ):
        assert words in text
    (line,) = [line for line in text.splitlines() if line.startswith("curl ")]
    answer = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    if answer.returncode != 127:  # no curl here
        assert json.loads(answer.stdout)["object"] == "chat.completion"


def test_port_in_use(tiny_checkpoint: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refusal_of(run("serve", "--model", str(tiny_checkpoint), "--port", str(port)))
    assert f"port {port}" in line
    assert "--port" in line


def test_no_such_model(tmp_path: Path) -> None:
    line = refusal_of(run("serve", "--port", "0", "--model", str(tmp_path / "nothing")))
    assert "nothing" in line


def test_not_a_model(tmp_path: Path) -> None:
    assert str(tmp_path) in refusal_of(run("serve", "--port", "0", "--model", str(tmp_path)))


def test_unsupported_model_type(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for file in tiny_checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "mystery"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    line = refusal_of(run("serve", "--port", "0", "--model", str(tmp_path)))
    assert "mystery" in line
    assert "qwen3_moe" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "--modle", "x"], ["--modle", "--model"]),
        (["serve", "--port", "70000"], ["70000", "65535"]),
        (["serve", "--cache-memory", "lots"], ["lots", "512M"]),
        (["serve", "stray"], ["--model stray"]),
        (["sevre"], ["sevre", "serve"]),
    ],
)
def test_wrong_usage(arguments: list[str], words: list[str]) -> None:
    line = refusal_of(run(*arguments), status=2)
    assert all(word in line for word in words)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--host", "0.0.0.0"], "--allow-unauthenticated"),
        (["--host", "no.such.host.invalid", "--allow-unauthenticated"], "no.such.host.invalid"),
        (["--max-running", "0"], "max_running"),
        (["--chat-template", "/nonexistent/template"], "/nonexistent/template"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_options_that_cannot_be_honoured(tiny_checkpoint: Path, arguments: list[str], word: str) -> None:
    assert word in refusal_of(run("serve", "--port", "0", "--model", str(tiny_checkpoint), *arguments))


def test_help_and_version() -> None:
    everything = run("--help")
    assert everything.returncode == 0
    for name in ("serve", "generate", "inspect", "convert", "download", "doctor"):
        assert name in everything.stdout
        one = run(name, "--help")
        assert one.returncode == 0
        assert "--" in one.stdout
    assert run("--version").stdout.startswith("mixbit ")
    assert run().returncode == 2


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from mixbit.server.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'fastapi', 'rich', 'tokenizers', 'transformers', 'huggingface_hub'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([command()[0], "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_keys_from_flag_file_and_environment(tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nfrom-file\n\n")
    arguments = ["--model", str(tiny_checkpoint), "--api-key", "from-flag", "--api-key-file", str(file)]
    with start(*arguments, "--log-level", "info", MIXBIT_API_KEY="from-environment") as server:
        for key in ("from-flag", "from-file", "from-environment"):
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client:
                assert client.models.list().data[0].id == "tiny-llama"
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError) as refused:
                client.models.list()
            assert refused.value.code == "invalid_api_key"
        with server.client() as plain:
            assert plain.get("/health").status_code == 200
            assert error_of(plain.get("/v1/models"))["code"] == "invalid_api_key"
            assert plain.get("/health", headers={"host": "evil.example"}).status_code == 403
        assert "from-" not in server.text()
        assert "GET /v1/models 401" in server.text()


def test_raw_connections_that_are_not_http(tiny_server: RunningServer) -> None:
    address = httpx.URL(tiny_server.url)
    for data in (b"\x16\x03\x01\x02\x00garbage\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"a" * 200_000 + b"\r\n\r\n"):
        with socket.create_connection((address.host, address.port or 80), timeout=10) as connection:
            try:
                connection.sendall(data)
                assert connection.recv(100).startswith(b"HTTP/1.1 4")
            except (ConnectionResetError, BrokenPipeError):
                pass  # closed before it was read to the end
    with tiny_server.client() as client:
        assert client.get("/health").status_code == 200


def test_a_killed_worker_is_told_and_replaced(tiny_checkpoint: Path) -> None:
    with start("--model", str(tiny_checkpoint)) as server, server.client() as client:
        lines = []
        with client.stream("POST", CHAT, json=LONG) as response:
            for line in response.iter_lines():
                lines.append(line)
                if len(lines) == 7:
                    server.worker().kill()
        data = [line[6:] for line in lines if line.startswith("data: ")]
        assert data[-1] == "[DONE]"
        assert json.loads(data[-2])["error"]["code"] == "worker_died"
        health = client.get("/health")
        if health.status_code != 200:  # it may already be back
            assert health.status_code == 503
            assert health.json()["status"] in {"restarting", "loading"}
            refused = client.post(CHAT, json=SHORT)
            if refused.status_code != 200:
                assert refused.status_code == 503
                assert int(refused.headers["retry-after"]) > 0
        until(lambda: client.get("/health").status_code == 200)
        assert client.post(CHAT, json=SHORT).status_code == 200


def test_a_server_that_cannot_recover_ends(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for file in tiny_checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with start("--model", str(tmp_path)) as server:
        (tmp_path / "config.json").write_text("broken")
        server.worker().kill()
        assert server.process.wait(20) == 1
        (line,) = [line for line in server.text().splitlines() if line.startswith("error: ")]
        assert "config.json" in line
        assert "Traceback" not in server.text()


@pytest.mark.parametrize("streams", [False, True])
def test_ctrl_c_ends_in_good_order(tiny_checkpoint: Path, streams: bool) -> None:
    with start("--model", str(tiny_checkpoint)) as server, server.client() as client:
        worker = server.worker()
        if streams:
            with client.stream("POST", CHAT, json={**LONG, "n": 8}) as response:
                lines = response.iter_lines()
                next(lines)
                server.interrupt()
                rest = [line[6:] for line in lines if line.startswith("data: ")]
            assert rest[-1] == "[DONE]"
        else:
            server.interrupt()
        assert server.process.wait(15) in {0, 130}
        until(lambda: not worker.is_running(), 5)
        assert "Traceback" not in server.text()
        assert "rror" not in server.text()


def test_ctrl_c_while_starting(tiny_checkpoint: Path) -> None:
    with start("--model", str(tiny_checkpoint), wait=False) as server:
        time.sleep(0.5)
        server.interrupt()
        assert server.process.wait(15) in {0, 130}
        assert "Traceback" not in server.text()


def test_a_second_ctrl_c_is_immediate(tiny_checkpoint: Path) -> None:
    with start("--model", str(tiny_checkpoint)) as server, server.client() as client:
        worker = server.worker()
        with client.stream("POST", CHAT, json={**LONG, "n": 8}) as response:
            lines = response.iter_lines()  # kept, since the connection is closed with it
            next(lines)
            server.interrupt()
            time.sleep(0.3)
            server.interrupt()
            assert server.process.wait(2) in {0, 130}
        until(lambda: not worker.is_running(), 10)
