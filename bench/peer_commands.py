"""What every driver of a peer does: answer the commands of bench/ours.py, one JSON line for one JSON line.

Drivers run as scripts in environments of their own and find this beside them; it needs the standard library alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, Protocol


class Engine(Protocol):
    """loaded: how long it took (`seconds`). The commands answer with seconds."""

    loaded: dict[str, float]

    def prefill(self, tokens: int) -> float: ...

    def decode(self, tokens: int, context: int, sequences: int) -> float: ...


def drive(start: Callable[..., Engine]) -> None:
    """Start the engine with the options of the command line; answer until standard input ends."""
    engine = start(**json.loads(sys.argv[1]))
    _reply(engine.loaded)
    commands: dict[str, Callable[..., float]] = {"prefill": engine.prefill, "decode": engine.decode}
    for line in sys.stdin:
        options = json.loads(line)
        _reply({"seconds": commands[options.pop("do")](**options)})


def _reply(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)
