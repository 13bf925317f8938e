"""Models that come with Mixbit: the directories of the package mixbit.models that hold a checkpoint."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

CODER = "tiny-coder"
_NAME = re.compile(r"[\w-]+", re.ASCII)  # no path, no hub id


def shipped_model(name: str) -> Path | None:
    """The directory of a model that came with this installation, None if there is none of that name."""
    spec = find_spec("mixbit.models") if _NAME.fullmatch(name) else None
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / name / "config.json").is_file():
            return Path(folder) / name
    return None


def default_models() -> list[str]:
    """What `--model` says of `mixbit serve` unless told: the demo to chat with and, where it came along, a model of
    code, which editors know as `autocomplete`."""
    return ["demo", *([f"{CODER}=autocomplete"] if shipped_model(CODER) else [])]
