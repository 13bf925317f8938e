"""Training data for tiny-coder: Python source of permissively licensed packages.

    python training/data.py fetch WORK/      download a wheel of every package in candidates.txt and held_out.txt
    python training/data.py build WORK/      filter and deduplicate; writes WORK/train.jsonl, WORK/held_out.jsonl
                                             and the data card, training/DATA.md
    python training/data.py pack WORK/       WORK/train.jsonl as WORK/train-00.jsonl.xz, ... of at most 48 MB each

Wheels come from the package index that pip is set up for, the standard library from the Python that runs this. Nothing
fetched is kept in the repository; the data card is.
"""

from __future__ import annotations

import argparse
import ast
import email
import hashlib
import json
import lzma
import platform
import re
import subprocess
import sys
import sysconfig
import warnings
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
FETCH_TIMEOUT = 240  # seconds for one wheel

# --- licences ---

_NAMES = {
    "MIT": r"\bmit\b|expat",
    "BSD": r"\bbsd\b|0bsd",
    "Apache-2.0": r"apache",
    "PSF": r"\bpsf\b|python software foundation|\bpython-2\.0",
}
_RESTRICTIVE = re.compile(
    r"gpl|mozilla|\bmpl|eclipse|cddl|proprietary|creative commons|commercial|\beupl|busl|elastic", re.IGNORECASE
)


def licence(metadata: email.message.Message) -> str | None:
    """The licence that a wheel's METADATA names, or None if it is not one of _NAMES or names a restrictive one too."""
    expression = metadata.get("License-Expression") or ""
    classifiers = [c for c in metadata.get_all("Classifier") or () if c.startswith("License ::")]
    stated = metadata.get("License") or ""
    said = expression or " ".join(classifiers) or (stated if len(stated) < 100 else stated[:60])
    if _RESTRICTIVE.search(said):
        return None
    found = [name for name, pattern in _NAMES.items() if re.search(pattern, said, re.IGNORECASE)]
    return " / ".join(found) or None


# --- which files ---

_VENDORED = re.compile(
    r"(^|/)(_?vendor(ed)?|_?vendored_packages|third_?party|extern(al)?s?|site-packages|node_modules|_pb2|lib2to3)(/|$)"
)
_GENERATED = re.compile(
    r"auto-?generated|automatically generated|@generated|do not edit|(code )?generated (by|from)|autorest",
    re.IGNORECASE,
)
MOST_BYTES = 150_000  # of a file
MOST_OF_PACKAGE = 3_000_000  # bytes, so that no package sets the tone
PART = 48_000_000  # bytes of a packed part


def wanted(path: str, text: str) -> bool:
    """Whether a source file is written by people and worth learning from."""
    if not path.endswith(".py") or path.endswith(("_pb2.py", "_pb2_grpc.py")) or _VENDORED.search(path):
        return False
    size = len(text.encode())
    if not 200 <= size <= MOST_BYTES or _GENERATED.search(text[:1500]):
        return False
    lines = text.splitlines()
    if max(map(len, lines)) > 400 or size / len(lines) > 70:  # tables and data
        return False
    digits = sum(map(text.count, "0123456789"))
    return digits <= 0.12 * len(text) and (text.isascii() or sum(not c.isascii() for c in text) <= 0.02 * len(text))


def parses(text: str) -> bool:
    """Whether this Python takes it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return False
    return True


class Duplicates:
    """Knows the files seen so far. A file is a duplicate if most of its blocks of five lines were seen before."""

    def __init__(self) -> None:
        self._blocks: set[bytes] = set()

    def seen(self, text: str) -> bool:
        """Whether over half of the text is known already; the rest is known from now on."""
        lines = [line.strip() for line in text.splitlines()]
        lines = [line for line in lines if line and not line.startswith("#")]
        blocks = {
            hashlib.blake2b("\n".join(lines[i : i + 5]).encode(), digest_size=8).digest()
            for i in range(0, len(lines), 5)
        }
        known = len(blocks & self._blocks)
        self._blocks |= blocks
        return not blocks or known > len(blocks) / 2


# --- packages ---


@dataclass(frozen=True)
class Package:
    """A wheel: name, version, licence, and the files in it that are wanted."""

    name: str
    version: str
    licence: str
    files: tuple[tuple[str, str], ...]  # path, text


def read_wheel(path: Path) -> Package | None:
    """The package in a wheel, or None if its licence does not allow it or nothing in it is wanted."""
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        metadata = email.message_from_bytes(wheel.read(next(n for n in names if n.endswith(".dist-info/METADATA"))))
        allowed = licence(metadata)
        if allowed is None:
            return None
        files = []
        for name in names:
            if not name.endswith(".py"):
                continue
            text = wheel.read(name).decode("utf-8", "replace").replace("\r\n", "\n")
            if wanted(name, text):
                files.append((name, text))
    return Package(metadata["Name"], metadata["Version"], allowed, tuple(files)) if files else None


def names(file: str) -> list[str]:
    """The package names in a list, without comments and repetitions."""
    lines = (HERE / file).read_text().splitlines()
    return list(dict.fromkeys(word for line in lines if not line.startswith("#") for word in line.split()))


def fetch(work: Path) -> None:
    """Download one wheel of every package named; what is not there as a wheel is left out."""

    def one(where: Path, name: str) -> str:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--only-binary=:all:",
            "-d",
            str(where),
            name,
        ]
        try:
            done = subprocess.run(command, capture_output=True, timeout=FETCH_TIMEOUT, check=False)
        except subprocess.TimeoutExpired:
            return f"{name}: too slow"
        return f"{name}: {'ok' if done.returncode == 0 else 'no wheel'}"

    for split in ("candidates", "held_out"):
        where = work / split
        where.mkdir(parents=True, exist_ok=True)
        have = {p.name.split("-")[0].lower().replace("_", "-") for p in where.glob("*.whl")}
        todo = [n for n in names(f"{split}.txt") if n.lower().replace("_", "-").replace(".", "-") not in have]
        with ThreadPoolExecutor(4) as pool:
            for i, said in enumerate(pool.map(lambda name, where=where: one(where, name), todo), 1):
                print(f"{split} {i}/{len(todo)} {said}", flush=True)


def standard_library() -> Package:
    """The standard library of the running Python, without its tests' data, site-packages and lib2to3."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = ((str(path.relative_to(root)), path) for path in sorted(root.rglob("*.py")))
    files = [
        (name, text)
        for name, path in paths
        if not name.startswith(("site-packages", "dist-packages", "test/"))
        and wanted(name, text := path.read_text("utf-8", "replace"))
    ]
    return Package("Python (standard library)", platform.python_version(), "PSF", tuple(files))


