"""The gated delta rule: by tokens, as it is defined, and in chunks of tokens, as it is trained (Yang et al. 2024)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

CHUNK = 64


def unit(x: Tensor) -> Tensor:
    """Scaled to length 1 along the last axis, float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """By tokens. q, k: [batch, tokens, key_heads, key_dim], v: [batch, tokens, heads, value_dim], g, beta: [batch,
    tokens, heads]; consecutive heads share a key head. Returns float32 in the shape of v.

    S' = exp(g) S; S = S' + beta k (v - S'^T k)^T; out = S^T q / sqrt(key_dim); q and k of unit length.
    """
    shared = v.shape[2] // k.shape[2]
    q, k = unit(q).repeat_interleave(shared, 2) / math.sqrt(q.shape[-1]), unit(k).repeat_interleave(shared, 2)
    v, g, beta = v.float(), g.float(), beta.float()
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    outs = []
    for t in range(q.shape[1]):
        state = state * g[:, t].exp()[..., None, None]
        delta = (v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])) * beta[:, t, :, None]
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], delta)
        outs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(outs, 1)


def unit_lower_inverse(a: Tensor) -> Tensor:
    """(I + a)^-1 of strictly lower triangular a [..., n, n], n a power of two: blocks of 1, 2, 4, ... are joined.

    As exact as substitution by rows, in log2(n) batched products.
    """
    n, lead = a.shape[-1], a.shape[:-2]
    inverse = a.new_ones(*lead, n, 1, 1)  # of the diagonal blocks: [..., blocks, size, size]
    size = 1
    while size < n:
        # Lower left corner of every block of twice the size: rows of its second half, columns of its first.
        blocks = a.view(*lead, n // (2 * size), 2, size, n // (2 * size), 2, size)
        corner = blocks[..., :, 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
        first, second = inverse.view(*lead, n // (2 * size), 2, size, size).unbind(-3)
        below = -(second @ corner @ first)
        top = torch.cat([first, torch.zeros_like(first)], -1)
        inverse = torch.cat([top, torch.cat([below, second], -1)], -2)
        size *= 2
    return inverse.squeeze(-3)


def chunked_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, chunk: int = CHUNK) -> Tensor:
    """As delta_rule. chunk: tokens, a power of two.

    With G the running sum of g in a chunk that begins with state S0, what token t adds to the state is k_t u_t^T with
    (I + A) U = diag(beta) (V - diag(e^G) K S0) and A_ti = beta_t e^(G_t - G_i) k_t k_i for i < t. So everything is
    batched over chunks but S -> M S + P, the states from chunk to chunk.
    """
    tokens, shared = v.shape[1], v.shape[2] // k.shape[2]

    def chunks(x: Tensor) -> Tensor:  # [batch, tokens, heads, ...] -> [batch, heads, chunks, chunk, ...]
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, -tokens % chunk))
        return x.transpose(1, 2).unflatten(2, (-1, chunk))

    q, k = chunks(unit(q) / math.sqrt(q.shape[-1])), chunks(unit(k))
    v, total, beta = chunks(v.float()), chunks(g.float()).cumsum(-1), chunks(beta.float())[..., None]
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    # Where it is not causal e^(G_t - G_i) may overflow: hidden before the exponential, for the gradient's sake.
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(~causal, -math.inf).exp()
    products, scores = ((x @ k.mT).repeat_interleave(shared, 1) for x in (k, q))
    inverse = unit_lower_inverse((beta * decay * products).tril(-1))
    q, k = q.repeat_interleave(shared, 1), k.repeat_interleave(shared, 1)
    grown, last = total.exp()[..., None], total[..., -1:, None]
    u = inverse @ (beta * v)  # of a state of zeros
    w = inverse @ (beta * grown * k)  # times S0 is what the state takes away
    kept = ((last - total[..., None]).exp() * k).mT
    step = torch.diag_embed(last.exp().squeeze(-1).expand(*last.shape[:-2], k.shape[-1])) - kept @ w
    state = v.new_zeros(v.shape[0] * v.shape[1], k.shape[-1], v.shape[-1])
    # Chunks first and contiguous: each step is then one product of plain matrices, backward too.
    steps, gains = (x.flatten(0, 1).transpose(0, 1).contiguous().unbind(0) for x in (step, kept @ u))
    states = []
    for m, p in zip(steps, gains, strict=True):
        states.append(state)
        state = torch.baddbmm(p, m, state)
    before = torch.stack(states).transpose(0, 1).reshape(*v.shape[:3], k.shape[-1], v.shape[-1])
    out = (grown * q) @ before + (decay * scores) @ (u - w @ before)
    return out.flatten(2, 3).transpose(1, 2)[:, :tokens]
