"""The text of the kernels: one algorithm in Metal's language, which cuda/platform.cuh teaches to CUDA too.

A file is made of `#include "other.metal"` lines, helper functions, and after the marker `// --- kernel ---`
the body of the kernel: MLX writes its signature.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

Language = Literal["metal", "cuda"]

_KERNELS = Path(__file__).parents[2]
_MARKER = "// --- kernel ---\n"


class Source(NamedTuple):
    """What comes before the kernel, and its body."""

    header: str
    body: str


@cache
def source(name: str, language: Language) -> Source:
    """The text of kernels/metal/{name}.metal."""
    header, _, body = _expand(_KERNELS / "metal" / f"{name}.metal", language, set()).partition(_MARKER)
    return Source(_shorten(header), _shorten(body))


def _expand(path: Path, language: Language, seen: set[Path]) -> str:
    """The file with its includes in place, each once."""
    if path in seen:
        return ""
    seen.add(path)
    if language == "cuda" and path.name == "platform.metal":
        return (_KERNELS / "cuda" / "platform.cuh").read_text()
    text = path.read_text()
    if language == "cuda":  # one address space; kernels/cuda/platform.cuh has the rest of Metal's words
        text = re.sub(r"\b(device|constant|thread)\b ?", "", text)
    return re.sub(r'#include "([\w.]+)"\n', lambda match: _expand(path.parent / match[1], language, seen), text)


def _shorten(text: str) -> str:
    """Without comments and indentation: MLX copies and hashes the text of a kernel at every launch."""
    lines = (re.sub(r"\s*//.*", "", line).strip() for line in text.splitlines())
    return "".join(line + "\n" for line in lines if line)
