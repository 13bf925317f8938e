"""What the process of every side does: answer one JSON line for one JSON line (see bench/sides.py).

Drivers run as scripts, peers' in environments of their own, and find this beside them: it needs the standard library
alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, Protocol


class Engine(Protocol):
    """loaded: how long it took (`seconds`)."""

    loaded: dict[str, float]

    def answer(self, do: str, **command: Any) -> dict[str, Any]:
        """The answer to a command; `seconds` is how long it took."""


def drive(start: Callable[..., Engine]) -> None:
    """Start the engine with the options of the command line; answer until standard input ends."""
    engine = start(**json.loads(sys.argv[1]))
    _reply(engine.loaded)
    for line in sys.stdin:
        _reply(engine.answer(**json.loads(line)))


def _reply(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)
