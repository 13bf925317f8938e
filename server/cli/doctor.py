"""`mixbit doctor`: what this machine has, what can run on it, and why."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from mixbit.engine.machine import Diagnosis

_EPILOG = """examples:
  mixbit doctor
  mixbit doctor --json | jq .chosen

Exit status: 0 if a backend can run here, else 1."""


def add_parser(commands: Any) -> None:
    """Add `doctor` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "doctor",
        usage="mixbit doctor [--json]",
        help="show what this machine can run",
        description="Show the machine, every backend with the reason for its choice, and the caches.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object (sizes in bytes)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the diagnosis on stdout."""
    import json

    from rich.console import Console

    from mixbit.engine.machine import examine

    diagnosis = examine()
    if args.json:
        print(json.dumps(diagnosis.as_json(), indent=2))
    else:
        show(diagnosis, Console(highlight=False))
    return 0 if diagnosis.chosen else 1


def show(diagnosis: Diagnosis, console: Console) -> None:
    """The diagnosis as text, one fact a line."""
    from rich.markup import escape

    from mixbit.server.cli.text import size

    machine = diagnosis.machine
    yes, no = "[green]✓[/green]", "[red]✗[/red]"

    def section(title: str, rows: list[tuple[str, str]]) -> None:
        from rich.table import Table

        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
        table.add_column(min_width=15, no_wrap=True)
        table.add_column(overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(f"[bold]{title}[/bold]")
        console.print(table)
        console.print()

    cores = f"{machine.usable_cores} usable" + (f" of {machine.cores}" if machine.cores != machine.usable_cores else "")
    section(
        "Machine",
        [
            ("mixbit", diagnosis.version),
            ("Python", machine.python),
            ("system", f"{machine.system} ({machine.architecture})"),
            ("CPU", machine.cpu),
            ("cores", cores),
            ("features", ", ".join(machine.features) or "none that the kernels use"),
            ("memory", f"{size(machine.memory_available)} available of {size(machine.memory_total)}"),
        ],
    )
    backends = []
    for backend in diagnosis.backends:
        note = " [bold](chosen)[/bold]" if backend.name == diagnosis.chosen else ""
        backends.append((f"{yes if backend.available else no} {backend.name}", escape(backend.detail) + note))
    section("Backends, in order of preference", backends)
    section(
        "Packages",
        [
            ("CPU module", diagnosis.native_module or f"{no} not built: install mixbit from source, or a wheel"),
            *((name, version or "not installed") for name, version in diagnosis.packages.items()),
        ],
    )
    demo = f"{yes} {diagnosis.demo}" if diagnosis.demo else "not built yet; the first `mixbit serve` does"
    section(
        "Caches",
        [
            ("demo", demo),
            ("mixbit", f"{diagnosis.cache} ({size(diagnosis.cache_size)}; {size(diagnosis.cache_free)} free)"),
            ("hub", f"{diagnosis.hub_cache} ({size(diagnosis.hub_cache_size)})"),
        ],
    )
    if diagnosis.chosen is None:
        console.print("[red]No backend can run here;[/red] the reasons stand above.")
