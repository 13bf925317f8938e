"""The CUDA backend: NVIDIA GPUs through the driver, without MLX."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from mixbit.kernels import ops
from mixbit.kernels.executor import BackendError, CacheConfig, ExecutorOptions

if TYPE_CHECKING:
    from mixbit.kernels.cuda.executor import CudaExecutor

_LEAST_ARCH = 80  # bfloat16 on tensor cores


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
            device = driver.Device()
            if device.capability < _LEAST_ARCH:
                return f"{device.name} is {device.arch}; the kernels need sm_{_LEAST_ARCH} or later"
        return reason

    def describe(self) -> str:
        """The device as its driver names it."""
        from mixbit.kernels.cuda.driver import Device

        device = Device()
        return f"{device.name}, {device.free_memory / 1e9:,.1f} GB free, own kernels"

    def free_memory(self) -> int:
        """Bytes of the device that can be allocated now."""
        from mixbit.kernels.cuda.driver import Device

        return Device().free_memory

    def value_bytes(self, dtype: str | None) -> int:
        """Bytes of a cached key or value."""
        return 4 if dtype == "float32" else 2

    def compile(self, program: ops.Program, cache: CacheConfig, options: ExecutorOptions) -> CudaExecutor:
        """Upload the weights, allocate the pools and compile the kernels (once: machine code is kept on disk)."""
        from mixbit.kernels.cuda.compiler import Compiler
        from mixbit.kernels.cuda.driver import Device
        from mixbit.kernels.cuda.executor import CudaExecutor

        if options.dtype == "float16":
            raise BackendError("the CUDA backend computes in bfloat16 or float32, not float16")
        device = Device()
        return CudaExecutor(program, cache, options, device, Compiler(device.arch))
