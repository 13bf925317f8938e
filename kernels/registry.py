"""Chooses the backend and explains the choice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mixbit.kernels.cpu.backend import CpuBackend
from mixbit.kernels.cuda.backend import CudaBackend
from mixbit.kernels.executor import Backend, BackendError
from mixbit.kernels.mlx.backend import MlxBackend, MlxCudaBackend
from mixbit.kernels.reference.backend import ReferenceBackend

__all__ = ["DEVICES", "BackendError", "Choice", "availability", "choose"]

# In order of preference. The reference is never chosen by itself: it is the slow definition.
_BACKENDS: tuple[Backend, ...] = (
    MlxBackend("metal", own_kernels=True),
    CudaBackend(),
    MlxCudaBackend(own_kernels=True),
    CpuBackend(),
)
_ONLY_BY_NAME: tuple[Backend, ...] = (MlxBackend("mlx-cpu"), ReferenceBackend())
_STOCK: Mapping[str, Backend] = {  # by device
    "metal": MlxBackend("metal"),
    "cuda": MlxCudaBackend(),
    "mlx-cuda": MlxCudaBackend(),
}

DEVICES = ("auto", *(backend.name for backend in _BACKENDS + _ONLY_BY_NAME))


@dataclass(frozen=True)
class Choice:
    """A backend and the reasons for it; str() gives "metal: not available (...); using cpu: AVX2"."""

    backend: Backend
    rejected: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        reasons = [f"{name}: {why}" for name, why in self.rejected]
        return "; ".join([*reasons, f"using {self.backend.name}: {self.backend.describe()}"])


def choose(device: str = "auto", kernels: str = "auto") -> Choice:
    """The first backend that this machine can run, or the one asked for.

    kernels: "auto" for this project's on GPUs where they apply, "stock" for MLX's own operations alone.

    Raises BackendError if `device` is unknown or not available here.
    """
    stock = _STOCK if kernels == "stock" else {}
    if device == "auto":
        rejected: list[tuple[str, str]] = []
        for backend in (stock.get(backend.name, backend) for backend in _BACKENDS):
            reason = backend.unavailable()
            if reason is None:
                return Choice(backend, tuple(rejected))
            rejected.append((backend.name, reason))
        raise BackendError("no backend can run here: " + "; ".join(f"{n}: {why}" for n, why in rejected))
    for backend in _BACKENDS + _ONLY_BY_NAME:
        if backend.name == device:
            chosen = stock.get(device, backend)
            reason = chosen.unavailable()
            if reason is not None:
                raise BackendError(f"device {device!r} cannot be used here: {reason}")
            return Choice(chosen, ())
    raise BackendError(f"unknown device {device!r}; choose one of: {', '.join(DEVICES)}")


def availability() -> tuple[tuple[str, str | None], ...]:
    """(backend, None or the reason it cannot run) for every backend that `auto` considers."""
    return tuple((backend.name, backend.unavailable()) for backend in _BACKENDS)
