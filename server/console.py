"""What `serve` shows to people: steps while it starts, then a panel with the way in."""

from __future__ import annotations

import json
import shlex
import sys
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from mixbit.engine.protocol import Ready
    from mixbit.server.model import ServedModel


class Steps:
    """Progress on stderr: a bar on a terminal, else a line for each stage."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console, transient=True) if console.is_terminal else None
        self._task: TaskID | None = None
        self._stage = ""

    def __enter__(self) -> Steps:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar:
            self._bar.stop()

    def update(self, stage: str, done: int, total: int) -> None:
        """Stage `stage` is at `done` of `total`."""
        if self._bar is None:
            if stage != self._stage:
                print(f"{stage} ...", file=sys.stderr, flush=True)
        elif self._task is None or stage != self._stage:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(stage, total=total or None, completed=done)
        else:
            self._bar.update(self._task, total=total or None, completed=done)
        self._stage = stage


def show_panel(url: str, models: list[tuple[ServedModel, Ready]], *, with_key: bool, local: bool) -> None:
    """Where the server is, what it serves, on what, and a line to try."""
    console = Console(highlight=False)
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="bold")
    rows.add_column(overflow="fold")
    page = url.removesuffix("/v1")
    rows.add_row("URL", f"[link={url}]{url}[/link]")
    rows.add_row("Page", f"[link={page}]{page}[/link]")
    for model, ready in models:
        names = model.name if len(model.names) == 1 else f"{model.name} (also {', '.join(model.names[1:])})"
        rows.add_row("Model", escape(names))
        loaded = f"{_size(ready.weight_bytes)}, loaded in {ready.load_seconds:.1f} s"
        rows.add_row("Weights", escape(f"{model.quantization}; {loaded}"))
        rows.add_row("Backend", escape(ready.backend_reason))
        rows.add_row("Memory", escape(ready.memory_reason))
        rows.add_row("Context", f"{ready.context_length:,} tokens; KV cache {_size(ready.cache_bytes)}")
        if model.template is None:
            rows.add_row("Chat", f"[yellow]off: {escape(model.template_problem)}[/yellow]")
    rows.add_row("Access", ("this machine" if local else "any machine") + (", with an API key" if with_key else ""))
    console.print(Panel(rows, title="[bold]Mixbit[/bold]", title_align="left", expand=False, border_style="cyan"))
    console.print("Try it:", style="bold")
    chat = models[0][0].template is not None
    console.print(_curl(url, with_key=with_key, chat=chat), soft_wrap=True, markup=False)
    console.print("Ctrl-C stops it.", style="dim")


def _curl(url: str, *, with_key: bool, chat: bool) -> str:
    key = ' -H "Authorization: Bearer $MIXBIT_API_KEY"' if with_key else ""
    question = "What is the capital of France?"
    messages = {"messages": [{"role": "user", "content": question}]}
    path = "chat/completions" if chat else "completions"
    data = shlex.quote(json.dumps(messages if chat else {"prompt": "The capital of France is"}))
    return f"curl {url}/{path} -H 'Content-Type: application/json'{key} -d {data}"


def _size(count: int) -> str:
    value = float(count)
    for unit in ("bytes", "KB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"
