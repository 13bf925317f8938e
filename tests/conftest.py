"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    """The SmolLM2 demo in MLX format, built once into the user's cache."""
    from mixbit.engine.demo import ensure_demo

    return ensure_demo(lambda stage, done, total: None)
