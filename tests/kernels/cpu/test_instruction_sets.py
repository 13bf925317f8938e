"""The units of each instruction set: those that this machine cannot run, and what they leave to the linker."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SOURCES = ROOT / "kernels" / "cpu" / "src"
ZIG = (sys.executable, "-m", "ziglang", "c++", "-std=c++20", "-fno-math-errno", f"-I{SOURCES}")
AVX2 = ("-target", "x86_64-linux-musl", "-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni", "vbmi")))
BF16 = (*AVX512, "-mavx512bf16")
NEON = ("-target", "aarch64-linux-musl", "-mcpu=generic+dotprod")
UNITS = {
    "bf16_amx": BF16,
    "int8_avx2": AVX2,
    "int8_avx512": AVX512,
    "int8_neon": NEON,
    "isa_avx2": AVX2,
    "isa_avx512": AVX512,
    "isa_neon": NEON,
    "vector_ops_avx2": AVX2,
    "vector_ops_avx512": AVX512,
    "vector_ops_amx": BF16,
    "vector_ops_avx512_bf16": BF16,
    "vector_ops_neon": NEON,
}

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="needs the package ziglang")


def weak_symbols(source: Path, flags: tuple[str, ...], folder: Path) -> list[str]:
    """Functions that a file compiled without optimisation offers to every other file of the program."""
    out = folder / "unit.s"
    subprocess.run([*ZIG, *flags, "-O0", "-fno-sanitize=all", "-S", str(source), "-o", str(out)], check=True)
    assembly = out.read_text()
    assert ".globl" in assembly
    return [line.split()[1] for line in assembly.splitlines() if line.strip().startswith(".weak")]


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_with_flags_of_its_own_shares_no_inline_function(unit: str, tmp_path: Path) -> None:
    assert weak_symbols(SOURCES / f"{unit}.cpp", UNITS[unit], tmp_path) == []


def test_weak_symbols_are_found_where_there_are_some(tmp_path: Path) -> None:
    assert weak_symbols(SOURCES / "matmul.cpp", AVX2, tmp_path)


@pytest.mark.skipif(shutil.which("qemu-aarch64-static") is None, reason="needs qemu-user-static")
def test_neon_under_emulation(tmp_path: Path) -> None:
    program = tmp_path / "matmul_test"
    plain = [ROOT / "tests" / "native" / "matmul_test.cpp", *(SOURCES / f"{name}.cpp" for name in ("matmul", "isa"))]
    units = [SOURCES / f"{unit}_{name}.cpp" for unit in ("isa", "int8") for name in ("portable", "neon")]
    flags = [*NEON, "-static", "-O2", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*ZIG, *flags, *map(str, plain + units), "-o", str(program)], check=True)
    for isa in ("portable", "neon"):
        command = ["qemu-aarch64-static", "-cpu", "max", str(program), isa, "216"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"{isa}: 216 cases" in done.stdout


@pytest.mark.parametrize(("name", "cases"), [("tmm_test", 108), ("tile_attention_test", 60)])
def test_tile_registers_played_by_loops(name: str, cases: int, tmp_path: Path) -> None:
    program = tmp_path / name
    source = ROOT / "tests" / "native" / f"{name}.cpp"
    flags = ["-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*ZIG, *flags, str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{cases} cases, 0 differ" in done.stdout
