"""The instruction set for tests of texts that are the same whatever else runs, in the fast mode too.

Not AMX, with which a token's products depend on how many it is computed with.
"""

from __future__ import annotations

from mixbit.kernels.cpu import _cpu

ISA = "avx512" if "amx" in _cpu.supported_isas() else None
ARGUMENTS = ("--isa", ISA) if ISA else ()  # of `mixbit serve`
