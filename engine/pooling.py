"""From the hidden states of a text to its embedding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


class NonFiniteStatesError(Exception):
    """Hidden states hold NaN or infinity."""


class Pooling:
    """The mean of hidden states of `size` values, which come in parts."""

    def __init__(self, size: int) -> None:
        self._sum = np.zeros(size, np.float64)

    def restart(self) -> None:
        """Forget what has come."""
        self._sum[:] = 0

    def add(self, states: Sequence[npt.NDArray[np.float32]]) -> None:
        """Of the next tokens: [size] each."""
        self._sum += np.sum(states, axis=0, dtype=np.float64)

    def embedding(self) -> bytes:
        """The mean scaled to length 1, float32, little-endian. Raises NonFiniteStatesError."""
        length = float(np.linalg.norm(self._sum))
        if not np.isfinite(length):
            raise NonFiniteStatesError("the model's hidden states are not finite")
        return (self._sum / (length or 1.0)).astype("<f4").tobytes()
