"""Kernels from text to machine code: NVRTC, in parallel, kept on disk.

    compiler = Compiler("sm_90")                                # needs no GPU
    cubin, = compiler.compile([Source("matvec.cu", ("TOKENS 8", "IN 2048"))])

A source is a file of kernels/cuda, or kernels/cuda/NAME's Metal twin, and the macros it expects. `#include "x.cuh"`
finds files of kernels/cuda, `#include <cuda_bf16.h>` those of the CUDA headers.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mixbit.kernels.executor import BackendError

_FOLDER = Path(__file__).parent
_INCLUDE = re.compile(r'#include "([\w./]+)"\n')

Progress = Callable[[int, int], None]
"""progress(done, total): kernels compiled."""


@dataclass(frozen=True)
class Source:
    """A file of kernels/cuda and the macros it expects, each "NAME" or "NAME value"."""

    file: str
    defines: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """What NVRTC is given: macros, then the file with its includes in place, each once."""
        lines = "".join(f"#define {define}\n" for define in self.defines)
        return lines + _expand(_FOLDER / self.file, set())


def _expand(path: Path, seen: set[Path]) -> str:
    if path in seen:
        return ""
    seen.add(path)
    text = _read(path)
    return _INCLUDE.sub(lambda match: _expand(path.parent / match[1], seen), text)


@cache
def _read(path: Path) -> str:
    return path.read_text()


def include_directories() -> tuple[Path, ...]:
    """Where CUDA's headers are: beside the NVRTC of the Python environment, or in an installed toolkit."""
    roots = [Path(entry) / "nvidia" / "cu13" for entry in sys.path if entry]
    roots += [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    roots.append(Path("/usr/local/cuda"))
    for root in roots:
        if (root / "include" / "cuda_bf16.h").exists():
            return (root / "include", root / "include" / "cccl")
    raise BackendError("CUDA's headers are missing (pip install 'mixbit[cuda]', or set CUDA_HOME)")


def cache_directory() -> Path:
    """Where compiled kernels are kept: mixbit/cuda in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mixbit" / "cuda"


class Compiler:
    """Compiles for one architecture, and remembers what was compiled before."""

    def __init__(self, arch: str, directory: Path | None = None) -> None:
        """arch: "sm_90". directory: of the kept machine code, cache_directory() if not given."""
        self._arch = arch
        self._directory = directory or cache_directory()
        self._directory.mkdir(parents=True, exist_ok=True)

    def compile(self, sources: Sequence[Source], progress: Progress | None = None) -> list[bytes]:
        """Machine code of each source. Raises BackendError with NVRTC's log for one that is wrong."""
        missing = [source for source in dict.fromkeys(sources) if not self._path(source).exists()]
        with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as workers:
            for done, _ in enumerate(workers.map(self._keep, missing), 1):
                if progress is not None:
                    progress(done, len(missing))
        return [self._path(source).read_bytes() for source in sources]

    def _path(self, source: Source) -> Path:
        key = "\n".join([self._arch, str(_nvrtc_version()), *_OPTIONS, source.text])
        name = f"{Path(source.file).stem}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.cubin"
        return self._directory / name

    def _keep(self, source: Source) -> None:
        code = compile_text(source.text, source.file, self._arch)
        with tempfile.NamedTemporaryFile(dir=self._directory, delete=False) as file:
            file.write(code)
        os.replace(file.name, self._path(source))  # whole or not at all, however many processes do it


# Not --use_fast_math: its sine of a large angle is wrong.
_OPTIONS = (
    "--std=c++17",
    "--ftz=true",
    "--prec-div=false",
    "--prec-sqrt=false",
    "--device-as-default-execution-space",
    "-diag-suppress=177",  # what is declared and not used: headers serve many kernels
)


def compile_text(text: str, name: str, arch: str) -> bytes:
    """Machine code of CUDA C++ `text`. Raises BackendError with the compiler's log."""
    nvrtc = importlib.import_module("cuda.bindings.nvrtc")

    options = [f"--gpu-architecture={arch}", *_OPTIONS, *(f"-I{path}" for path in include_directories())]
    program = _nvrtc("nvrtcCreateProgram", text.encode(), name.encode(), 0, [], [])
    try:
        encoded = [option.encode() for option in options]
        status = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)[0]
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = bytearray(_nvrtc("nvrtcGetProgramLogSize", program))
            _nvrtc("nvrtcGetProgramLog", program, log)
            raise BackendError(f"{name} does not compile for {arch}:\n{log.decode(errors='replace').rstrip(chr(0))}")
        code = bytearray(_nvrtc("nvrtcGetCUBINSize", program))
        _nvrtc("nvrtcGetCUBIN", program, code)
        return bytes(code)
    finally:
        _nvrtc("nvrtcDestroyProgram", program)


@cache
def _nvrtc_version() -> tuple[int, int]:
    major, minor = _nvrtc("nvrtcVersion")
    return int(major), int(minor)


def _nvrtc(name: str, *arguments: Any) -> Any:
    nvrtc = importlib.import_module("cuda.bindings.nvrtc")

    status, *results = getattr(nvrtc, name)(*arguments)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise BackendError(f"{name} failed: {nvrtc.nvrtcGetErrorString(status)[1].decode()}")
    return results[0] if len(results) == 1 else tuple(results) or None


def unavailable() -> str | None:
    """None if kernels can be compiled, else what is missing."""
    try:
        _nvrtc_version()
        include_directories()
    except (BackendError, ImportError, RuntimeError) as error:  # RuntimeError: there is no libnvrtc
        return str(error)
    return None
