"""`mixbit cache`: the prefixes of prompts that are kept on disk across restarts."""

from __future__ import annotations

import argparse
import time
from typing import Any


def add_parser(commands: Any) -> None:
    """Add `cache` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "cache",
        help="list or clear the prompts cached on disk",
        description="Prefixes of prompts are kept on disk, so that a conversation goes on quickly after a restart.",
    )
    parser.add_argument("action", choices=("ls", "clear"), help="ls: what each model has; clear: delete all")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Show or delete the entries; the exit status."""
    from rich.console import Console
    from rich.table import Table

    from mixbit.engine.demo import prefix_directory
    from mixbit.engine.disk_store import clear, entries, models

    root, console = prefix_directory(), Console(highlight=False)
    if args.action == "clear":
        console.print(f"{clear(root) / 1e6:,.1f} MB deleted")
        return 0
    table = Table("model", "entries", "MB", "last used", box=None, header_style="bold")
    found = list(entries(root))
    for directory, name in models(root).items():
        own = [entry for entry in found if entry.path.parent == directory]
        last = max((entry.used for entry in own), default=None)
        when = "never" if last is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(last))
        table.add_row(name, str(len(own)), f"{sum(entry.size for entry in own) / 1e6:,.1f}", when)
    if table.row_count:
        console.print(table)
    console.print(f"{root}: {len(found)} entries, {sum(entry.size for entry in found) / 1e6:,.1f} MB", soft_wrap=True)
    return 0
