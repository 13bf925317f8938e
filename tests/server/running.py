"""Real servers: processes started as a user would, on a port of their own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

START_SECONDS = 180
MIXBIT = ("-m", "mixbit.server.cli.main")
_psutil: Any = psutil  # it has no types


@dataclass
class RunningServer:
    """A server process. url: of the server's root."""

    process: subprocess.Popen[bytes]
    url: str
    output: Path

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)

    def text(self) -> str:
        """What it printed so far, both streams."""
        return self.output.read_text()

    def worker(self) -> Any:
        """The engine's process, as psutil has it."""
        return next(
            child
            for child in _psutil.Process(self.process.pid).children(recursive=True)
            if {"mixbit.engine.worker", "worker"} & set(child.cmdline())
        )

    @property
    def disk(self) -> Path:
        """Where it keeps prefixes unless told otherwise."""
        return self.output.parent / "prefixes"

    def numbers(self) -> dict[str, float]:
        """What /metrics says."""
        with self.client() as client:
            return numbers(client.get("/metrics").text)

    def settled(self) -> dict[str, float]:
        """What /metrics says once nothing runs. Fails if something is held all the same."""
        found: dict[str, float] = {}

        def idle() -> bool:
            found.update(self.numbers())
            return bool(
                found["mixbit_ready"] and not found["mixbit_requests_running"] + found["mixbit_requests_waiting"]
            )

        until(idle)
        assert found["mixbit_leaks_total"] == 0
        assert found['mixbit_kv_bytes{state="used"}'] == 0
        return found

    def interrupt(self) -> None:
        """Ctrl-C, as a terminal sends it: to the whole process group."""
        os.killpg(self.process.pid, signal.SIGINT)


def command(*arguments: str) -> list[str]:
    return [sys.executable, *MIXBIT, *arguments]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command line to its end."""
    env = {**os.environ, **environment}
    return subprocess.run(command(*arguments), capture_output=True, text=True, env=env, timeout=120, check=False)


@contextmanager
def start(
    *arguments: str,
    wait: bool = True,
    program: Sequence[str] = MIXBIT,
    within: Sequence[str] = (),
    **environment: str,
) -> Iterator[RunningServer]:
    """A server with `arguments` on a free port, ended with the context.

    wait: until it prints its address. program: what Python runs as `mixbit`. within: a command that becomes it.
    """
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "output"
        with output.open("wb") as file:
            process = subprocess.Popen(
                [
                    *within,
                    sys.executable,
                    *program,
                    "serve",
                    "--port",
                    "0",
                    "--disk-cache",
                    f"{directory}/prefixes",
                    *arguments,
                ],
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "COLUMNS": "200", **environment},
                start_new_session=True,
            )
        server = RunningServer(process, "", output)
        try:
            if wait:
                server.url = _address(server)
            yield server
        finally:
            if process.poll() is None:
                process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise


def _address(server: RunningServer) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if found := re.search(r"(http://\S+:\d+)/v1", server.text()):
            return found[1]
        assert server.process.poll() is None, server.text()
        time.sleep(0.02)
    raise AssertionError(f"no address within {START_SECONDS} s: {server.text()}")


def numbers(text: str) -> dict[str, float]:
    """Metrics by name and labels, of all models together."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, value = re.sub(r'\{model="[^"]*"\}|(?<=\{)model="[^"]*",', "", line).rpartition(" ")
            found[name] = found.get(name, 0) + float(value)
    return found


def until(condition: Any, seconds: float = 60) -> None:
    """Wait for `condition()` to be true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
