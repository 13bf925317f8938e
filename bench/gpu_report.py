"""What the GPU bench found, merged over its parts, and the table of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

SIDES = ("mlx-lm", "stock MLX", "our MLX kernels", "CUDA backend")


@dataclass(frozen=True)
class Work:
    """A row of the table. least, aim: of the best of our sides, on one H200; None where nothing is asked."""

    name: str
    unit: str
    least: float | None = None
    aim: float | None = None
    more_is_better: bool = True

    def verdict(self, value: float) -> str:
        """What a value reaches."""

        def reached(limit: float) -> bool:
            return value >= limit if self.more_is_better else value <= limit

        if self.aim is not None and reached(self.aim):
            return "aim met"
        if self.least is None:
            return "" if self.aim is None else "below the aim"
        return "met" if reached(self.least) else "missed"


MATVEC, EXPERTS, COPY = "matvec 12288 x 2048, 4 bits", "top 10 of 512 experts, 1 token", "copy on the device"
WORKS = (
    Work("decode, 1", "tok/s", 285, 650),
    Work("decode, 4 in all", "tok/s", 700, 1800),
    Work("decode, 16 in all", "tok/s", 1300, 5000),
    Work("prefill 512", "tok/s"),
    Work("prefill 2048", "tok/s", 6200, 20000),
    Work(MATVEC, "GB/s", 1800),
    Work(EXPERTS, "us", 25, 8, more_is_better=False),
    Work(COPY, "GB/s"),
)
_COPY_SHARE = 0.8  # the aim of the plain product, of what a copy moves


@dataclass
class Report:
    """results: value by work and side. kernels: rows of the step's time. notes: of each part, as printed."""

    results: dict[str, dict[str, float]] = field(default_factory=dict)
    steps: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, dict[str, str]] = field(default_factory=dict)

    def add(self, side: str, work: str, value: float) -> None:
        """Keep a figure, and show it."""
        self.results.setdefault(work, {})[side] = value
        print(f"{side}: {work}: {value:,.1f}", flush=True)

    def merge(self, other: Report) -> None:
        """Take over what another run measured."""
        for work, sides in other.results.items():
            self.results.setdefault(work, {}).update(sides)
        self.steps.update(other.steps)
        self.parts.update(other.parts)

    def save(self, path: Path) -> None:
        """Write it, with what other parts have left there."""
        whole = Report.load(path) if path.exists() else Report()
        whole.merge(self)
        path.write_text(json.dumps(vars(whole), indent=1))

    @classmethod
    def load(cls, path: Path) -> Report:
        """What `save` wrote."""
        return cls(**json.loads(path.read_text()))

    def works(self) -> Iterator[Work]:
        """The rows, with the aim that depends on the copy."""
        copy = max(self.results.get(COPY, {}).values(), default=None)
        for work in WORKS:
            if work.name == MATVEC and copy is not None:
                yield replace(work, aim=_COPY_SHARE * copy)
            else:
                yield work

    def lines(self) -> Iterator[str]:
        """The table in Markdown, then the steps by kernel."""
        yield f"| work | unit | {' | '.join(SIDES)} | least | aim | best of ours |"
        yield "|---" * (len(SIDES) + 5) + "|"
        for work in self.works():
            found = self.results.get(work.name, {})
            cells = [f"{found[side]:,.1f}" if side in found else "" for side in SIDES]
            ours = [found[side] for side in SIDES[1:] if side in found]
            best = (max if work.more_is_better else min)(ours, default=None)
            limits = ["" if limit is None else f"{limit:,.0f}" for limit in (work.least, work.aim)]
            verdict = "" if best is None else work.verdict(best)
            yield f"| {work.name} | {work.unit} | {' | '.join(cells)} | {' | '.join(limits)} | {verdict} |"
        for name, step in self.steps.items():
            yield ""
            yield f"{name}: {step['launches']} launches, {step['step_ms']:.3f} ms a step, {step['device_ms']:.3f} of it"
            yield f"on the device; kernels by themselves {step['sum_ms']:.3f}, their floors {step['floor_ms']:.3f}"
            yield ""
            yield "| kernel | launches | us each | floor | in all, ms |"
            yield "|---|---|---|---|---|"
            for row in step["kernels"]:
                yield (
                    f"| {row['kernel']} | {row['launches']} | {row['us']:.2f} | {row['floor_us']:.2f} | "
                    f"{row['launches'] * row['us'] / 1e3:.3f} |"
                )
        for part, facts in self.parts.items():
            yield ""
            yield f"{part}: " + ", ".join(f"{key} {value}" for key, value in facts.items())
