"""What streaming did, layer by layer: for `mixbit generate --timing`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mixbit.engine.protocol import ExpertStats
from mixbit.server.cli.text import size

if TYPE_CHECKING:
    from rich.table import Table

Layers = Sequence[ExpertStats]


def expert_table(start: Layers, end: Layers, tokens: int) -> Table:
    """Of decoding, between two counts: milliseconds and bytes for a token, the share of experts in memory, and of
    the others the share of which something had been read before they were asked for."""
    from rich.table import Table

    table = Table(title="streamed experts while decoding", show_footer=True)
    layers = [_less(after, before) for before, after in zip(start, end, strict=True)]
    columns = [("layer", [str(number) for number in range(len(layers))], "all")]
    for name in ("read", "wait", "compute"):
        values = [1000 * getattr(layer, f"{name}_seconds") / tokens for layer in layers]
        columns.append((f"{name}\nms per token", [f"{value:.2f}" for value in values], f"{sum(values):.2f}"))
    read = [layer.bytes_read / tokens for layer in layers]
    columns.append(("read\nper token", [size(value) for value in read], size(sum(read))))
    columns.append(("in memory", [_share([layer]) for layer in layers], _share(layers)))
    columns.append(("guessed", [_guessed([layer]) for layer in layers], _guessed(layers)))
    for name, _, footer in columns:
        table.add_column(name, justify="right", footer=footer, no_wrap=True)
    for row in zip(*(cells for _, cells, _ in columns), strict=True):
        table.add_row(*row)
    return table


def _less(after: ExpertStats, before: ExpertStats) -> ExpertStats:
    names = after.__struct_fields__
    return ExpertStats(**{name: getattr(after, name) - getattr(before, name) for name in names})


def _share(layers: Layers) -> str:
    hits = sum(layer.hits for layer in layers)
    asked = hits + sum(layer.misses for layer in layers)
    return f"{hits / asked:.0%}" if asked else ""


def _guessed(layers: Layers) -> str:
    misses = sum(layer.misses for layer in layers)
    return f"{sum(layer.ahead for layer in layers) / misses:.0%}" if misses else ""
