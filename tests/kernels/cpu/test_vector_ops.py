"""The vector functions on widths that this machine may not have: NEON, and sixteen lanes as AVX-512 has them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.kernels.cpu.test_instruction_sets import NEON, ROOT, SOURCES, ZIG, pytestmark

__all__ = ["pytestmark"]

UNITS = ("vector_ops", "vector_ops_portable", "vector_ops_neon", "isa")


@pytest.mark.skipif(shutil.which("qemu-aarch64-static") is None, reason="needs qemu-user-static")
@pytest.mark.parametrize("lanes", [4, 16])
def test_vector_functions_under_emulation(lanes: int, tmp_path: Path) -> None:
    program = str(tmp_path / "vector_ops_test")
    sources = [ROOT / "tests" / "native" / "vector_ops_test.cpp", *(SOURCES / f"{unit}.cpp" for unit in UNITS)]
    flags = [*NEON, "-static", "-O1", "-Wall", "-Wextra", "-Werror", f"-DMIXBIT_LANES={lanes}"]
    subprocess.run([*ZIG, *flags, *map(str, sources), "-o", program], check=True)
    done = subprocess.run(
        ["qemu-aarch64-static", "-cpu", "max", program, "neon", "50"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "neon: 50 cases, 0 failures" in done.stdout
