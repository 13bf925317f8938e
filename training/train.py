"""Train tiny-coder on one NVIDIA GPU.

    python training/train.py tokenizer WORK/                      a tokenizer from WORK/train.jsonl
    python training/train.py run WORK/ --minutes 15               train; resumes from WORK/state.pt

`run` writes WORK/out/: the bfloat16 checkpoint in MLX's layout, loss.csv and loss.png. Steps are timed at the
start, and the cosine schedule is laid over what fits the minutes. The data is WORK/train*.jsonl or .jsonl.xz.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from model import Config, TinyCoder
from safetensors.torch import save_file
from samples import END, read_texts, train_tokenizer, write_epoch
from tokenizers import Tokenizer
from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """How to train."""

    batch: int = 64  # sequences of context_length
    muon_rate: float = 0.02
    adam_rate: float = 2e-3
    warmup: int = 100
    final: float = 0.03  # of the rate, at the end
    decay: float = 0.02


def orthogonalized(g: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices to g [..., rows, columns], by Newton-Schulz (Jordan et al., Muon)."""
    x = g.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if tall := x.shape[-2] > x.shape[-1]:
        x = x.mT
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).float()


class Muon:
    """Momentum with orthogonalized steps for matrices and stacks of matrices; equal shapes are treated together."""

    def __init__(self, params: Iterable[Tensor], decay: float, orthogonalize: Callable[[Tensor], Tensor]) -> None:
        by_shape: dict[tuple[int, ...], list[Tensor]] = {}
        for p in params:
            by_shape.setdefault(tuple(p.shape), []).append(p)
        self.groups = list(by_shape.values())
        self.momenta = [torch.zeros((len(group), *group[0].shape), device=group[0].device) for group in self.groups]
        self.decay, self.orthogonalize = decay, orthogonalize

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One step from the gradients."""
        for group, momentum in zip(self.groups, self.momenta, strict=True):
            g = torch.stack([p.grad for p in group]).float()
            momentum.lerp_(g, 0.05)
            update = self.orthogonalize(g.lerp(momentum, 0.95))
            scale = rate * max(1, update.shape[-2] / update.shape[-1]) ** 0.5
            for p, u in zip(group, update, strict=True):
                p.mul_(1 - rate * self.decay).add_(u, alpha=-scale)


def rate_at(step: int, steps: int, plan: Plan) -> float:
    """Share of the full rate: linear warm-up, then a cosine down to plan.final."""
    if step < plan.warmup:
        return (step + 1) / plan.warmup
    done = min(1.0, (step - plan.warmup) / max(1, steps - plan.warmup))
    return plan.final + (1 - plan.final) * (1 + math.cos(math.pi * done)) / 2


class Batches:
    """Windows of the token files, in a shuffled order that depends on the step alone; a new file for every pass."""

    def __init__(self, work: Path, texts: list[str], tokenizer: Tokenizer, length: int, batch: int, end: int) -> None:
        self._work, self._texts, self._tokenizer = work, texts, tokenizer
        self._length, self._batch, self._end = length, batch, end
        self._epoch, self._first = -1, 0
        self._open(0)

    def _path(self, epoch: int) -> Path:
        path = self._work / f"tokens-{epoch}.u16"
        if not path.exists():
            started, partial = time.monotonic(), path.with_suffix(".partial")
            count = write_epoch(self._tokenizer, self._texts, epoch, partial, os.cpu_count() or 1)
            partial.rename(path)
            print(f"pass {epoch}: {count / 1e6:.1f} M tokens in {time.monotonic() - started:.0f} s", flush=True)
        return path

    def _open(self, epoch: int) -> None:
        if self._epoch >= 0:
            self._first += len(self._order) // self._batch
        self._epoch = epoch
        self._tokens = np.memmap(self._path(epoch), np.uint16, "r")
        self._order = np.random.default_rng(epoch).permutation((len(self._tokens) - 1) // self._length)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Tokens and targets of a step, int64 [batch, length]. Steps must not go back past a pass."""
        while step - self._first >= len(self._order) // self._batch:
            self._open(self._epoch + 1)
        start = (step - self._first) * self._batch
        rows = [
            self._tokens[i * self._length : (i + 1) * self._length + 1]
            for i in self._order[start : start + self._batch]
        ]
        both = torch.from_numpy(np.stack(rows).astype(np.int64))
        targets = both[:, 1:].clone()
        targets[both[:, :-1] == self._end] = -1  # what follows the end of a document cannot be known
        return both[:, :-1], targets


