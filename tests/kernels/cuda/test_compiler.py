"""Sources put together and machine code kept; the compiler itself where it is installed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mixbit.kernels.cuda import compiler as compilers
from mixbit.kernels.cuda.compiler import Compiler, Source
from mixbit.kernels.executor import BackendError


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what is compiled, by a compiler that returns the text's length."""
    names: list[str] = []

    def compile_text(text: str, name: str, arch: str) -> bytes:
        names.append(f"{name} {arch}")
        return str(len(text)).encode()

    monkeypatch.setattr(compilers, "compile_text", compile_text)
    monkeypatch.setattr(compilers, "_nvrtc_version", lambda: (13, 0))
    return names


def test_includes_are_put_in_place_once() -> None:
    text = Source("attention.cu", ("HEADS 4", "FLOAT32")).text
    assert text.startswith("#define HEADS 4\n#define FLOAT32\n")
    assert '#include "' not in text
    assert text.count("struct Columns {") == 1
    assert "#include <cuda_bf16.h>" in text


def test_every_kernel_file_is_a_source() -> None:
    for path in Path(compilers.__file__).parent.glob("*.cu"):
        assert re.search(r'extern "C" __global__', Source(path.name).text), path.name


def test_machine_code_is_kept(compiled: list[str], tmp_path: Path) -> None:
    one, other = Source("rows.cu"), Source("rows.cu", ("FLOAT32",))
    told: list[tuple[int, int]] = []
    first = Compiler("sm_90", tmp_path).compile([one, other, one], lambda done, total: told.append((done, total)))
    assert first[0] == first[2] != first[1]
    assert sorted(compiled) == ["rows.cu sm_90"] * 2
    assert told == [(1, 2), (2, 2)]
    assert Compiler("sm_90", tmp_path).compile([one, other]) == first[:2]
    assert len(compiled) == 2
    Compiler("sm_80", tmp_path).compile([one])
    assert compiled[2:] == ["rows.cu sm_80"]
    assert all(path.suffix == ".cubin" for path in tmp_path.iterdir())


def test_another_compiler_compiles_again(compiled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Compiler("sm_90", tmp_path).compile([Source("rows.cu")])
    monkeypatch.setattr(compilers, "_nvrtc_version", lambda: (13, 1))
    Compiler("sm_90", tmp_path).compile([Source("rows.cu")])
    assert len(compiled) == 2


def test_wrong_text_is_refused_with_the_log() -> None:
    reason = compilers.unavailable()
    if reason is not None:
        pytest.skip(reason)
    with pytest.raises(BackendError, match=r"wrong\.cu does not compile for sm_90:[\s\S]*nonsense"):
        compilers.compile_text("nonsense", "wrong.cu", "sm_90")
