"""tiny-coder in PyTorch: the Qwen3-Next architecture at a small size, under the tensor names of an MLX checkpoint.

Parameters are float32; activations have the dtype of the residual stream, `stream`: bfloat16 on GPUs. The same code
runs on CPUs. Where float32 matters (norms, router, delta rule, loss) it is said here, not left to autocast.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from delta import chunked_delta_rule
from experts import Combine, Dispatch, group, grouped
from head import CHUNK, ChunkedLoss, part
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """Sizes, under the names of config.json."""

    vocab_size: int = 16384
    hidden_size: int = 384
    num_hidden_layers: int = 8
    full_attention_interval: int = 4
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 64
    partial_rotary_factor: float = 0.25
    rope_theta: float = 10_000.0
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    linear_num_key_heads: int = 4
    linear_num_value_heads: int = 8
    linear_key_head_dim: int = 64
    linear_value_head_dim: int = 64
    linear_conv_kernel_dim: int = 4
    num_experts: int = 32
    num_experts_per_tok: int = 4
    moe_intermediate_size: int = 128
    shared_expert_intermediate_size: int = 256
    intermediate_size: int = 1024

    def document(self) -> str:
        """The text of config.json."""
        fixed = {
            "architectures": ["Qwen3NextForCausalLM"],
            "model_type": "qwen3_next",
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "attention_bias": False,
        }
        return json.dumps({**fixed, **asdict(self)}, indent=2) + "\n"


class RmsNorm(nn.Module):
    """Root-mean-square norm over the last axis."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Any shape [..., size]."""
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


