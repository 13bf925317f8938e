"""Every kernel of a real model's steps through NVRTC, which needs no GPU: `make test-cuda` installs it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from bench.gpu_shapes import config, program
from mixbit.kernels.cuda import compiler as compilers
from mixbit.kernels.cuda import many
from mixbit.kernels.cuda.compiler import Compiler, Source
from mixbit.kernels.cuda.executor import CudaExecutor
from mixbit.kernels.cuda.plan import sources_of
from mixbit.kernels.executor import CacheConfig, ExecutorOptions
from mixbit.kernels.ops import Program
from tests.kernels.builders import Sequences
from tests.kernels.cuda.fakes import FakeBuffer, FakeDevice
from tests.kernels.test_executor import PROGRAM

CACHE = CacheConfig(blocks=80, block_size=32, state_slots=2)
FOLDER = Path(compilers.__file__).parent


class _Nothing:
    """Stands for a compiler while an executor says what it would need."""

    def compile(self, sources: Iterable[Source], progress: Any = None) -> list[bytes]:
        return [b"" for _ in sources]


def sources(model: Program, dtype: str) -> list[Source]:
    """What steps of 1, 4, 16 and 200 rows of the model need."""
    device: Any = FakeDevice(arch="sm_90a")
    compiler: Any = _Nothing()
    options = ExecutorOptions(max_tokens=256, dtype=dtype)  # type: ignore[arg-type]
    executor = CudaExecutor(model, CACHE, options, device, compiler, lambda _: FakeBuffer(device, 16))  # type: ignore[arg-type,return-value]
    found = [
        source
        for rows in (1, 4, 16)
        for _, planned in executor._few.planned(rows, rows, rows)
        for source in sources_of(planned)
    ]
    batch = Sequences(CACHE, count=1).step({0: range(200)})
    steps, grouped = executor._steps_of_many(), many.applies(dtype, batch)
    steps.upload(batch, grouped=grouped)
    if grouped:
        found += steps._prefill().sources
    else:
        found += [source for _, planned in steps.planned(200, 1, 1) for source in sources_of(planned)]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["real sizes", "mixed widths"])
def test_every_kernel_of_a_step_compiles(name: str, dtype: str, tmp_path: Path) -> None:
    reason = compilers.unavailable()
    if reason is not None:
        pytest.skip(reason)
    wanted = sources(program(config(4)) if name == "real sizes" else PROGRAM, dtype)
    codes = Compiler("sm_90a", tmp_path).compile(wanted)
    assert all(code.startswith(b"\x7fELF") for code in codes)


def test_no_kernel_is_left_out() -> None:
    """The sources above are of every file there is."""
    wanted = {source.file for dtype in ("float32", "bfloat16") for source in sources(program(config(4)), dtype)}
    assert wanted == {path.name for path in FOLDER.glob("*.cu")}
