"""The rate that no implementation on this machine can pass, from what the machine was measured to do.

The floor of a step is the larger of: its bytes over the measured bandwidth, and its operations over the
measured rates (matrices at the int8 rate in the fast mode, all else at the float32 rate).
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from mixbit.engine.step_cost import Cost


@dataclass(frozen=True)
class Rates:
    """read: bytes a second. int8, float32: operations a second (a multiplication and an addition are two)."""

    read: float
    int8: float
    float32: float

    def best(self, other: Rates) -> Rates:
        """The larger of each."""
        return Rates(max(self.read, other.read), max(self.int8, other.int8), max(self.float32, other.float32))

    def floor(self, cost: Cost, *, exact: bool) -> float:
        """Seconds of a step."""
        matrix_rate = self.float32 if exact or self.int8 == 0 else self.int8
        return max(cost.bytes / self.read, cost.matrix_operations / matrix_rate + cost.operations / self.float32)


def measure(program: Path, threads: int) -> Rates:
    """Run bench/rates.cpp, compiled as `program`."""
    result = subprocess.run([str(program), str(threads)], capture_output=True, text=True, check=True)
    return Rates(**json.loads(result.stdout))
