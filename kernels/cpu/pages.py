"""Pages of mapped weights: brought into memory and held there."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

_WILL_NEED = 3  # MADV_WILLNEED, on Linux and macOS


def keep(arrays: Iterable[npt.NDArray[np.generic]]) -> None:
    """Have the system read what these arrays lie in, in this order, and lock it where it lets us.

    Takes as long as the disk; nothing depends on it, and what the system refuses is left.
    """
    system: Any = ctypes.CDLL(None)
    for array in arrays:
        begin = array.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
        place = ctypes.c_void_p(begin), ctypes.c_size_t(array.ctypes.data + array.nbytes - begin)
        system.madvise(*place, _WILL_NEED)
        system.mlock(*place)
