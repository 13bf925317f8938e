"""How the parameters move: Muon for matrices, the rate by how much of the run is done, and by which clock."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """How to train. batch: sequences of the context's length. warmup: steps. final: of the rate, at the end."""

    batch: int = 32
    muon_rate: float = 0.02
    adam_rate: float = 2e-3
    warmup: int = 100
    final: float = 0.02
    decay: float = 0.02


def rate_at(step: int, done: float, plan: Plan) -> float:
    """Share of the full rate: linear warm-up, then a cosine down to plan.final. done: share of the run, 0 to 1."""
    cosine = plan.final + (1 - plan.final) * (1 + math.cos(math.pi * min(done, 1.0))) / 2
    return min(1.0, (step + 1) / plan.warmup) * cosine


class Steps:
    """A run of so many steps."""

    def __init__(self, steps: int) -> None:
        self._steps, self._clock = steps, Minutes(0)

    @property
    def spent(self) -> float:
        """Seconds of the run so far."""
        return self._clock.spent

    @spent.setter
    def spent(self, seconds: float) -> None:
        """Seconds of the commands before this one."""
        self._clock.spent = seconds

    def done(self, step: int) -> float:
        """Share of the run that is behind `step`."""
        return step / self._steps


class Minutes:
    """A run of so many minutes, with those of earlier commands that it goes on from.

    The cosine follows the clock, so that it ends where the time does, however fast the steps are.
    """

    def __init__(self, minutes: float) -> None:
        self._seconds, self._before, self._start = 60 * minutes, 0.0, time.monotonic()

    @property
    def spent(self) -> float:
        """Seconds of the run so far."""
        return self._before + time.monotonic() - self._start

    @spent.setter
    def spent(self, seconds: float) -> None:
        """Seconds of the commands before this one."""
        self._before = seconds

    def done(self, step: int) -> float:
        """Share of the run that is behind `step`."""
        return self.spent / self._seconds


def orthogonalized(g: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices to g [..., rows, columns], by Newton-Schulz (Jordan et al., Muon)."""
    x = g.bfloat16().flatten(0, -3)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if tall := x.shape[-2] > x.shape[-1]:
        x = x.mT
    for _ in range(5):
        a = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.mT if tall else x).float().reshape(g.shape)


class Muon:
    """Momentum with orthogonalized steps for matrices and stacks of matrices; equal shapes are treated together."""

    def __init__(self, params: Iterable[Tensor], decay: float) -> None:
        by_shape: dict[tuple[int, ...], list[Tensor]] = {}
        for p in params:
            by_shape.setdefault(tuple(p.shape), []).append(p)
        self.groups = list(by_shape.values())
        self.momenta = [torch.zeros((len(group), *group[0].shape), device=group[0].device) for group in self.groups]
        self.decay = decay

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One step from the gradients."""
        for group, momentum in zip(self.groups, self.momenta, strict=True):
            g = torch.stack([p.grad for p in group]).float()
            momentum.lerp_(g, 0.05)
            update = orthogonalized(g.lerp(momentum, 0.95))
            scale = rate * max(1, update.shape[-2] / update.shape[-1]) ** 0.5
            torch._foreach_mul_(group, 1 - rate * self.decay)
            torch._foreach_add_(group, list(update.unbind(0)), alpha=-scale)
