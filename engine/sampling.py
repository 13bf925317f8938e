"""From a row of logits to a token. One sampler per request, with random numbers of its own.

In order: repetition, presence and frequency penalties, bias (logprobs are taken here), the grammar's
mask, temperature, top_k, top_p over what top_k left, min_p. A vocabulary of 150,000 is never sorted: a
threshold that provably keeps the best tokens comes first.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mixbit.engine.constraint import Constraint
from mixbit.engine.penalties import Penalties
from mixbit.engine.protocol import Sampling

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.intp]

GREEDY_BELOW = 1e-5  # temperatures at or below are greedy: 1 / temperature must stay finite in float32
_GROUPS = 64  # values that are reduced together before anything finer is looked at
_FEW = 256  # candidates tried first for top_p; on real text they nearly always suffice
_BINS_PER_NAT = 32  # of the histogram that finds a large nucleus
_BINS = 32 * _BINS_PER_NAT


class NonFiniteLogitsError(ArithmeticError):
    """The model's logits hold NaN or infinity: no token can be chosen from them."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A sampled token; with logprobs asked for, its own and the most likely, best first."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    last: bool = False  # the request's grammar permits nothing more


class Sampler:
    """Chooses the tokens of one request. The same seed gives the same tokens from the same logits."""

    def __init__(
        self,
        sampling: Sampling,
        prompt: list[int],
        *,
        logprobs: int | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        self._sampling = sampling
        self._constraint = constraint
        self._logprobs = logprobs
        self._penalties = Penalties.of(sampling, prompt)
        seed = secrets.randbits(64) if sampling.seed is None else sampling.seed % 2**64
        self._random = np.random.Generator(np.random.PCG64(seed))

    def choose(self, logits: Floats) -> Choice:
        """The next token for logits [vocab], which are left as they are.

        Raises NonFiniteLogitsError if a logit is NaN or the largest is infinite, ConstraintError if the
        grammar cannot be followed.
        """
        if self._penalties is not None:
            logits = self._penalties.apply(logits)
        best = int(np.argmax(logits))  # a NaN counts as the largest
        if not math.isfinite(logits[best]):
            raise NonFiniteLogitsError(f"the model computed the logit {logits[best]} for token {best}")
        token, last = self._choose(logits, best)
        if self._penalties is not None:
            self._penalties.count(token)
        if self._logprobs is None:
            return Choice(token, last=last)
        return Choice(token, *self.score(logits, token), last)

    def score(self, logits: Floats, token: int) -> tuple[float, tuple[tuple[int, float], ...]]:
        """The log-probability of a token, and the most likely ones with theirs, as many as were asked for."""
        best = logits.max()
        total = best + math.log(np.exp(logits - best).sum())
        top = best_ids(logits, self._logprobs).tolist() if self._logprobs else []
        return float(logits[token] - total), tuple((i, float(logits[i] - total)) for i in top)

    def _choose(self, logits: Floats, best: int) -> tuple[int, bool]:
        """A token that the grammar permits, and whether it is the grammar's last."""
        if self._constraint is not None:
            logits = np.where(self._constraint.allowed(), logits, np.float32(-np.inf))
            best = int(np.argmax(logits))
        token = best if self._sampling.temperature <= GREEDY_BELOW else self._draw(logits, best)
        return token, self._constraint is not None and self._constraint.accept(token)

    def _draw(self, logits: Floats, best: int) -> int:
        """Sample after temperature and filters. One random number is used, whatever the settings."""
        sampling, draw = self._sampling, self._random.random()
        with np.errstate(over="ignore"):  # to -inf, which is right
            scaled = (logits - logits[best]) * np.float32(1 / sampling.temperature)
        ids: Ids | None = None
        if 0 < sampling.top_k < len(scaled):
            ids = best_ids(scaled, sampling.top_k)
        if sampling.top_p < 1:
            ids = (
                nucleus(scaled, sampling.top_p) if ids is None else ids[: _prefix(np.exp(scaled[ids]), sampling.top_p)]
            )
        if sampling.min_p > 0:
            least = math.log(sampling.min_p)
            ids = np.flatnonzero(scaled >= least) if ids is None else ids[scaled[ids] >= least]
        if ids is None:
            return inverse_cdf(np.exp(scaled), draw)
        return int(ids[inverse_cdf(np.exp(scaled[ids]), draw)])


def best_ids(values: Floats, count: int) -> Ids:
    """Indices of the `count` largest values, best first; among equals the lower index first.

    The count-th largest of the maxima of disjoint groups is reached by at least `count` values. So the
    best all lie at or above it; few others do, and only those are sorted.
    """
    count = min(count, len(values))
    whole = len(values) - len(values) % _GROUPS
    maxima = values[:whole].reshape(_GROUPS, -1).max(axis=0) if count * _GROUPS <= whole else values
    threshold = np.partition(maxima, len(maxima) - count)[len(maxima) - count]
    candidates = np.flatnonzero(values >= threshold)
    return candidates[np.argsort(-values[candidates], kind="stable")[:count]]


def nucleus(scaled: Floats, top_p: float) -> Ids:
    """The fewest best tokens that hold `top_p` of the probability: one at least. In no stated order.

    scaled: logits / temperature, [vocab], the largest 0.
    """
    weights = np.exp(scaled)
    target = top_p * float(weights.sum())
    few = best_ids(scaled, _FEW)
    if float(weights[few].sum()) >= target or len(few) == len(scaled):
        return few[: _prefix(weights[few], top_p, target)]
    # A flat distribution: whole bins of a histogram over the logits, then the best of the bin where it ends.
    bins = np.minimum(scaled * np.float32(-_BINS_PER_NAT), np.float32(_BINS)).astype(np.intp)
    filled = np.cumsum(np.bincount(bins, weights))
    last = min(int(np.searchsorted(filled, target)), len(filled) - 1)
    above, inside = np.flatnonzero(bins < last), np.flatnonzero(bins == last)
    inside = inside[np.argsort(-scaled[inside], kind="stable")]
    rest = target - (float(filled[last - 1]) if last else 0.0)
    return np.concatenate([above, inside[: _prefix(weights[inside], top_p, rest)]])


def _prefix(weights: Floats, top_p: float, target: float | None = None) -> int:
    """How many leading weights reach `target` (`top_p` of their sum if None): all of them if none do."""
    sums = np.cumsum(weights, dtype=np.float64)
    return int(np.searchsorted(sums, top_p * sums[-1] if target is None else target)) + 1


def inverse_cdf(weights: Floats, draw: float) -> int:
    """The index at which the running sum of the weights passes `draw` (0 <= draw < 1) of the total.

    Large arrays are summed in columns first. The order of the sum is fixed but not that of the indices,
    which does not matter to the distribution. An index of weight zero is never returned.
    """
    whole = len(weights) - len(weights) % _GROUPS
    if len(weights) <= _GROUPS * _GROUPS:
        return _pass(weights, draw)[0]
    grid = weights[:whole].reshape(_GROUPS, -1)
    column, rest = _pass(np.concatenate([grid.sum(axis=0), weights[whole:]]), draw)
    columns = grid.shape[1]
    if column >= columns:
        return whole + column - columns
    return _pass(grid[:, column], rest)[0] * columns + column


def _pass(weights: Floats, draw: float) -> tuple[int, float]:
    """The index where the running sum passes `draw` of the total, and how far into its weight that is, in [0, 1)."""
    sums = np.cumsum(weights, dtype=np.float64)
    point = draw * sums[-1]
    index = int(np.searchsorted(sums, point, side="right"))
    if index == len(weights) or weights[index] == 0:  # rounding at the very end
        index = int(np.flatnonzero(weights)[-1])
    before = float(sums[index - 1]) if index else 0.0
    return index, min(max(float(point - before) / float(weights[index]), 0.0), math.nextafter(1.0, 0.0))
