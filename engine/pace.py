"""How much of a prompt a step may compute while others wait for their next token."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass

_REMEMBERED = 5  # measurements of one kind, so that one slow step of a busy machine does not count
_REFRESH = 25  # steps with a prefill between two steps that show again what decodes cost alone
_FAR = 512  # tokens of context from which attention shows
_MOST = 1.5  # how wrong one step can show an estimate to be: what is more is likely the machine's noise
_GAIN = 0.5  # how much of that the estimate follows
_DEARER = 1.15  # what a token of a larger prefill costs at most, over one of a smaller
_LEAST = 1e-9  # seconds


@dataclass(frozen=True, slots=True)
class Load:
    """What a step computes: a token of each of `decodes` sequences, and `prefill` tokens of prompts.

    attended: the keys that the latter attend to, those of all of them together.
    """

    decodes: int
    prefill: int = 0
    attended: int = 0


class Pace:
    """Chooses prefill sizes from what steps were measured to take.

    A step of decodes and a prefill shall take at most `slowdown` times a step of the decodes alone. But a
    prefill keeps at least `share` of the rate it has alone: where small chunks are much dearer per token
    than large ones (experts are read again for each), waiting costs less than never arriving.

    A prefill adds to the seconds of a step: so many for its size, and so many for each key that its tokens
    attend to. Each step corrects the larger of the two.
    """

    def __init__(self, longest: int, *, slowdown: float = 2.5, share: float = 0.25) -> None:
        self._sizes = _ladder(longest)
        self._slowdown, self._share = slowdown, share
        self._decodes: dict[int, deque[float]] = {}  # seconds of steps without prefill, by size class of the batch
        self._extra: dict[int, float] = {}  # seconds that a prefill of this size adds, but for its attention
        self._key = 0.0  # seconds for a key that a token attends to
        self._alone: deque[float] = deque(maxlen=_REMEMBERED)  # what a token costs in large prefills alone, in decodes
        self._largest = 1  # tokens of such a prefill
        self._used: set[int] = set()  # sizes measured since the last step of decodes alone
        self._mixed = 0  # steps of both since the last of decodes alone

    def note(self, load: Load, seconds: float) -> None:
        """A step has taken so long."""
        if not load.prefill:
            self._decodes.setdefault(load.decodes.bit_length(), deque(maxlen=_REMEMBERED)).append(seconds)
            if self._used:  # the others may have been measured in a bad moment, or long ago
                self._extra = {size: self._extra[size] for size in self._used}
            self._used, self._mixed = set(), 0
        elif load.decodes:
            self._mixed += 1
            if (base := self._base(load.decodes)) is not None:
                self._note_extra(load.prefill, load.attended, seconds - base)
        elif (base := self._base(1)) is not None:
            self._note_alone(load.prefill, seconds - self._key * load.attended, base)
            if load.prefill > 1:  # but for its attention, one of the tokens is a decode
                self._note_extra(load.prefill - 1, load.attended, seconds - base)

    def limit(self, decodes: int, context: int) -> int:
        """Tokens of prefill that the next step may have beside `decodes` sequences, after `context` others.

        Zero now and then: a step of decodes alone shows what they cost.
        """
        base = self._base(decodes)
        if base is None or self._mixed >= _REFRESH:
            return 0
        if not self._extra:
            return self._sizes[0]
        costs = {size: self._size_cost(size) + self._key * size * (context + size / 2) for size in self._sizes}
        allowed = (self._slowdown - 1) * base
        chosen = max((size for size, cost in costs.items() if cost <= allowed), default=self._sizes[0])
        least = 0.0
        if self._alone and (one := self._base(1)) is not None:
            least = self._share / (statistics.median(self._alone) * one + self._key * context)
        return next((size for size in self._sizes if size >= chosen and size >= least * (base + costs[size])), chosen)

    def _note_extra(self, prefill: int, attended: int, seconds: float) -> None:
        size = max(size for size in self._sizes if size <= prefill)
        if not self._extra:
            self._extra[size] = max(seconds, _LEAST) * size / prefill
        own, keys = self._size_cost(size) * prefill / size, self._key * attended
        if not self._key and attended >= _FAR * prefill:
            self._key = max(seconds - own, _LEAST) / attended
        elif keys > own:
            self._key = _follow(keys, seconds - own) / attended
        else:
            known = own if size in self._extra else seconds - keys
            self._extra[size] = _follow(known, seconds - keys) * size / prefill
            self._used.add(size)

    def _note_alone(self, prefill: int, seconds: float, base: float) -> None:
        """Small ones count, as what is known until there is a larger one: they are the slower."""
        if prefill >= 2 * self._largest:
            self._largest = prefill
            self._alone.clear()
        if 2 * prefill >= self._largest:
            self._alone.append(max(seconds, _LEAST) / prefill / base)

    def _base(self, decodes: int) -> float | None:
        """Seconds of a step of decodes alone: the second least that was measured, since noise only adds to it."""
        seconds = sorted(self._decodes.get(decodes.bit_length(), ()))
        return seconds[min(1, len(seconds) - 1)] if seconds else None

    def _size_cost(self, size: int) -> float:
        """Seconds that a prefill of this size adds before attention: as measured, or in proportion to the nearest.

        A token of a larger one is hardly dearer, so that what a bad moment has shown of it is tried again.
        """
        nearest = min(self._extra, key=lambda each: max(each / size, size / each))
        known = self._extra[nearest] * size / nearest
        smaller = (self._extra[each] * size / each for each in self._extra if each < size <= 2 * each)
        return min(known, _DEARER * min(smaller, default=known))


def _follow(known: float, seconds: float) -> float:
    """A better estimate: towards what was measured now, but no further than the machine's noise lets one believe."""
    off = max(seconds, _LEAST) / max(known, _LEAST)
    return max(known, _LEAST) * float(min(max(off, 1 / _MOST), _MOST) ** _GAIN)


def _ladder(longest: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, ... and `longest`, which ends it."""
    sizes = [1] if longest > 1 else []
    size = 2
    while size < longest:
        sizes += [each for each in (size, size * 3 // 2) if each < longest]
        size *= 2
    return [*sizes, longest]
