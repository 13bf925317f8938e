"""A backend whose Metal kernels run on the host, for the tests of the op table."""

from __future__ import annotations

import mlx.core as mx

from mixbit.kernels.executor import CacheConfig, ExecutorOptions
from mixbit.kernels.mlx.custom.launch import Launcher
from mixbit.kernels.mlx.custom.table import custom_table
from mixbit.kernels.mlx.executor import MlxExecutor
from mixbit.kernels.ops import Program
from tests.metal.host import HostMetal


class HostMetalBackend:
    """Our kernels through `host`; stock operations, where they serve, on MLX's CPU device."""

    name = "metal-on-host"

    def __init__(self, host: HostMetal | None = None) -> None:
        pools = frozenset({"keys", "cached"})  # attention writes to them in place
        self.host = HostMetal(in_place=pools) if host is None else host

    def unavailable(self) -> str | None:
        """Never."""
        return None

    def describe(self) -> str:
        """What it is."""
        return "Metal kernels executed by the host"

    def compile(self, program: Program, cache: CacheConfig, options: ExecutorOptions) -> MlxExecutor:
        """As MlxBackend, with our table."""
        table = custom_table(Launcher("metal", self.host.kernel))
        return MlxExecutor(program, cache, options, mx.cpu, table)
