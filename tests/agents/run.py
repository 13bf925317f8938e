"""Runs the agents of package.json against Mixbit, and prints a table: `python tests/agents/run.py FOLDER [NAME...]`.

FOLDER: where npm has installed them. Each agent gets a task from a scripted model (scripted.py), which it can only
complete by reading and writing a file, and a question for the demo model. They run in an empty home directory, and
where Linux permits it in a network that has nothing but loopback. Exits 1 if one of them fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixbit.engine.demo import ensure_demo
from tests.agents.agents import AGENTS, Command, Place
from tests.agents.scripted import CONTEXT, MODEL, NOTES, TASK

START_SECONDS = 120
AGENT_SECONDS = 180
QUESTION = "What is the capital of France?"
DEMO_CONTEXT = 8192
DEMO_NAME = "smollm2-135m-instruct"
SERVE = ("-m", "mixbit.server.cli.main", "serve", "--port", "0", "--log-level", "info", "--log-format", "json")
HEADER = ("client", "version", "task", "requests", "prompt tokens", "cached", "result")


@dataclass(frozen=True)
class Server:
    """A running server; its output tells of the requests."""

    url: str
    output: Path

    def requests(self, begin: int = 0) -> list[dict[str, Any]]:
        """The requests in the output from the byte `begin` on."""
        lines = self.output.read_bytes()[begin:].decode().splitlines()
        values = [json.loads(line) for line in lines if line.startswith("{")]
        return [value for value in values if "path" in value]


@contextmanager
def serving(program: Sequence[str]) -> Iterator[Server]:
    """A server process, ended with the context."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "output"
        with output.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, *program], stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "COLUMNS": "200"}
            )
        try:
            deadline = time.monotonic() + START_SECONDS
            while not (found := re.search(r"(http://\S+:\d+)/v1", output.read_text())):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"the server did not start:\n{output.read_text()}")
                time.sleep(0.05)
            yield Server(found[1], output)
        finally:
            process.terminate()
            process.wait(20)


@contextmanager
def serving_demo() -> Iterator[Server]:
    """A server of the demo model; greedy, since agents do not set a temperature and the answer must be the same."""
    with tempfile.TemporaryDirectory() as directory:
        for file in ensure_demo(lambda *_: None).iterdir():
            (Path(directory) / file.name).symlink_to(file)
        config = Path(directory) / "generation_config.json"
        values = json.loads(config.read_text()) if config.exists() else {}
        config.unlink(missing_ok=True)
        config.write_text(json.dumps({**values, "temperature": 0}))
        options = ["--model", directory, "--served-name", DEMO_NAME, "--no-disk-cache", "--precision", "exact"]
        with serving([*SERVE, *options]) as server:
            yield server


@dataclass(frozen=True)
class Outcome:
    """What an agent did. said: both of its streams."""

    said: str
    problem: str | None
    requests: list[dict[str, Any]]


def run(command: Command, prompt: str, place: Place, programs: Path, server: Server) -> Outcome:
    """Run an agent to its end."""
    begin = server.output.stat().st_size
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    kept = {name: os.environ[name] for name in ("LANG", "TERM") if name in os.environ}
    environment = {"HOME": str(place.home), "PATH": path, "NO_COLOR": "1", "CI": "1", "DO_NOT_TRACK": "1"}
    process = subprocess.Popen(
        [*command.words, prompt],
        cwd=place.home / "project",
        env={**kept, **environment, **command.environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        said = process.communicate(timeout=AGENT_SECONDS)[0].decode(errors="replace")
        problem = f"exit status {process.returncode}" if process.returncode else None
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        said, problem = process.communicate()[0].decode(errors="replace"), f"no end within {AGENT_SECONDS} s"
    return Outcome(said, problem, server.requests(begin))


def task(package: str, programs: Path, server: Server) -> Outcome:
    """Give the agent the scripted task."""
    with tempfile.TemporaryDirectory() as directory:
        home, word = Path(directory), secrets.token_hex(6)
        project = home / "project"
        project.mkdir()
        (project / "notes.txt").write_text(NOTES.format(word=word))
        place = Place(home, server.url, MODEL, CONTEXT, plain=False)
        outcome = run(AGENTS[package](place), TASK.format(directory=project), place, programs, server)
        written = project / "word.txt"
        text = written.read_text().strip() if written.exists() else None
        problem = outcome.problem
        if text != word:
            problem = problem or f"word.txt holds {text!r}, expected {word!r}"
        elif word[::-1] not in outcome.said:
            problem = problem or "its answer is not the model's"
        return Outcome(outcome.said, problem, outcome.requests)


def question(package: str, programs: Path, server: Server) -> Outcome:
    """Have the agent ask the demo model."""
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        (home / "project").mkdir()
        place = Place(home, server.url, DEMO_NAME, DEMO_CONTEXT, plain=True)
        outcome = run(AGENTS[package](place), QUESTION, place, programs, server)
        problem = outcome.problem or (None if "Paris" in outcome.said else "no Paris in its answer")
        return Outcome(outcome.said, problem, outcome.requests)


def row(package: str, version: str, what: str, outcome: Outcome) -> tuple[str, ...]:
    """A line of the table. Other requests than those for text are counted after a plus sign."""
    texts = [each for each in outcome.requests if "prompt_tokens" in each]
    others = len(outcome.requests) - len(texts)
    return (
        package,
        version,
        what,
        f"{len(texts)}{f' + {others}' if others else ''}",
        str(sum(each["prompt_tokens"] for each in texts)),
        str(sum(each["cached_tokens"] for each in texts)),
        outcome.problem or "done",
    )


def loopback_alone() -> None:
    """Begin again in a network of nothing but loopback, where Linux lets us; say so where it does not."""
    if os.environ.get("MIXBIT_NETWORK") == "loopback":
        return
    unshare = ["unshare", "--user", "--map-root-user", "--net"]
    if (
        shutil.which("unshare")
        and shutil.which("ip")
        and not subprocess.run([*unshare, "true"], check=False).returncode
    ):
        inner = ["sh", "-c", 'ip link set lo up && exec "$@"', "sh", sys.executable, "-m", "tests.agents.run"]
        os.execvpe("unshare", [*unshare, *inner, *sys.argv[1:]], {**os.environ, "MIXBIT_NETWORK": "loopback"})
    print("the network is not cut off here: unshare and ip are missing or not permitted", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", help="as in agents.py; all if none is given")
    parser.add_argument("--show", action="store_true", help="what the agents said and asked for")
    arguments = parser.parse_args()
    loopback_alone()
    folder = arguments.folder.resolve()
    programs = folder / "node_modules" / ".bin"
    packages = [name for name, each in AGENTS.items() if not arguments.names or each.__name__ in arguments.names]
    rows = []
    with serving(("-m", "tests.agents.scripted")) as scripted, serving_demo() as demo:
        for package in packages:
            version = json.loads((folder / "node_modules" / package / "package.json").read_text())["version"]
            for what, give, server in (("read, write, answer", task, scripted), ("question", question, demo)):
                outcome = give(package, programs, server)
                rows.append(row(package, version, what, outcome))
                if arguments.show or outcome.problem:
                    print(f"--- {package}: {what}\n{outcome.said}", file=sys.stderr)
                    for each in outcome.requests:
                        print(f"    {each['message']}", file=sys.stderr)
    for line in (HEADER, tuple("---" for _ in HEADER), *rows):
        print(f"| {' | '.join(line)} |")
    return int(any(line[-1] != "done" for line in rows))


if __name__ == "__main__":
    sys.exit(main())
