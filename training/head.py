"""Cross-entropy over a large vocabulary without holding all logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

CHUNK = 8192  # rows whose logits are held at a time

Part = tuple[Tensor, Tensor, Tensor]


def part(x: Tensor, weight: Tensor, targets: Tensor) -> Part:
    """Summed loss in nats of rows, and its gradients by x (in its dtype) and by weight (float32).

    x: [rows, dim], weight: [vocab, dim] in the dtype of x, targets: [rows], -1 where there is none.
    """
    logits = F.linear(x, weight).float()
    wanted = targets >= 0
    index = targets.clamp_min(0)[:, None]
    norm = logits.logsumexp(-1, keepdim=True)
    loss = ((norm - logits.gather(1, index)).squeeze(1) * wanted).sum()
    hit = torch.arange(weight.shape[0], device=x.device)[None] == index
    grad = (((logits - norm).exp() - hit.float()) * wanted[:, None]).to(x.dtype)
    return loss, grad @ weight, (grad.mT @ x).float()


class ChunkedLoss(torch.autograd.Function):
    """Mean loss over the targets. Gradients are computed together with the loss, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, chunk: int, compute: Callable[..., Part]
    ) -> Tensor:
        """x: [rows, dim], weight: [vocab, dim], targets: [rows], -1 where there is none. compute: `part`."""
        narrow = weight.to(x.dtype)
        loss, grad_weight, grads = x.new_zeros((), dtype=torch.float32), torch.zeros_like(weight), []
        for rows, wanted in zip(x.split(chunk), targets.split(chunk), strict=True):
            some, grad_x, grad_w = compute(rows, narrow, wanted)
            loss, grad_weight = loss + some, grad_weight + grad_w
            grads.append(grad_x)
        count = (targets >= 0).sum().clamp_min(1)
        ctx.save_for_backward(torch.cat(grads), grad_weight, count)
        return loss / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        """grad: a number."""
        grad_x, grad_weight, count = ctx.saved_tensors
        scale = grad / count
        return (grad_x * scale).to(grad_x.dtype), grad_weight * scale, None, None, None
