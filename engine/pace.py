"""How much of a prompt a step may compute while others wait for their next token."""

from __future__ import annotations

import statistics
from collections import deque

_SMALLEST = 8  # tokens
_REMEMBERED = 5  # measurements of one kind; their median counts, so that one slow step of a busy machine does not
_REFRESH = 50  # steps with a prefill between two steps that show again what decodes cost alone


class Pace:
    """Chooses prefill sizes from what steps were measured to take.

    A step of decodes and a prefill shall take at most `slowdown` times a step of the decodes alone. But a
    prefill keeps at least `share` of the rate it has alone: where small chunks are much dearer per token
    than large ones (experts are read again for each), waiting costs less than never arriving. What it has alone is
    measured at the beginning of prompts; as prefills of one size become dearer with their context, it counts as less.
    """

    def __init__(self, longest: int, *, slowdown: float = 2.5, share: float = 0.25) -> None:
        self._sizes = _ladder(longest)
        self._slowdown, self._share = slowdown, share
        self._decodes: dict[int, deque[float]] = {}  # seconds of steps without prefill, by size class of the batch
        self._extra: dict[int, deque[float]] = {}  # seconds that a prefill of this size adds
        self._alone: deque[float] = deque(maxlen=_REMEMBERED)  # tokens per second of the largest prefills alone
        self._largest = 1  # tokens of such a prefill
        self._whole: dict[int, deque[float]] = {}  # seconds of prefills alone, by size
        self._dearer: deque[float] = deque([1.0], maxlen=_REMEMBERED)  # what prefills beside decodes take, over those
        self._used: set[int] = set()  # sizes measured since the last step of decodes alone
        self._mixed = 0  # steps of both since then

    def note(self, decodes: int, prefill: int, seconds: float) -> None:
        """A step of `decodes` sequences and `prefill` other tokens has taken so long."""
        if not prefill:
            _add(self._decodes, decodes.bit_length(), seconds)
            if self._used:  # the others may have been measured in a bad moment, or long ago
                self._extra = {size: self._extra[size] for size in self._used}
            self._used, self._mixed = set(), 0
            return
        if not decodes:
            self._note_alone(prefill, seconds)
        self._mixed += bool(decodes)
        size = max((size for size in self._sizes if size <= prefill), default=None)
        if size is not None:
            extra = seconds - (self._base(decodes) or 0.0)
            _add(self._extra, size, max(extra, 0.0) * size / prefill)
            self._used.add(size)
            if not decodes:
                _add(self._whole, size, seconds * size / prefill)
            elif any(size <= 2 * known <= 4 * size for known in self._whole):
                self._dearer.append(max(1.0, extra * size / prefill / _estimate(self._whole, size)))

    def limit(self, decodes: int) -> int:
        """Tokens of prefill that the next step may have beside `decodes` sequences.

        Zero now and then: a step of decodes alone shows what they cost.
        """
        base = self._base(decodes)
        if base is None or self._mixed >= _REFRESH:
            return 0
        if not self._extra:
            return self._sizes[0]
        allowed = (self._slowdown - 1) * base
        least = 0.0
        if self._alone:
            least = self._share * statistics.median(self._alone) / statistics.median(self._dearer)
        chosen = max((size for size in self._sizes if self._cost(size) <= allowed), default=self._sizes[0])
        for size in self._sizes:
            if size >= chosen and size >= least * (base + self._cost(size)):
                return size
        return self._sizes[-1]

    def _note_alone(self, prefill: int, seconds: float) -> None:
        """Small ones count, as what is known until there is a larger one: they are the slower."""
        if prefill >= 2 * self._largest:
            self._largest = prefill
            self._alone.clear()
        if 2 * prefill >= self._largest:
            self._alone.append(prefill / seconds)

    def _base(self, decodes: int) -> float | None:
        seconds = self._decodes.get(decodes.bit_length())
        return statistics.median(seconds) if seconds else None

    def _cost(self, size: int) -> float:
        """Seconds that a prefill adds."""
        return _estimate(self._extra, size)


def _estimate(known: dict[int, deque[float]], size: int) -> float:
    """Seconds of a size: measured, or in proportion to the nearest size that was."""
    nearest = min(known, key=lambda each: max(each / size, size / each))
    return statistics.median(known[nearest]) * size / nearest


def _ladder(longest: int) -> list[int]:
    """8, 12, 16, 24, 32, ... and `longest`, which ends it."""
    sizes = []
    size = _SMALLEST
    while size < longest:
        sizes += [each for each in (size, size * 3 // 2) if each < longest]
        size *= 2
    return [*sizes, longest]


def _add(known: dict[int, deque[float]], key: int, value: float) -> None:
    known.setdefault(key, deque(maxlen=_REMEMBERED)).append(value)
