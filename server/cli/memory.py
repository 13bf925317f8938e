"""Options of several commands that say how much memory a model may take."""

from __future__ import annotations

import argparse
import re

_OPTIONS = (
    (
        "--memory",
        "for the model, such as 12GB (default: what is free); experts that do not fit are streamed from disk",
    ),
    ("--expert-memory", "for experts alone, which are then streamed from disk (default: what --memory leaves)"),
)


def add_memory_options(group: argparse._ActionsContainer) -> None:
    """Add --memory and --expert-memory, in bytes."""
    for name, text in _OPTIONS:
        group.add_argument(name, metavar="SIZE", type=parse_size, help=text)


def parse_size(text: str) -> int:
    """Bytes of `2G`, `512M`, `1.5GB` or a plain number."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)([KMGT]?)I?B?", text.upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512M or 2G")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2] or " "))
