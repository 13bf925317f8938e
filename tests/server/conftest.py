"""A tiny checkpoint, and one real server of it for all tests that do not need their own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import write_checkpoint
from tests.repeatable import arguments
from tests.server.running import RunningServer, start
from tests.server.support import TEMPLATE

CONTEXT = 4096


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights that chat: a llama of three layers with mixed widths."""
    directory = tmp_path_factory.mktemp("models") / "tiny-llama"
    config = {"max_position_embeddings": CONTEXT}
    write_checkpoint(directory, "llama", config=config, overrides={"*.down_proj": (8, 32)})
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "temperature": 0.9}))
    return directory


@pytest.fixture(scope="session")
def tiny_server(tiny_checkpoint: Path) -> Iterator[RunningServer]:
    """A server of the tiny checkpoint, with an alias."""
    with start("--model", str(tiny_checkpoint), "--alias", "org/alias", "--threads", "1", *arguments()) as server:
        yield server
