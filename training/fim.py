"""Fill-in-the-middle as editors ask for it: held-out lines taken out, and asked back from a running server."""

from __future__ import annotations

import ast
import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

MOST = 3000  # characters around the hole that are sent: two thirds of them from before it
START_SECONDS = 120
_SIMPLE = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.Return, ast.Raise, ast.Assert)

# What the autocompletion of Continue and the edit prediction of Zed send as `stop` for Qwen's tokens.
_QWEN = ["<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"]
_CONTINUE_STOPS = [*_QWEN, "<|repo_name|>", "<|file_sep|>", "<|im_start|>", "<|im_end|>", "\n\n", "\r\n\r\n"]
_CONTINUE_STOPS += ["/src/", "#- coding: utf-8", "```"]
_ZED_STOPS = [*_QWEN, "<|file_separator|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<PRE>", "<SUF>", "<MID>"]
_ZED_STOPS += ["[PREFIX]", "[SUFFIX]"]


@dataclass(frozen=True)
class Hole:
    """A file without one line of a function: before + line + after is the file."""

    before: str
    line: str
    after: str


@dataclass(frozen=True)
class Filled:
    """Of how many holes the line came back, and how many files parse with what came instead."""

    asked: int
    exact: int
    parses: int


def find_holes(texts: Iterator[str], count: int) -> list[Hole]:
    """One hole for each of the first `count` files that have functions with statements of one line."""
    rng, holes = random.Random(2), []
    for text in texts:
        functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
        inner = [n for f in functions for n in ast.walk(f) if isinstance(n, _SIMPLE) and n.lineno == n.end_lineno]
        lines = text.splitlines(keepends=True)
        places = [n.lineno - 1 for n in inner if len(lines[n.lineno - 1].strip()) > 8 and "\n" in lines[n.lineno - 1]]
        if places:
            at = rng.choice(sorted(set(places)))
            line = lines[at].strip()
            before, after = lines[at].split(line, 1)
            holes.append(Hole("".join(lines[:at]) + before, line, after + "".join(lines[at + 1 :])))
        if len(holes) == count:
            break
    return holes


def _raw(before: str, after: str) -> str:
    return f"<|fim_prefix|>{before}<|fim_suffix|>{after}<|fim_middle|>"


Form = Callable[[str, str], dict[str, Any]]

# The body of each kind of request. Editors take several lines; only the first two ask for the line alone.
FORMS: dict[str, Form] = {
    "suffix": lambda b, a: {"prompt": b, "suffix": a, "max_tokens": 64, "temperature": 0, "stop": "\n"},
    "raw tokens": lambda b, a: {"prompt": _raw(b, a), "max_tokens": 64, "temperature": 0, "stop": ["\n"]},
    "Continue": lambda b, a: {
        "prompt": _raw(b, a),
        "max_tokens": 128,
        "temperature": 0.01,
        "stream": True,
        "stop": _CONTINUE_STOPS,
    },
    "Zed": lambda b, a: {"prompt": _raw(b, a), "max_tokens": 64, "stop": _ZED_STOPS},
}


@contextmanager
def serve(model: Path) -> Iterator[httpx.Client]:
    """A server of this model alone, on a port of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mixbit.server.cli.main", "serve", "--model", str(model), "--port", str(port)]
    command += ["--served-name", "tiny-coder"]  # whose preset knows the tokens
    with (
        subprocess.Popen([*command, "--no-disk-cache"], stdout=subprocess.DEVNULL) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=900) as client,
    ):
        try:
            _wait(client, process)
            yield client
        finally:
            process.terminate()


def _wait(client: httpx.Client, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise SystemExit("the server did not start")


def complete(client: httpx.Client, body: dict[str, Any]) -> str:
    """The text that a request of one choice brings, streamed or not."""
    response = client.post("/v1/completions", json=body)
    response.raise_for_status()
    if not body.get("stream"):
        return str(response.json()["choices"][0]["text"])
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: {")]
    return "".join(choice["text"] for event in events for choice in json.loads(event)["choices"])


def fill(client: httpx.Client, holes: list[Hole], form: Form, context: int) -> Filled:
    """Ask for every hole. context: tokens that the model takes; a token is more than 1.5 characters."""
    sent, exact, parses = min(MOST, 3 * context // 2), 0, 0
    for hole in holes:
        text = complete(client, form(hole.before[-(2 * sent // 3) :], hole.after[: sent // 3]))
        exact += text.split("\n")[0].rstrip() == hole.line
        parses += _parses(hole.before + text + hole.after)
    return Filled(len(holes), exact, parses)


def _parses(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True
