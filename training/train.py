"""Train tiny-coder on one NVIDIA GPU (or, small, on a CPU).

    python training/train.py tokenizer WORK/              WORK/tokenizer.json from WORK/train.jsonl
    python training/train.py dry-run WORK/                the device's results against the plain forms, and its speed
    python training/train.py run WORK/ --minutes 18       train; goes on from WORK/state.pt

`run` ends with the minutes, its cosine schedule laid over them, and writes WORK/out/: the bfloat16 checkpoint in MLX's
layout, loss.csv and run.json. --stop-after leaves the rest to a further command. The data is WORK/train.jsonl or
WORK/train-*.jsonl.xz.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from dry_run import dry_run
from export import write_checkpoint
from model import Config, TinyCoder
from optim import Minutes, Muon, Plan, Steps, rate_at
from samples import END, read_texts, train_tokenizer, write_pass
from tokenizers import Tokenizer
from torch import Tensor

SAVE_EVERY = 100.0  # seconds


class Batches:
    """Windows of the token files, in a shuffled order that depends on the step alone; a new file for every pass.

    The file of the next pass is made by another process meanwhile.
    """

    def __init__(self, work: Path, length: int, batch: int, end: int, position: tuple[int, int] = (0, 0)) -> None:
        """position: a pass, and the step with which it begins."""
        self._work, self._length, self._batch, self._end = work, length, batch, end
        self._ahead: subprocess.Popen[bytes] | None = None
        self.position = position
        self._open()

    def _open(self) -> None:
        number, _ = self.position
        if self._ahead:
            self._ahead.wait()
        self._tokens = np.memmap(write_pass(self._work, number), np.uint16, "r")
        self._order = np.random.default_rng(number).permutation((len(self._tokens) - 1) // self._length)
        if len(self._order) < self._batch:
            raise SystemExit(f"{self._work}: a pass has {len(self._tokens)} tokens, too few for one batch")
        script = Path(__file__).with_name("samples.py")
        self._ahead = subprocess.Popen([sys.executable, script, self._work, str(number + 1)])

    def close(self) -> None:
        """End the other process."""
        if self._ahead:
            self._ahead.terminate()
            self._ahead.wait()

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Tokens and targets of a step, int64 [batch, length]. Steps must not go back past a pass."""
        while step - self.position[1] >= len(self._order) // self._batch:
            self.position = (self.position[0] + 1, self.position[1] + len(self._order) // self._batch)
            self._open()
        start = (step - self.position[1]) * self._batch
        rows = [
            self._tokens[i * self._length : (i + 1) * self._length + 1]
            for i in self._order[start : start + self._batch]
        ]
        both = torch.from_numpy(np.stack(rows).astype(np.int64))
        targets = both[:, 1:].clone()
        targets[both[:, :-1] == self._end] = -1  # what follows the end of a document cannot be known
        return both[:, :-1], targets


class Trainer:
    """Model, optimizers and what has been logged; `state.pt` in the work folder holds them between commands."""

    def __init__(self, config: Config, plan: Plan, device: torch.device, *, compiled: bool = True) -> None:
        """compiled: on a GPU alone."""
        self.plan, self.device, on_gpu = plan, device, device.type == "cuda"
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high")
        self.model = TinyCoder(config, torch.bfloat16 if on_gpu else torch.float32).to(device)
        named = dict(self.model.named_parameters())
        kept = ("embed_tokens.weight", "gate.weight", "conv1d")  # from Muon
        matrices = {name: p for name, p in named.items() if p.ndim >= 2 and not name.endswith(kept)}
        self.muon = Muon(matrices.values(), plan.decay)
        self.rest = [p for name, p in named.items() if name not in matrices]
        betas = (0.9, 0.95)
        self.adam = torch.optim.AdamW(self.rest, plan.adam_rate, betas, weight_decay=0, fused=on_gpu)
        if on_gpu and compiled:
            self.model.compile_parts()
        self.step = 0
        self.log: list[tuple[int, float, float]] = []  # step, loss, router loss
        print(f"{sum(p.numel() for p in named.values()) / 1e6:.1f} M parameters on {device}", flush=True)

    def load(self, path: Path) -> tuple[float, tuple[int, int]]:
        """Go on from a file of `save`; the seconds spent and the position in the data."""
        state = torch.load(path, map_location=self.device)
        self.model.load_state_dict(state["model"])
        self.adam.load_state_dict(state["adam"])
        for momentum, saved in zip(self.muon.momenta, state["muon"], strict=True):
            momentum.copy_(saved)
        self.step, self.log = state["step"], state["log"]
        print(f"goes on at step {self.step}, after {state['spent']:.0f} s", flush=True)
        return state["spent"], state["position"]

    def save(self, path: Path, spent: float, position: tuple[int, int]) -> None:
        """Write everything that `load` needs."""
        state = {"model": self.model.state_dict(), "adam": self.adam.state_dict(), "muon": self.muon.momenta}
        state |= {"step": self.step, "log": self.log, "spent": spent, "position": position}
        torch.save(state, path.with_suffix(".unfinished"))
        path.with_suffix(".unfinished").rename(path)

    def train(self, batch: tuple[Tensor, Tensor], done: float) -> tuple[Tensor, Tensor, Tensor]:
        """One step. done: share of the run behind it. The loss, the router loss, tokens by layer and expert."""
        tokens, targets = (part.to(self.device, non_blocking=True) for part in batch)
        loss, router, counts = self.model(tokens, targets)
        (loss + router).backward()
        torch.nn.utils.clip_grad_norm_(self.rest, 1.0)
        share = rate_at(self.step, done, self.plan)
        for group in self.adam.param_groups:
            group["lr"] = self.plan.adam_rate * share
        self.adam.step()
        self.muon.step(self.plan.muon_rate * share)
        self.model.zero_grad(set_to_none=True)
        self.step += 1
        return loss.detach(), router.detach(), counts

    def note(self, loss: Tensor, router: Tensor, counts: Tensor) -> None:
        """Log every 20 steps, print every 100. Raises if the loss is no number any more."""
        if self.step % 20:
            return
        self.log.append((self.step, float(loss), float(router)))
        if not math.isfinite(self.log[-1][1]):
            raise SystemExit(f"step {self.step}: the loss is {self.log[-1][1]}; the state saved last is from before")
        if self.step % 100 == 0:
            load = counts.float() / counts.sum(1, keepdim=True)
            used = f"share of an expert {float(load.min()):.4f} to {float(load.max()):.4f}"
            print(f"step {self.step}: loss {float(loss):.4f}, {used}", flush=True)


def run(work: Path, trainer: Trainer, schedule: Minutes | Steps, stop_after: float) -> bool:
    """Train to the end of the schedule and write the results, or for stop_after seconds; whether it is finished."""
    start, tokenizer = time.monotonic(), Tokenizer.from_file(str(work / "tokenizer.json"))
    plan, config = trainer.plan, trainer.model.c
    state, position = work / "state.pt", (0, 0)
    if state.exists():
        schedule.spent, position = trainer.load(state)
    batches = Batches(work, config.max_position_embeddings, plan.batch, tokenizer.token_to_id(END), position)
    saved = started = time.monotonic()
    first, batch = trainer.step, batches(trainer.step)
    try:
        while schedule.done(trainer.step) < 1 and time.monotonic() - start < stop_after:
            result = trainer.train(batch, schedule.done(trainer.step))
            batch = batches(trainer.step)  # while the GPU works
            trainer.note(*result)
            if time.monotonic() - saved > SAVE_EVERY:
                trainer.save(state, schedule.spent, batches.position)
                saved = time.monotonic()
    finally:
        batches.close()
    tokens = (trainer.step - first) * plan.batch * config.max_position_embeddings
    print(
        f"{tokens / 1e6:.1f} M tokens, {tokens / (time.monotonic() - started):,.0f} a second, steps to {trainer.step}"
    )
    trainer.save(state, schedule.spent, batches.position)
    if finished := schedule.done(trainer.step) >= 1:
        write_checkpoint(work / "out", trainer.model, tokenizer, trainer.log)
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        facts = {"steps": trainer.step, "batch": plan.batch, "seconds": round(schedule.spent), "device": device}
        (work / "out" / "run.json").write_text(json.dumps(facts) + "\n")
    return finished


def texts_for_tokenizer(work: Path) -> Iterator[str]:
    """Every thirtieth of the training texts, from all packages."""
    return islice(read_texts(work / "train.jsonl"), 0, None, 30)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("tokenizer", "dry-run", "run"))
    parser.add_argument("work", type=Path)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=18, help="of the whole run, all commands together")
    length.add_argument("--steps", type=int, help="of the whole run, instead of minutes")
    parser.add_argument("--stop-after", type=float, default=math.inf, metavar="MINUTES", help="of this command")
    parser.add_argument("--batch", type=int, default=Plan.batch)
    parser.add_argument("--size", choices=("full", "small"), default="full", help="small: to try everything on a CPU")
    parser.add_argument("--eager", action="store_true", help="compile nothing: slower, should the compiler fail")
    args = parser.parse_args()
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_experts": 8, "num_experts_per_tok": 2}
    small = Config(**sizes, max_position_embeddings=256)
    config, plan = Config() if args.size == "full" else small, Plan(batch=args.batch)
    if args.command == "tokenizer":
        tokenizer = train_tokenizer(texts_for_tokenizer(args.work), config.vocab_size)
        tokenizer.save(str(args.work / "tokenizer.json"))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer = Trainer(config, plan, device, compiled=not args.eager)
    if args.command == "dry-run":
        dry_run(trainer)
    else:
        run(args.work, trainer, Steps(args.steps) if args.steps else Minutes(args.minutes), 60 * args.stop_after)


if __name__ == "__main__":
    main()
