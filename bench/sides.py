"""The sides of a comparison: each is a child process that answers one JSON line for one JSON line.

Side: an engine alone (ours.py, peer_llama_cpp.py). Served: our whole server, asked over HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from bench.serving import Command, rate, serving

HERE = Path(__file__).parent


class SideError(RuntimeError):
    """A side that ended, did not answer in time, or refused; the message says which and why."""


class Asked(Protocol):
    """What a row measures."""

    def ask(self, **command: Any) -> dict[str, Any]:
        """The answer to a command; `seconds` is how long it took."""


class Side:
    """One engine in a child process. Raises SideError if it does not start."""

    def __init__(self, python: str, script: str, **options: Any) -> None:
        self._name = Path(script).stem
        self._process = subprocess.Popen(
            [python, str(HERE / script), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.loaded = self._read(timeout=300)

    @property
    def pid(self) -> int:
        """Of the child process."""
        return self._process.pid

    def ask(self, *, timeout: float = 300, **command: Any) -> dict[str, Any]:
        """timeout: seconds in which the answer is to come; SideError if it does not."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise SideError(f"{self._name} has ended with {self._process.wait()}") from None
        return self._read(timeout)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _read(self, timeout: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], timeout)[0]:
            self.close()
            raise SideError(f"{self._name} did not answer within {timeout:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise SideError(f"{self._name} ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


class Served:
    """Our server on a model, asked for one stream at a time."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self._asked = 0

    def ask(self, *, tokens: int, **_: Any) -> dict[str, Any]:
        self._asked += 1
        return {"seconds": tokens / asyncio.run(rate(self._server, 1, tokens, self._asked))}


@contextlib.contextmanager
def served(model: Path, threads: int) -> Iterator[Served]:
    """Our server as a user starts it."""
    start = [sys.executable, "-m", "mixbit.server.cli.main", "serve", "--model", str(model), "--port", "{port}"]
    command = Command("ours", model.resolve().name, [*start, "--threads", str(threads), "--no-disk-cache"])
    with serving(command) as server:
        yield Served(server)
