"""The instruction set for tests of texts that are the same whatever else runs, in the fast mode too.

Not AMX, with which a token's rounded products depend on how many it is computed with.
"""

from __future__ import annotations

from mixbit.kernels.cpu import _cpu


def isa_for(precision: str) -> str | None:
    """None: the best one."""
    return "avx512" if precision == "fast" and "amx" in _cpu.supported_isas() else None


ISA = isa_for("fast")
ARGUMENTS = ("--isa", ISA) if ISA else ()  # of `mixbit serve`, whose precision is fast unless it is told otherwise
