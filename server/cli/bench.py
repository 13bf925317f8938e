"""`mixbit bench`: how fast a model runs on this machine, and how near that is to the speed of its memory."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixbit.engine.errors import UserError

if TYPE_CHECKING:
    from mixbit.engine.benchmark import Benchmark

_EPILOG = """examples:
  mixbit bench                                    the demo model
  mixbit bench MODEL --contexts 128,4096,32768 --plot speed.png
  mixbit bench MODEL --threads 4 --batches 1,2,4,8,16 --json

Steps are timed without sampling or HTTP; medians of the repetitions. The
bandwidth is that of the bytes each step has to read (weights, experts it
chooses, keys and values), beside a plain read of memory on as many threads.
A figure far below it when decoding one sequence means that the kernels, not
the memory, are the limit. Other processes on the machine disturb: let it idle.

--plot needs matplotlib: pip install 'mixbit[plot]'"""


class BenchCommandError(UserError):
    """A plot that cannot be drawn."""


def add_parser(commands: Any) -> None:
    """Add `bench` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench",
        usage="mixbit bench [MODEL] [options]",
        help="measure how fast a model runs here",
        description="Measure prefill, decoding and batches of a model on this machine.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", default="demo", help="directory or hub id (default: demo)")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="tokens per second over context length, as PNG")

    work = parser.add_argument_group("what to measure")
    work.add_argument("--prompt", metavar="N", type=_positive, default=512, help="tokens of the prefill (default: 512)")
    work.add_argument("--tokens", metavar="N", type=_positive, default=32, help="decoded each time (default: 32)")
    work.add_argument(
        "--contexts", metavar="N,N", type=_numbers, default=(128, 1024, 4096), help="default: 128,1024,4096"
    )
    work.add_argument("--batches", metavar="N,N", type=_numbers, default=(1, 8), help="sequences (default: 1,8)")
    work.add_argument("--repeat", metavar="N", type=_positive, default=3, help="repetitions (default: 3)")

    device = parser.add_argument_group("device")
    device.add_argument("--device", metavar="NAME", default="auto", help="see mixbit doctor (default: auto)")
    device.add_argument("--threads", metavar="N", type=int, default=0, help="CPU threads (default: one a core)")
    device.add_argument(
        "--precision", choices=["fast", "exact"], default="fast", help="fast: rounded activations on CPUs (the default)"
    )
    device.add_argument("--isa", metavar="NAME", help="force a CPU instruction set (default: the best)")
    device.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="activations of GPU backends (default: the checkpoint's)",
    )
    parser.set_defaults(run=run)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(sorted({_positive(part) for part in text.split(",")}))


def run(args: argparse.Namespace) -> int:
    """Measure; the table or JSON goes to stdout, progress to stderr."""
    from mixbit.engine.benchmark import BenchmarkOptions, run_benchmark
    from mixbit.engine.download import resolve_model
    from mixbit.server.console import Steps

    if args.plot:
        _require_matplotlib()  # before minutes of work
    with Steps() as steps:
        path = resolve_model(args.model, revision=args.revision, progress=steps.update)
        options = BenchmarkOptions(
            prompt=args.prompt,
            contexts=args.contexts,
            batches=args.batches,
            tokens=args.tokens,
            repeat=args.repeat,
            device=args.device,
            threads=args.threads,
            isa=args.isa,
            dtype=args.dtype,
            precision=args.precision,
        )
        found = run_benchmark(path, options, steps.update)
    if args.json:
        print(json.dumps(found.as_json(), indent=2))
    else:
        _show(found)
    if args.plot:
        _draw(found, args.plot)
        print(f"written: {args.plot}", file=sys.stderr)
    return 0


def _show(found: Benchmark) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("work", "tokens per second", "bandwidth", "of a plain read")
    for column in table.columns[1:]:
        column.justify = "right"
    for each in found.measurements:
        together = f", {each.sequences} together" if each.sequences > 1 else ""
        name = f"prefill {each.context:,}" if each.work == "prefill" else f"decode at {each.context:,}{together}"
        moved = each.bytes_per_second
        cells = ("", "") if moved is None else (f"{moved / 1e9:.1f} GB/s", f"{moved / found.bandwidth:.0%}")
        table.add_row(name, f"{each.tokens_per_second:,.1f}", *cells)
    console = Console()
    console.print(found.model, highlight=False, soft_wrap=True)
    console.print(found.backend, style="dim")
    console.print(table)
    console.print(f"first token {found.load_seconds:.2f} s after start; plain read {found.bandwidth / 1e9:.1f} GB/s")


def _require_matplotlib() -> None:
    try:
        import matplotlib
    except ImportError:
        raise BenchCommandError("--plot needs matplotlib; install it with: pip install 'mixbit[plot]'") from None
    matplotlib.use("Agg")  # draws without a display


def _draw(found: Benchmark, path: Path) -> None:
    """Decoding of one sequence over the length of its context, and where the memory's bandwidth would be."""
    from matplotlib.figure import Figure

    points = [each for each in found.measurements if each.work == "decode" and each.sequences == 1]
    contexts = [each.context for each in points]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(contexts, [each.tokens_per_second for each in points], marker="o", label="measured")
    reachable = [each.tokens_per_second * found.bandwidth / (each.bytes_per_second or 1) for each in points]
    axes.plot(contexts, reachable, linestyle="--", color="gray", label="at the speed of a plain read")
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens in the context")
    axes.set_ylabel("tokens per second")
    axes.set_title(f"{Path(found.model).name}: decoding, one sequence")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, format="png", dpi=150)
    except OSError as error:
        raise BenchCommandError(f"{path}: cannot be written: {error.strerror}") from None
