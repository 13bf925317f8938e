"""A real server of the demo model for clients that others wrote.

`make test-clients` runs these in an environment of their own: the clients' dependencies are many, and some
contradict ours. MIXBIT_PYTHON is the Python that has Mixbit.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

collect_ignore_glob = [] if find_spec("litellm") else ["test_*.py"]

START_SECONDS = 300  # the demo model may have to be built


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    """The server's root."""
    python = os.environ.get("MIXBIT_PYTHON", ".venv/bin/python")
    exact = ("--precision", "exact", "--no-disk-cache")  # the answers are known from the exact model
    command = [python, "-m", "mixbit.server.cli.main", "serve", "--port", "0", *exact]
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "output"
        with output.open("wb") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "COLUMNS": "200"}
            )
        try:
            deadline = time.monotonic() + START_SECONDS
            while not (found := re.search(r"(http://\S+:\d+)/v1", output.read_text())):
                assert process.poll() is None, output.read_text()
                assert time.monotonic() < deadline, output.read_text()
                time.sleep(0.1)
            yield found[1]
        finally:
            process.terminate()
            process.wait(20)


@pytest.fixture(scope="session")
def model(url: str) -> str:
    """The served model's name."""
    import httpx

    return str(httpx.get(f"{url}/v1/models").json()["data"][0]["id"])