class Trainer:
    """Model, optimizers and what has been logged; `state.pt` in the work folder holds them between runs."""

    def __init__(self, config: Config, plan: Plan, device: torch.device) -> None:
        self.plan, self.device, self.on_gpu = plan, device, device.type == "cuda"
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high")
        self.model = TinyCoder(config).to(device)
        named = dict(self.model.named_parameters())
        kept = ("embed_tokens.weight", "gate.weight", "conv1d")  # from Muon
        matrices = {name: p for name, p in named.items() if p.ndim >= 2 and not name.endswith(kept)}
        newton = torch.compile(orthogonalized) if self.on_gpu else orthogonalized
        self.muon = Muon(matrices.values(), plan.decay, newton)
        self.rest = [p for name, p in named.items() if name not in matrices]
        betas = (0.9, 0.95)
        self.adam = torch.optim.AdamW(self.rest, plan.adam_rate, betas, weight_decay=0, fused=self.on_gpu)
        if self.on_gpu:
            for layer in self.model.layers:
                layer.compile()
        self.step = 0
        self.log: list[tuple[int, float, float]] = []  # step, loss, router loss
        print(f"{sum(p.numel() for p in named.values()) / 1e6:.1f} M parameters on {device}", flush=True)

    def load(self, path: Path) -> None:
        """Go on from a file of `save`."""
        state = torch.load(path, map_location=self.device)
        self.model.load_state_dict(state["model"])
        self.adam.load_state_dict(state["adam"])
        for momentum, saved in zip(self.muon.momenta, state["muon"], strict=True):
            momentum.copy_(saved)
        self.step, self.log = state["step"], state["log"]
        print(f"resumed at step {self.step}", flush=True)

    def save(self, path: Path) -> None:
        """Write everything that `load` needs."""
        state = {"model": self.model.state_dict(), "adam": self.adam.state_dict(), "muon": self.muon.momenta}
        torch.save({**state, "step": self.step, "log": self.log}, path)

    def train(self, batch: tuple[Tensor, Tensor], steps: int) -> tuple[Tensor, Tensor, Tensor]:
        """One step of `steps`: the loss, the router loss, tokens by layer and expert."""
        tokens, targets = (part.to(self.device, non_blocking=True) for part in batch)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.on_gpu):
            loss, router, counts = self.model(tokens, targets)
        (loss + router).backward()
        torch.nn.utils.clip_grad_norm_(self.rest, 1.0)
        share = rate_at(self.step, steps, self.plan)
        for group in self.adam.param_groups:
            group["lr"] = self.plan.adam_rate * share
        self.adam.step()
        self.muon.step(self.plan.muon_rate * share)
        self.model.zero_grad(set_to_none=True)
        self.step += 1
        return loss.detach(), router.detach(), counts

    def note(self, loss: Tensor, router: Tensor, counts: Tensor) -> None:
        """Log every 20 steps, print every 100."""
        if self.step % 20:
            return
        self.log.append((self.step, float(loss), float(router)))
        if self.step % 100 == 0:
            load = counts.float() / counts.sum(1, keepdim=True)
            used = f"share of an expert {float(load.min()):.4f} to {float(load.max()):.4f}"
            print(f"step {self.step}: loss {float(loss):.4f}, {used}", flush=True)


