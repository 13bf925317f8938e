"""The MLX backends: Metal, CUDA, and MLX's own CPU device. MLX is imported only when asked for."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from typing import TYPE_CHECKING, Literal

from mixbit.kernels.executor import CacheConfig, ExecutorOptions
from mixbit.kernels.nvidia import missing_driver
from mixbit.kernels.ops import Moe, Program

if TYPE_CHECKING:
    import mlx.core as mx

    from mixbit.kernels.mlx.executor import MlxExecutor

Name = Literal["metal", "mlx-cuda", "mlx-cpu"]


class MlxBackend:
    """Runs programs with MLX on one kind of device. `isa` and `threads` have no meaning here.

    own_kernels: this project's kernels where they apply, else MLX's operations alone.
    """

    def __init__(self, name: Name, *, own_kernels: bool = False) -> None:
        self.name: str = name
        self._own_kernels = own_kernels

    def unavailable(self) -> str | None:
        """None if MLX has this device here, else what is missing."""
        if self.name == "metal" and sys.platform != "darwin":
            return "this is not macOS"
        if self.name == "mlx-cuda" and sys.platform == "darwin":
            return "macOS has no CUDA"
        if self.name == "mlx-cuda" and (reason := missing_driver()):
            return reason
        if importlib.util.find_spec("mlx") is None:
            return "mlx is not installed"
        try:
            import mlx.core as mx
        except ImportError as error:  # a GPU build without its driver's libraries
            return f"mlx cannot be imported: {error}"
        if self.name == "metal" and not mx.metal.is_available():
            return "mlx has no Metal device"
        if self.name == "mlx-cuda" and not mx.cuda.is_available():
            return "mlx has no CUDA device"
        return None

    def describe(self) -> str:
        """The device as MLX names it."""
        import mlx.core as mx

        device = mx.Device(self._device(), 0)
        name = mx.device_info(device).get("device_name", "unknown device")
        kernels = "own kernels" if self._own_kernels else "stock operations"
        return f"{name}, MLX {importlib.metadata.version('mlx')}, {kernels}"

    def step_bytes(self, program: Program, options: ExecutorOptions) -> int:
        """About what a step of options.max_tokens holds at once: its largest values, in float32."""
        widest = max(value.dim for value in program.values)
        moes = [node for node in program.nodes if isinstance(node, Moe)]
        chosen = max((m.spec.top_k * (3 * m.spec.experts.gate.out_dim + m.out.dim) for m in moes), default=0)
        return 4 * options.max_tokens * (8 * widest + 2 * chosen)

    def least_expert_bytes(self, program: Program) -> int:
        """Two experts in each layer."""
        from mixbit.kernels.mlx.streaming import least_bytes

        return least_bytes(program)

    def compile(self, program: Program, cache: CacheConfig, options: ExecutorOptions) -> MlxExecutor:
        """Copy the weights to the device (on the CPU in float32) and allocate the pools."""
        from mixbit.kernels.mlx.executor import MlxExecutor
        from mixbit.kernels.mlx.stock import STOCK

        if not self._own_kernels:
            return MlxExecutor(program, cache, options, self._device(), STOCK)
        from mixbit.kernels.mlx.custom.launch import Launcher
        from mixbit.kernels.mlx.custom.table import custom_table

        launcher = Launcher.of_this_machine()
        table = STOCK if launcher is None else custom_table(launcher)
        return MlxExecutor(program, cache, options, self._device(), table)

    def _device(self) -> mx.DeviceType:
        import mlx.core as mx

        return mx.cpu if self.name == "mlx-cpu" else mx.gpu


class MlxCudaBackend(MlxBackend):
    """MLX on an NVIDIA GPU, whose memory is its own."""

    def __init__(self, *, own_kernels: bool = False) -> None:
        super().__init__("mlx-cuda", own_kernels=own_kernels)

    def free_memory(self) -> int:
        """Bytes of the device that can be allocated now, those that MLX keeps for the next arrays included."""
        import mlx.core as mx

        return int(mx.device_info(mx.Device(mx.gpu, 0))["free_memory"]) + mx.get_cache_memory()

    def value_bytes(self, dtype: str | None) -> int:
        """Bytes of a cached key or value; where the checkpoint decides, at most these."""
        return 2 if dtype in {"float16", "bfloat16"} else 4
