"""The output directory of a conversion: complete or absent, never half-made."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mixbit.engine.convert.errors import ConvertError
from mixbit.engine.errors import CheckpointError
from mixbit.engine.loader import load


@contextmanager
def new_model_directory(out: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of `out` to fill; it becomes `out` on success and is removed on any error.

    Raises ConvertError if `out` exists, unless `force` is set and it is a model directory or empty: then the
    old one is replaced at the end.
    """
    check_output(out, force)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        if out.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
            out.rename(old / out.name)
            temporary.rename(out)
            shutil.rmtree(old)
        else:
            temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_loads(directory: Path, out: Path) -> None:
    """Raise ConvertError if what was written to `directory`, and is to become `out`, could not be served."""
    try:
        load(directory)
    except CheckpointError as error:
        raise ConvertError(f"the result cannot be loaded: {error}".replace(str(directory), str(out))) from None


def check_output(out: Path, force: bool) -> None:
    """Raise ConvertError if `out` exists and may not be replaced; see new_model_directory."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ConvertError(f"{out}: exists and is not a directory")
    if not force:
        raise ConvertError(f"{out}: exists already; give another path, or --force to replace it")
    if any(out.iterdir()) and not (out / "config.json").is_file():
        raise ConvertError(f"{out}: has no config.json, so it is not a model that --force may replace")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` indented, as the hub's files are."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
