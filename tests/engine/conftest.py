"""Tiny models for the tests that start a worker process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints import write_checkpoint


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("models")
    for model_type in ("llama", "qwen3_next"):
        write_checkpoint(directory / model_type, model_type)
    return {path.name: path for path in directory.iterdir()}
