"""`mixbit inspect`: how many bits each tensor of a model has, and what running it takes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixbit.server.cli.memory import add_memory_options

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from mixbit.engine.inspection import Report
    from mixbit.engine.routing import ExpertLoad

ROUTED = 1024  # tokens

_EPILOG = """examples:
  mixbit inspect demo
  mixbit inspect mlx-community/Qwen3-Coder-Next-4bit
  mixbit inspect ./my-model --json | jq '.classes[] | {role, bits}'
  mixbit inspect ./my-model --routing main.py

Only headers are read, but for --routing, and where experts would be streamed
from disk: some of them are, to measure it. Every width is checked against the
shapes, as when serving. Widths that most of the model does not have stand out."""


def add_parser(commands: Any) -> None:
    """Add `inspect` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "inspect",
        usage="mixbit inspect MODEL [options]",
        help="show the width of every tensor",
        description="Show the width and size of every class of tensor, and what fits in memory here.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="directory, hub id or `demo`")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    add_memory_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object (sizes in bytes)")
    parser.add_argument(
        "--routing",
        metavar="FILE",
        type=Path,
        help=f"show which experts the first {ROUTED:,} tokens of a text choose, by layer",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report on stdout."""
    import json

    from rich.console import Console

    from mixbit.engine.config import EngineConfig
    from mixbit.engine.download import resolve_model
    from mixbit.engine.inspection import inspect_model
    from mixbit.server.console import Steps

    with Steps() as steps:
        path = resolve_model(args.model, revision=args.revision, progress=steps.update)
    config = EngineConfig(model=str(path), memory_bytes=args.memory, expert_bytes=args.expert_memory).check()
    report = inspect_model(path, config=config)
    load = None if args.routing is None else _expert_load(path, args.routing)
    if args.json:
        routing = {} if load is None else {"routing": {"tokens": load.tokens, "counts": load.counts.tolist()}}
        print(json.dumps(report.as_json() | routing, indent=2))
        return 0
    console = Console(highlight=False)
    show(report, console)
    if load is not None:
        from mixbit.server.cli.heatmap import show_load

        console.print()
        show_load(load, console)
    return 0


def _expert_load(path: Path, text: Path) -> ExpertLoad:
    from mixbit.engine.errors import UserError
    from mixbit.engine.routing import expert_load

    try:
        return expert_load(path, text.read_text(encoding="utf-8"), ROUTED)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--routing {text}: cannot be read as text: {error}") from None


def show(report: Report, console: Console) -> None:
    """The report as text that is easy to read."""
    console.print(report.path, style="bold", soft_wrap=True, markup=False)
    console.print(_headline(report))
    console.print()
    console.print(_classes(report, narrow=console.width < 100))
    if report.overrides:
        console.print()
        console.print("Overrides in config.json", style="bold")
        rows = _grid()
        for override in report.overrides:
            rows.add_row(override.modules, override.sets, f"in {override.count} layers" if override.count > 1 else "")
        console.print(rows)
    console.print()
    console.print("Memory on this machine", style="bold")
    console.print(_memory(report))
    for part, count in report.skipped.items():
        what = "1 tensor" if count == 1 else f"{count} tensors"
        console.print(f"Skipped: {what} of {part}, which text generation does not need", style="dim")
    for warning in report.warnings:
        console.print(f"Warning: {warning}", style="yellow", markup=False)


def _headline(report: Report) -> str:
    layers = ", ".join(f"{count} {kind}" for kind, count in report.layers.items())
    parts = [report.model_type, f"layers: {layers}"]
    if report.experts:
        parts.append(f"{report.experts[0]} of {report.experts[1]} experts a token")
    parts += [f"context {report.context_length:,}", f"vocabulary {report.vocab_size:,}"]
    return " · ".join(parts)


def _grid() -> Table:
    from rich.table import Table

    return Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)


def _classes(report: Report, *, narrow: bool) -> Table:
    from rich import box
    from rich.table import Table

    from mixbit.server.cli.text import number, size

    padding = (0, 0) if narrow else (0, 1, 0, 0)
    table = Table(box=box.SIMPLE_HEAD, padding=padding, pad_edge=False, show_footer=True)
    bits_per_weight = 8 * report.size / report.parameters
    table.add_column("Tensors", footer=f"{number(report.parameters)} weights", no_wrap=True)
    table.add_column("Count", justify="right", footer=f"{sum(each.count for each in report.classes)}")
    table.add_column("Shape", justify="right", no_wrap=True)
    table.add_column("Bits", justify="right", footer=f"{bits_per_weight:.2f}")
    table.add_column("Group", justify="right")
    table.add_column("Mode")
    table.add_column("Size", justify="right", footer=size(report.size), no_wrap=True)
    table.add_column("Per token", justify="right", footer=size(report.token_bytes), no_wrap=True)
    common = _common_width(report)
    for each in report.classes:
        # What differs from the common width is what a reader looks for.
        style = "" if each.bits is None or (each.bits, each.group_size) == common else "bold cyan"
        table.add_row(
            each.role,
            str(each.count),
            "x".join(map(str, each.shape)),
            _dtype(each.dtype) if each.bits is None else str(each.bits),
            "-" if each.group_size is None else str(each.group_size),
            each.mode or "dense",
            size(each.size),
            size(each.token_bytes),
            style=style,
        )
    return table


def _common_width(report: Report) -> tuple[int | None, int | None]:
    """Width of most bytes."""
    sizes: dict[tuple[int | None, int | None], int] = {}
    for each in report.classes:
        if each.bits is not None:
            width = (each.bits, each.group_size)
            sizes[width] = sizes.get(width, 0) + each.size
    return max(sizes, key=lambda width: sizes[width], default=(None, None))


def _dtype(name: str) -> str:
    return {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[name]


def _memory(report: Report) -> Table:
    from mixbit.server.cli.text import size

    memory = report.memory
    rows = _grid()
    rows.add_row("available", size(memory.available))
    rows.add_row("weights", f"{size(memory.weights)}, mapped from the files")
    cache = f"{size(1000 * memory.cache_token)} for 1,000 tokens (float32)"
    if memory.state:
        cache += f", and {size(memory.state)} a sequence whatever its length"
    rows.add_row("cache", cache)
    rows.add_row("full context", f"{size(memory.full_context)} for one sequence of {report.context_length:,} tokens")
    if report.streaming is None:
        rows.add_row("verdict", _verdict(report))
        return rows
    streaming = report.streaming
    rows.add_row("streamed", f"{size(streaming.experts)} of experts through {size(streaming.memory)} of memory")
    rows.add_row("resident", f"{size(streaming.resident)} that every token needs")
    rows.add_row("disk", f"{size(streaming.disk)}/s of random experts, measured now")
    rate = f"about {streaming.rate:.2g} tokens per second where all experts are as likely"
    rows.add_row("verdict", f"[yellow]experts are streamed: {rate}, {size(streaming.token_bytes)} a token[/yellow]")
    return rows


def _verdict(report: Report) -> str:
    from mixbit.server.cli.text import number

    memory = report.memory
    if memory.weights > memory.available:
        return "[yellow]the weights do not fit: what is missing is read from disk at every token[/yellow]"
    if not memory.fits:
        return "[yellow]the weights fit, but the cache of 1,000 tokens does not fit beside them[/yellow]"
    room = "" if memory.tokens is None else f", with room for about {number(memory.tokens)} cached tokens"
    return f"[green]fits[/green]{room}"