class Clock:
    """How many steps fit the time: known once steps have been timed, after the compilation."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes
        self._count, self._timed = 0, 0.0
        self.steps = 10**9

    def tick(self, step: int, loss: Tensor) -> None:
        """A step has been started; at times, waits for it and lays the schedule anew over what is left."""
        self._count += 1
        if self._count == 30:
            float(loss)
            self._timed = time.monotonic()
        elif self._count == 60 or (self._count > 60 and step % 250 == 0):
            float(loss)
            now = time.monotonic()
            each = (now - self._timed) / (self._count - 30)
            self.steps = step + max(1, int((self._end - now) / each))
            print(f"{each * 1e3:.0f} ms a step, {self.steps} steps in all", flush=True)


def run(work: Path, minutes: float, plan: Plan, config: Config) -> None:
    """Train until the time is used, then write the results."""
    clock = Clock(minutes)
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    texts = [text for path in sorted(work.glob("train*.jsonl*")) for text in read_texts(path)]
    print(f"{len(texts)} texts, {sum(map(len, texts)) / 1e6:.0f} M characters", flush=True)
    batches = Batches(work, texts, tokenizer, config.max_position_embeddings, plan.batch, tokenizer.token_to_id(END))
    trainer = Trainer(config, plan, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    state = work / "state.pt"
    if state.exists():
        trainer.load(state)
    ahead, saved = batches(trainer.step), time.monotonic()
    while trainer.step < clock.steps:
        batch, ahead = ahead, batches(trainer.step + 1)
        loss, router, counts = trainer.train(batch, clock.steps)
        clock.tick(trainer.step, loss)
        trainer.note(loss, router, counts)
        if time.monotonic() - saved > 120:
            trainer.save(state)
            saved = time.monotonic()
    write(work / "out", trainer.model, config, tokenizer, trainer.log)


def write(
    out: Path, model: TinyCoder, config: Config, tokenizer: Tokenizer, log: list[tuple[int, float, float]]
) -> None:
    """The checkpoint in MLX's layout, and the curve of the loss."""
    out.mkdir(exist_ok=True)
    save_file(
        {n: t.cpu() for n, t in model.checkpoint().items()}, out / "model.safetensors", metadata={"format": "mlx"}
    )
    end = tokenizer.token_to_id(END)
    (out / "config.json").write_text(config.document().replace("{", f'{{\n  "eos_token_id": {end},', 1))
    (out / "generation_config.json").write_text(
        json.dumps({"eos_token_id": end, "temperature": 0.2, "top_p": 0.95}) + "\n"
    )
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": "<|fim_pad|>"}, indent=1
        )
        + "\n"
    )
    (out / "loss.csv").write_text("step,loss,router\n" + "".join(f"{s},{a:.4f},{b:.4f}\n" for s, a, b in log))
    plot(out)


def plot(out: Path) -> None:
    """loss.png from loss.csv."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    steps, loss, _ = np.loadtxt(out / "loss.csv", delimiter=",", skiprows=1, unpack=True, ndmin=2)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, loss, color="#9ecae1", linewidth=0.8)
    width = min(25, len(loss))
    axes.plot(steps[width - 1 :], np.convolve(loss, np.ones(width) / width, "valid"), color="#08519c")
    axes.set(
        xlabel="step", ylabel="loss, nats per token", title="tiny-coder", ylim=(None, float(np.quantile(loss, 0.98)))
    )
    axes.grid(alpha=0.3)
    figure.savefig(out / "loss.png", dpi=110)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("tokenizer", "run"))
    parser.add_argument("work", type=Path)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--batch", type=int, default=Plan.batch)
    parser.add_argument("--layers", type=int, default=Config.num_hidden_layers)
    parser.add_argument("--context", type=int, default=Config.max_position_embeddings)
    args = parser.parse_args()
    if args.command == "tokenizer":
        texts = read_texts(args.work / "train.jsonl")
        train_tokenizer(islice(texts, 0, None, 10), Config.vocab_size).save(str(args.work / "tokenizer.json"))
        return
    config = Config(num_hidden_layers=args.layers, max_position_embeddings=args.context)
    run(args.work, args.minutes, Plan(batch=args.batch), config)


if __name__ == "__main__":
    main()
