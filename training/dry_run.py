"""Before a run: does this device compute what is meant, and how fast is it?"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from delta import chunked_delta_rule, delta_rule
from experts import Combine, Dispatch, group, grouped
from head import ChunkedLoss, part
from model import Config
from torch import Tensor

if TYPE_CHECKING:
    from train import Trainer

WARM, TIMED = 5, 20  # steps
LIMITS = {"delta rule": 0.02, "experts": 0.02, "loss": 0.02}  # of the gradient's norm; bfloat16 and TF32 reach 0.005


def operations(c: Config) -> float:
    """Multiplications and additions of a token, forward and backward (3 x forward), at full context."""
    mixers = c.num_hidden_layers // c.full_attention_interval
    values = c.linear_num_value_heads * c.linear_value_head_dim
    keys = c.linear_num_key_heads * c.linear_key_head_dim
    delta = c.hidden_size * (2 * keys + 3 * values) + 5 * values * 2 * c.linear_key_head_dim
    heads = c.num_attention_heads * c.head_dim
    attention = c.hidden_size * (3 * heads + 2 * c.num_key_value_heads * c.head_dim)
    attention += heads * c.max_position_embeddings  # half of the context on average, scores and values
    experts = 3 * c.hidden_size * (c.num_experts_per_tok * c.moe_intermediate_size + c.shared_expert_intermediate_size)
    layers = (c.num_hidden_layers - mixers) * delta + mixers * attention + c.num_hidden_layers * experts
    return 3 * 2 * (layers + c.hidden_size * c.vocab_size)


def _difference(fast: Tensor, plain: Tensor) -> float:
    return float((fast.float() - plain.float()).norm() / plain.float().norm())


def _gradients(out: Tensor, *inputs: Tensor) -> list[Tensor]:
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)
    return list(torch.autograd.grad((out.float() * weights).sum(), inputs))


def parity(device: torch.device, stream: torch.dtype) -> dict[str, float]:
    """Largest relative difference of any gradient between the form that trains and the plain one, by part."""
    torch.manual_seed(0)

    def make(*shape: int, dtype: torch.dtype = stream) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype).requires_grad_()

    rates = [
        torch.rand(2, 256, 4, device=device).neg().requires_grad_(),
        torch.rand(2, 256, 4, device=device).requires_grad_(),
    ]
    delta = [make(2, 256, 2, 64), make(2, 256, 2, 64), make(2, 256, 4, 64), *rates]
    rule = [_gradients(compute(*delta), *delta) for compute in (chunked_delta_rule, delta_rule)]

    rows, weight = make(1024, 64), make(8, 32, 64, dtype=torch.float32)
    chosen = torch.randint(0, 7, (1024, 1), device=device)  # one expert gets nothing
    groups = group(chosen, 8)
    sorted_rows = Dispatch.apply(rows, groups.source, groups.place)
    fast = Combine.apply(grouped(sorted_rows, weight, groups.ends), groups.place)
    plain = torch.einsum("ti,toi->to", rows.float(), weight[chosen[:, 0]])
    experts = [_gradients(out, rows, weight) for out in (fast, plain)]

    x, head, targets = (
        make(512, 64),
        make(1000, 64, dtype=torch.float32),
        torch.randint(-1, 1000, (512,), device=device),
    )
    chunked = ChunkedLoss.apply(x, head, targets, 100, part)
    whole = torch.nn.functional.cross_entropy(x.float() @ head.T, targets, ignore_index=-1)
    loss = [_gradients(out, x, head) for out in (chunked, whole)]
    parts = {"delta rule": rule, "experts": experts, "loss": loss}
    return {name: max(map(_difference, *both)) for name, both in parts.items()}


def dry_run(trainer: Trainer) -> None:
    """Print parity and speed. Raises SystemExit if a part computes something else than is meant."""
    device, model = trainer.device, trainer.model
    for name, difference in parity(device, model.stream).items():
        print(f"{name}: gradients within {difference:.1e} of the plain form", flush=True)
        if not difference < LIMITS[name]:
            raise SystemExit(f"{name}: expected less than {LIMITS[name]}; train elsewhere, or with another torch")
    shape = (trainer.plan.batch, model.c.max_position_embeddings)
    started = time.monotonic()
    for step in range(WARM + TIMED):
        if step == WARM:
            print(f"compiled and warm after {time.monotonic() - started:.0f} s", flush=True)
            started = time.monotonic()
        tokens = torch.randint(0, model.c.vocab_size, shape)
        loss, _, _ = trainer.train((tokens, tokens.roll(-1, 1)), 0.5)
        if step in (WARM - 1, WARM + TIMED - 1):
            float(loss)  # waits
    each = (time.monotonic() - started) / TIMED
    rate = shape[0] * shape[1] / each
    print(f"{each * 1e3:.0f} ms a step, {rate:,.0f} tokens/s, {rate * operations(model.c) / 1e12:.1f} TFLOP/s")
    if device.type == "cuda":
        print(f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB of memory at most")
