"""Mixture of experts as few large operations of fixed shapes: no expert is waited for, none overflows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ALIGNED = 16  # rows: each expert's group begins at a multiple, as the grouped products of GPUs want it


@dataclass(frozen=True, eq=False)
class Groups:
    """Where the (token, choice) pairs go when sorted by expert. `rows` is fixed by the shapes, groups are padded.

    source: [rows], the token of each row (0 for padding). place: [tokens * k], the row of each pair. ends: int32
    [experts], where each group ends. counts: [experts], pairs of each.
    """

    source: Tensor
    place: Tensor
    ends: Tensor
    counts: Tensor


def group(chosen: Tensor, experts: int) -> Groups:
    """chosen: [tokens, k], experts of each token."""
    pairs = chosen.numel()
    ordered, order = chosen.flatten().to(torch.int16).sort(stable=True)
    index = torch.arange(pairs, device=chosen.device)
    bounds = torch.searchsorted(ordered, torch.arange(experts, dtype=torch.int16, device=chosen.device), right=True)
    counts = bounds.diff(prepend=bounds.new_zeros(1))
    padded = (counts + ALIGNED - 1) // ALIGNED * ALIGNED
    ends = padded.cumsum(0)
    row = index + (ends - padded - bounds + counts)[ordered.long()]
    place = torch.empty_like(index).scatter(0, order, row)
    source = index.new_zeros(pairs + experts * ALIGNED).scatter(0, row, order // chosen.shape[1])
    return Groups(source, place, ends.int(), counts)


class Dispatch(torch.autograd.Function):
    """Rows by expert from rows by token. Backward gathers too: its scattered sums are of known places."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, place: Tensor) -> Tensor:
        """x: [tokens, dim] -> [rows, dim]."""
        ctx.save_for_backward(place)
        ctx.tokens = len(x)
        return x[source]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """grad: [rows, dim]."""
        (place,) = ctx.saved_tensors
        return grad[place].view(ctx.tokens, -1, grad.shape[-1]).sum(1), None, None


class Combine(torch.autograd.Function):
    """Rows by (token, choice) from rows by expert."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, place: Tensor) -> Tensor:
        """y: [rows, dim] -> [tokens * k, dim]."""
        ctx.save_for_backward(place)
        ctx.rows = len(y)
        return y[place]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """grad: [tokens * k, dim]; padding gets none."""
        (place,) = ctx.saved_tensors
        out = grad.new_zeros(ctx.rows, grad.shape[-1])
        out[place] = grad
        return out, None


def grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows of each group times its expert's matrix. x: [rows, in], weight: [experts, out, in], ends: int32 [experts].

    Rows after the last group are not written.
    """
    return torch._grouped_mm(x, weight.to(x.dtype).transpose(1, 2), ends)
