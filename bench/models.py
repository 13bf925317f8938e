"""The models that are measured, in a cache folder: each in our format and in the peer's."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.peer_gguf import write_gguf
from bench.reroute import reroute_checkpoint, reroute_gguf
from mixbit.engine.demo import demo_gguf, ensure_demo
from mixbit.engine.synth import Skew, SynthOptions, sizes_of, synthesize

LIKE = "qwen3-coder-next"


@dataclass(frozen=True)
class Pair:
    """A checkpoint directory and the peer's file. temporary: large, and made again in a minute."""

    ours: Path
    gguf: Path
    temporary: bool

    def delete(self) -> None:
        """Free the disk."""
        shutil.rmtree(self.ours, ignore_errors=True)
        self.gguf.unlink(missing_ok=True)


def warm(model: Path) -> None:
    """Read the files of a checkpoint once, so that they are found in the page cache."""
    for file in model.glob("*.safetensors"):
        with file.open("rb") as stream:
            while stream.read(1 << 24):
                pass


def smollm2(cache: Path) -> Pair:
    """SmolLM2-135M-Instruct: the demo model, and the GGUF it was converted from."""
    gguf = cache / "smollm2.gguf"
    if not gguf.exists():
        with demo_gguf(_say) as source:
            _whole(gguf, lambda path: shutil.copyfile(source, path))
    return Pair(ensure_demo(_say), gguf, temporary=False)


def qwen3_next(cache: Path, layers: int) -> Pair:
    """Qwen3-Coder-Next's real sizes with random weights: 4 bits in groups of 64 with 8-bit gates; Q4_0."""
    return Pair(our_qwen3_next(cache, layers), their_qwen3_next(cache, layers), temporary=True)


def our_qwen3_next(cache: Path, layers: int, skew: Skew | None = None, *, reroute: bool = False) -> Path:
    """Our directory of the pair. reroute: one with skew is made out of the even one, which is then gone."""
    ours, even = cache / _name(layers, skew), cache / _name(layers, None)
    if reroute and skew is not None and even.exists():
        even.rename(ours)
        reroute_checkpoint(ours, LIKE, skew)
    if not ours.exists():
        synthesize(LIKE, ours, SynthOptions(layers=layers, skew=skew), progress=_say)
    return ours


def their_qwen3_next(cache: Path, layers: int, skew: Skew | None = None, *, reroute: bool = False) -> Path:
    """The peer's file of the pair."""
    gguf, even = cache / f"{_name(layers, skew)}.gguf", cache / f"{_name(layers, None)}.gguf"
    if reroute and skew is not None and even.exists():
        even.rename(gguf)
        reroute_gguf(gguf, LIKE, skew)
    if not gguf.exists():
        _say(f"writing {gguf.name}", 0, 1)
        _whole(gguf, lambda path: write_gguf(path, sizes_of(LIKE, layers), skew))
    return gguf


def _name(layers: int, skew: Skew | None) -> str:
    return f"{LIKE}-{layers}-layers" + ("" if skew is None else f"-{skew.picks:.0%}-on-{skew.experts:.0%}")


def _whole(path: Path, write: Callable[[Path], object]) -> None:
    """Make a file by `write`, complete or not at all."""
    part = path.with_name(path.name + ".part")
    write(part)
    subprocess.run(["sync", str(part)], check=False)  # writing it back later would disturb the measurements
    part.rename(path)


def _say(stage: str, done: int, total: int) -> None:
    if done == 0:
        print(f"{stage} ...", file=sys.stderr, flush=True)