def packages(work: Path, split: str) -> Iterator[Package]:
    """The allowed packages of WORK/candidates or WORK/held_out, in order of name; to train on, Python itself first."""
    if split == "candidates":
        yield standard_library()
    for path in sorted((work / split).glob("*.whl"), key=lambda p: p.name.lower()):
        package = read_wheel(path)
        print(f"{path.name}: {f'{package.licence}, {len(package.files)} files' if package else 'left out'}", flush=True)
        if package:
            yield package


def build(work: Path) -> None:
    """Write the two splits and the data card. Held-out packages go first, so that no copy of them is trained on."""
    duplicates, rows = Duplicates(), []
    for split in ("held_out", "candidates"):
        target = work / ("held_out.jsonl" if split == "held_out" else "train.jsonl")
        with target.open("w") as out:
            for package in packages(work, split):
                texts = [(path, text) for path, text in package.files if not duplicates.seen(text)]
                size = count = 0
                for path, text in sorted(texts, key=lambda each: _shuffled(each[0])):
                    if size + len(text.encode()) > MOST_OF_PACKAGE or not parses(text):
                        continue
                    out.write(json.dumps({"package": package.name, "path": path, "text": text}) + "\n")
                    size, count = size + len(text.encode()), count + 1
                if count:
                    rows.append((split == "held_out", package, count, size))
    write_card(rows)


def pack(work: Path) -> None:
    """Write the training split as parts that can each be sent by themselves."""
    for old in work.glob("train-*.jsonl.xz"):
        old.unlink()
    with (work / "train.jsonl").open("rb") as lines:
        line = next(lines, b"")
        number = 0
        while line:
            target = work / f"train-{number:02}.jsonl.xz"
            coder, size = lzma.LZMACompressor(preset=3), 0  # 6 takes four times as long
            with target.open("wb") as out:
                # What the coder holds back is less than 2 MB.
                while line and size < PART - 2_000_000:
                    size += out.write(coder.compress(line))
                    line = next(lines, b"")
                out.write(coder.flush())
            print(f"{target.name}: {target.stat().st_size / 1e6:.1f} MB", flush=True)
            number += 1


def _shuffled(path: str) -> bytes:
    return hashlib.blake2b(path.encode(), digest_size=8).digest()


def write_card(rows: list[tuple[bool, Package, int, int]]) -> None:
    """DATA.md: what was trained on, in which version, under which licence."""
    total = {held: sum(size for h, _, _, size in rows if h == held) for held in (False, True)}
    lines = [
        "# tiny-coder: data card",
        "",
        "Python source of the packages below, as published on the Python Package Index, in the versions and under",
        "the licences that their own metadata names (MIT, BSD, Apache 2.0 or PSF; packages that name another licence",
        "are left out). Generated, vendored, very long, number-heavy and unparsable files are left out, as is a file",
        "of which over half was seen before. Of a package at most 3 MB are taken. The data itself is not in the",
        "repository: `python training/data.py` fetches it again.",
        "",
        f"Trained on: {sum(not r[0] for r in rows)} packages, {total[False] / 1e6:.1f} MB. "
        f"Held out: {sum(r[0] for r in rows)} packages, {total[True] / 1e6:.1f} MB.",
    ]
    for held, title in ((True, "Held out for evaluation"), (False, "Trained on")):
        lines += ["", f"## {title}", "", "| package | version | licence | files | kB |", "|---|---|---|---|---|"]
        lines += [
            f"| {p.name} | {p.version} | {p.licence} | {count} | {size / 1000:.0f} |"
            for h, p, count, size in sorted(rows, key=lambda r: r[1].name.lower())
            if h == held
        ]
    (HERE / "DATA.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("fetch", "build", "pack"))
    parser.add_argument("work", type=Path)
    args = parser.parse_args()
    {"fetch": fetch, "build": build, "pack": pack}[args.command](args.work)


if __name__ == "__main__":
    main()
