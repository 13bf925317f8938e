"""Whether there is an NVIDIA driver: asked before anything that only runs on one is imported."""

from __future__ import annotations

import ctypes


def missing_driver() -> str | None:
    """None if there is one, else a reason for people."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver here"
    return None