class Matrix(nn.Module):
    """A matrix without a bias, in the dtype of its input."""

    def __init__(self, size: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, size).uniform_(-(size**-0.5), size**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., size] -> [..., out]."""
        return F.linear(x, self.weight.to(x.dtype))


class Attention(nn.Module):
    """Gated grouped-query attention with q and k norms and partial rotary embedding."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.q_proj = Matrix(c.hidden_size, 2 * c.num_attention_heads * c.head_dim)
        self.k_proj = Matrix(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.v_proj = Matrix(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.o_proj = Matrix(c.num_attention_heads * c.head_dim, c.hidden_size)
        self.q_norm = RmsNorm(c.head_dim, c.rms_norm_eps)
        self.k_norm = RmsNorm(c.head_dim, c.rms_norm_eps)

    def _rotate(self, x: Tensor) -> Tensor:
        rotated = int(self.c.head_dim * self.c.partial_rotary_factor)
        exponents = torch.arange(0, rotated, 2, device=x.device, dtype=torch.float32) / rotated
        angles = torch.arange(x.shape[2], device=x.device, dtype=torch.float32)[:, None] * self.c.rope_theta**-exponents
        cos, sin = angles.cos(), angles.sin()
        a, b, rest = x[..., : rotated // 2].float(), x[..., rotated // 2 : rotated].float(), x[..., rotated:]
        return torch.cat([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest], -1)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, tokens, hidden]."""
        batch, tokens, _ = x.shape
        c = self.c
        q, gate = self.q_proj(x).view(batch, tokens, c.num_attention_heads, 2 * c.head_dim).chunk(2, -1)
        k = self.k_proj(x).view(batch, tokens, c.num_key_value_heads, c.head_dim)
        v = self.v_proj(x).view(batch, tokens, c.num_key_value_heads, c.head_dim)
        q, k = self._rotate(self.q_norm(q).transpose(1, 2)), self._rotate(self.k_norm(k).transpose(1, 2))
        out = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True, enable_gqa=True)
        out = out.transpose(1, 2).reshape(batch, tokens, -1) * gate.reshape(batch, tokens, -1).sigmoid()
        return self.o_proj(out)


class GatedDelta(nn.Module):
    """Gated delta net with a short convolution over q, k and v."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.keys = c.linear_num_key_heads * c.linear_key_head_dim
        self.values = c.linear_num_value_heads * c.linear_value_head_dim
        channels = 2 * self.keys + self.values
        self.in_proj_qkvz = Matrix(c.hidden_size, channels + self.values)
        self.in_proj_ba = Matrix(c.hidden_size, 2 * c.linear_num_value_heads)
        self.conv1d = nn.Parameter(torch.randn(channels, c.linear_conv_kernel_dim) / c.linear_conv_kernel_dim**0.5)
        self.A_log = nn.Parameter(torch.empty(c.linear_num_value_heads).uniform_(1, 16).log())
        step = torch.empty(c.linear_num_value_heads).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))
        self.norm = RmsNorm(c.linear_value_head_dim, c.rms_norm_eps)
        self.out_proj = Matrix(self.values, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, tokens, hidden]."""
        batch, tokens, _ = x.shape
        c = self.c
        heads, ratio = c.linear_num_key_heads, c.linear_num_value_heads // c.linear_num_key_heads
        width = ratio * c.linear_value_head_dim
        # Rows of a key head lie together: q, k, then v and z of its value heads; and b, then a. Rows are sorted in the
        # weights, which are smaller than what comes of them.
        rows = self.in_proj_qkvz.weight.view(heads, -1, c.hidden_size)
        *qkv, z = (part.flatten(0, 1) for part in rows.split([c.linear_key_head_dim] * 2 + [width] * 2, 1))
        mixed = F.linear(x, torch.cat(qkv).to(x.dtype))
        z = F.linear(x, z.to(x.dtype))
        b, a = (part.flatten(0, 1) for part in self.in_proj_ba.weight.view(heads, -1, c.hidden_size).chunk(2, 1))
        b, a = (F.linear(x, part.to(x.dtype)).float() for part in (b, a))
        taps = c.linear_conv_kernel_dim
        padded = F.pad(mixed, (0, 0, taps - 1, 0))
        mixed = F.silu(sum(padded[:, i : i + tokens] * self.conv1d[:, i].to(x.dtype) for i in range(taps)))
        q, k, v = mixed.split([self.keys, self.keys, self.values], -1)
        q, k = q.view(batch, tokens, heads, -1), k.view(batch, tokens, heads, -1)
        v = v.view(batch, tokens, c.linear_num_value_heads, -1)
        beta, step = b.sigmoid(), a + self.dt_bias
        g = -self.A_log.exp() * torch.logaddexp(step, torch.zeros_like(step))  # softplus
        out = chunked_delta_rule(q, k, v, g, beta).to(x.dtype)
        out = self.norm(out) * F.silu(z.reshape(out.shape))
        return self.out_proj(out.reshape(batch, tokens, -1))


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = Matrix(size, inner), Matrix(size, inner), Matrix(inner, size)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape [..., size]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """Router, experts and the shared expert."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.gate = Matrix(c.hidden_size, c.num_experts)
        shape, scale = (c.num_experts, c.moe_intermediate_size, c.hidden_size), c.hidden_size**-0.5
        self.gate_proj = nn.Parameter(torch.randn(shape) * scale)
        self.up_proj = nn.Parameter(torch.randn(shape) * scale)
        self.down_proj = nn.Parameter(torch.randn(shape[0], shape[2], shape[1]) * shape[1] ** -0.5)
        self.shared_expert = Mlp(c.hidden_size, c.shared_expert_intermediate_size)
        self.shared_expert_gate = Matrix(c.hidden_size, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: [batch, tokens, hidden] -> output, router loss, tokens by expert [experts]."""
        c, flat = self.c, x.reshape(-1, x.shape[-1])
        logits = self.gate(flat.float())
        scores = logits.softmax(-1)
        weights, chosen = scores.topk(c.num_experts_per_tok, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        groups = group(chosen, c.num_experts)
        rows = Dispatch.apply(flat, groups.source, groups.place)
        gate, up = grouped(rows, torch.cat([self.gate_proj, self.up_proj], 1), groups.ends).chunk(2, -1)
        out = Combine.apply(grouped(F.silu(gate) * up, self.down_proj, groups.ends), groups.place)
        out = (out.view(*chosen.shape, -1) * weights[..., None].to(x.dtype)).sum(1)
        out = out + self.shared_expert_gate(flat).sigmoid() * self.shared_expert(flat)
        share = groups.counts / chosen.numel()
        balance = c.num_experts * (share * scores.mean(0)).sum()  # Switch Transformer's loss: 1 when even
        spread = logits.logsumexp(-1).square().mean()
        return out.view_as(x), 0.01 * balance + 0.001 * spread, groups.counts


class Layer(nn.Module):
    """Mixer and experts, each after a norm."""

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        full = (index + 1) % c.full_attention_interval == 0
        self.input_layernorm = RmsNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RmsNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c) if full else None
        self.linear_attn = None if full else GatedDelta(c)
        self.mlp = Experts(c)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: [batch, tokens, hidden] -> output, router loss, tokens by expert."""
        mixer = self.self_attn or self.linear_attn
        x = x + mixer(self.input_layernorm(x))
        out, loss, counts = self.mlp(self.post_attention_layernorm(x))
        return x + out, loss, counts


class TinyCoder(nn.Module):
    """The language model; the head is the embedding. stream: dtype of the activations."""

    def __init__(self, c: Config, stream: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.c, self.stream = c, stream
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c, i) for i in range(c.num_hidden_layers))
        self.norm = RmsNorm(c.hidden_size, c.rms_norm_eps)
        self._loss_part = part
        nn.init.normal_(self.embed_tokens.weight, std=c.hidden_size**-0.5)
        for name, p in self.named_parameters():  # residual branches start small
            if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj", "down_proj.weight")):
                p.data *= (2 * c.num_hidden_layers) ** -0.5

    def compile_parts(self, backend: str = "inductor") -> None:
        """Compile the layers, one whole graph for each kind, and the loss."""
        for layer in self.layers:
            layer.compile(dynamic=False, fullgraph=True, backend=backend)
        self._loss_part = torch.compile(part, fullgraph=True, backend=backend)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """tokens: int [batch, tokens] -> logits, or the mean loss in nats where targets (-1: ignored) are given; the
        router loss; tokens by layer and expert."""
        x = self.embed_tokens(tokens).to(self.stream)
        losses, counts = [], []
        for layer in self.layers:
            x, loss, count = layer(x)
            losses.append(loss)
            counts.append(count)
        x, weight = self.norm(x), self.embed_tokens.weight
        if targets is None:
            result = F.linear(x, weight.to(x.dtype))
        else:
            result = ChunkedLoss.apply(x.flatten(0, 1), weight, targets.flatten(), CHUNK, self._loss_part)
        return result, torch.stack(losses).mean(), torch.stack(counts)

    def checkpoint(self) -> dict[str, Tensor]:
        """The tensors under the names and in the shapes of an MLX checkpoint, bfloat16 (decay rates in float32)."""
        tensors = {}
        for name, value in self.state_dict().items():
            for proj in ("gate_proj", "up_proj", "down_proj"):
                if name.endswith(f"mlp.{proj}"):
                    name = name.replace(f"mlp.{proj}", f"mlp.switch_mlp.{proj}.weight")  # noqa: PLW2901
            if name.endswith("conv1d"):
                name, value = f"{name}.weight", value[:, :, None]  # noqa: PLW2901
            tensors[f"model.{name}"] = value.float() if name.endswith("A_log") else value.bfloat16()
        return {name: value.contiguous() for name, value in tensors.items()}
