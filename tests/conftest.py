"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# NumPy multiplies small matrices here; a second thread would spin more than it helps. Read when NumPy is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    """The SmolLM2 demo in MLX format, built once into the user's cache."""
    from mixbit.engine.demo import ensure_demo

    return ensure_demo(lambda stage, done, total: None)
