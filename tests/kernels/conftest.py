"""Every way to run a program on this machine."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass

import pytest

from mixbit.kernels.cpu.backend import CpuBackend
from mixbit.kernels.cuda.backend import CudaBackend
from mixbit.kernels.executor import Backend, CacheConfig, Executor, ExecutorOptions
from mixbit.kernels.mlx.backend import MlxBackend, Name
from mixbit.kernels.ops import Program
from mixbit.kernels.reference.backend import ReferenceBackend
from tests.kernels.builders import CACHE


@dataclass(frozen=True)
class Candidate:
    """A backend, and the instruction set it is held to."""

    backend: Backend
    isa: str | None = None
    rounding: float = 1.0  # of its float32, beside that of IEEE sums

    def compile(self, program: Program, cache: CacheConfig = CACHE, *, profile: bool = False) -> Executor:
        """An executor in float32."""
        options = ExecutorOptions(max_tokens=256, threads=2, isa=self.isa, dtype="float32", profile=profile)
        return self.backend.compile(program, cache, options)


CANDIDATES: dict[str, Candidate] = {}
if CpuBackend().unavailable() is None:  # a GPU machine may do without the native module
    from mixbit.kernels.cpu import _cpu

    CANDIDATES |= {f"cpu-{isa}": Candidate(CpuBackend(), isa) for isa in _cpu.supported_isas()}
if importlib.util.find_spec("mlx") is not None:  # a GPU machine may do without
    CANDIDATES["mlx-cpu"] = Candidate(MlxBackend("mlx-cpu"))
    if sys.platform == "linux":  # where the compiler that runs Metal's text is installed
        from tests.metal.backend import HostMetalBackend

        CANDIDATES["metal-on-host"] = Candidate(HostMetalBackend())
GPUS: dict[str, Name] = {"mlx-metal": "metal", "mlx-cuda": "mlx-cuda"}
for name, device in GPUS.items():
    if MlxBackend(device).unavailable() is None:
        CANDIDATES[f"{name}-stock"] = Candidate(MlxBackend(device), rounding=4.0)
        CANDIDATES[f"{name}-own"] = Candidate(MlxBackend(device, own_kernels=True), rounding=4.0)
if CudaBackend().unavailable() is None:
    CANDIDATES["cuda"] = Candidate(CudaBackend(), rounding=4.0)  # tensor cores truncate
REFERENCE = Candidate(ReferenceBackend())


@pytest.fixture(params=CANDIDATES)
def candidate(request: pytest.FixtureRequest) -> Candidate:
    """A backend to compare with the reference."""
    return CANDIDATES[request.param]


@pytest.fixture(params=["reference", *CANDIDATES])
def any_candidate(request: pytest.FixtureRequest) -> Candidate:
    """Any backend, for what must hold of the reference too."""
    return REFERENCE if request.param == "reference" else CANDIDATES[request.param]
