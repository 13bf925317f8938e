"""Norms of many rows, and the selection of rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mixbit.kernels.cuda.compiler import Source
from mixbit.kernels.cuda.driver import Addressed, Launch
from mixbit.kernels.cuda.prefill import NULL, Modules


def applies(dim: int) -> bool:
    """Whether the kernels serve rows of this many values."""
    return dim % 8 == 0


@dataclass(frozen=True, eq=False)
class AddNorm:
    """total = x + delta, out = norm(total); without delta, out = norm(x). weight: float32 [dim]."""

    dim: int
    eps: float
    x: Addressed
    weight: Addressed
    out: Addressed
    delta: Addressed | None = None
    total: Addressed | None = None

    @property
    def sources(self) -> tuple[Source, ...]:
        """What must be compiled."""
        return (Source("prefill_rows.cu", (f"DIM {self.dim}",)),)

    def launches(self, modules: Modules, rows: int) -> list[Launch]:
        """The norm of so many rows."""
        added = (
            (NULL, self.weight, NULL)
            if self.delta is None or self.total is None
            else (self.delta, self.weight, self.total)
        )
        kernel = modules[self.sources[0]].function("prefill_norm")
        return [Launch(kernel, (rows, 1, 1), (256, 1, 1), (self.x, *added, self.out, np.float32(self.eps)))]


@dataclass(frozen=True, eq=False)
class Select:
    """out[i] = x[rows[i]]; rows: int32 on the device."""

    dim: int
    x: Addressed
    rows: Addressed
    out: Addressed

    @property
    def sources(self) -> tuple[Source, ...]:
        """What must be compiled."""
        return (Source("prefill_rows.cu", (f"DIM {self.dim}",)),)

    def launches(self, modules: Modules, rows: int) -> list[Launch]:
        """So many rows."""
        kernel = modules[self.sources[0]].function("prefill_select")
        return [Launch(kernel, (rows, 1, 1), (256, 1, 1), (self.x, self.rows, self.out))]
