"""Settings for tests of texts that are the same whatever else runs, in the fast mode too.

Not AMX there, with which a token's rounded products depend on how many it is computed with.
"""

from __future__ import annotations

from typing import Any

from mixbit.kernels.cpu import _cpu


def settings(precision: str) -> dict[str, Any]:
    """Of an engine. isa: None is the best one."""
    amx = "amx" in _cpu.supported_isas()
    return {"precision": precision, "isa": "avx512" if amx and precision == "fast" else None}


def arguments() -> list[str]:
    """Of `mixbit serve`."""
    return [part for name, value in settings("fast").items() if value for part in (f"--{name}", value)]
