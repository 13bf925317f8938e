"""The CUDA backend: NVIDIA GPUs through the driver, without MLX."""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING

from mixbit.kernels import ops
from mixbit.kernels.executor import BackendError, CacheConfig, ExecutorOptions

if TYPE_CHECKING:
    from mixbit.kernels.cuda.driver import Device
    from mixbit.kernels.cuda.executor import CudaExecutor

_LEAST_ARCH = 90  # clusters of blocks, and kernels that start before the one in front has ended


@cache
def _opened() -> Device:
    from mixbit.kernels.cuda.driver import Device

    return Device()


def _device() -> Device:
    """The first device, for the calling thread."""
    device = _opened()
    device.make_current()
    return device


class CudaBackend:
    """Runs programs on an NVIDIA GPU. `isa` and `threads` have no meaning here."""

    name = "cuda"

    def unavailable(self) -> str | None:
        """None if there is a driver, a device that the kernels run on, and a compiler."""
        if sys.platform == "darwin":
            return "macOS has no CUDA"
        from mixbit.kernels.cuda import compiler, driver

        reason = driver.unavailable() or compiler.unavailable()
        if reason is None:
            device = _device()
            if device.capability < _LEAST_ARCH:
                return f"{device.name} is {device.arch}; the kernels need sm_{_LEAST_ARCH} or later"
        return reason

    def describe(self) -> str:
        """The device as its driver names it."""
        device = _device()
        return f"{device.name}, {device.free_memory / 1e9:,.1f} GB free, own kernels"

    def free_memory(self) -> int:
        """Bytes of the device that can be allocated now."""
        return _device().free_memory

    def value_bytes(self, dtype: str | None) -> int:
        """Bytes of a cached key or value."""
        return 4 if dtype == "float32" else 2

    def compile(self, program: ops.Program, cache: CacheConfig, options: ExecutorOptions) -> CudaExecutor:
        """Upload the weights, allocate the pools and compile the kernels (once: machine code is kept on disk)."""
        from mixbit.kernels.cuda.compiler import Compiler
        from mixbit.kernels.cuda.executor import CudaExecutor

        if options.dtype == "float16":
            raise BackendError("the CUDA backend computes in bfloat16 or float32, not float16")
        device = _device()
        return CudaExecutor(program, cache, options, device, Compiler(device.arch))
