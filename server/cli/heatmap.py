"""The load of experts as a heat map: a row for each layer, a sign for each expert."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from mixbit.engine.routing import ExpertLoad

# Share of the layer's mean load, from which on a sign stands: it tells without colour what the colour tells.
_SHADES = ((2.0, "█", "red"), (1.25, "▓", "yellow"), (0.75, "▒", "green"), (0.25, "░", "cyan"), (0.0, "·", "blue"))
_DEAD = ("x", "bold magenta")
_NAMED = 20  # dead experts


def shade(share: float) -> tuple[str, str]:
    """Sign and style for an expert's share of the mean load."""
    if share == 0:
        return _DEAD
    return next((sign, style) for least, sign, style in _SHADES if share >= least)


def show_load(load: ExpertLoad, console: Console) -> None:
    """Draw the map, wrapped where there are many experts, and name the experts that nothing chose."""
    from rich.text import Text

    layers, experts = load.counts.shape
    console.print(f"Experts chosen by {load.tokens:,} tokens, as a share of the mean load", style="bold")
    width = max(1, min(experts, 64, console.width - 12))
    for layer, shares in enumerate(load.shares):
        for start in range(0, experts, width):
            row = Text(f"layer {layer:3}  " if start == 0 else " " * 11)
            for share in shares[start : start + width]:
                row.append(*shade(float(share)))
            console.print(row, soft_wrap=True)
    key = Text("           ")
    for (least, sign, style), above in zip(_SHADES, ("", *_SHADES), strict=False):
        most = f" to {above[0]}" if above else " and more"
        key.append(sign, style).append(f" {least}{most}  ", "dim")
    console.print(key.append(*_DEAD).append(" none", "dim"), soft_wrap=True)
    low, high = float(load.shares.min()), float(load.shares.max())
    console.print(f"least {low:.2f}, most {high:.2f} of the mean, in {layers} layers of {experts} experts")
    named = ", ".join(f"layer {layer} expert {expert}" for layer, expert in load.dead[:_NAMED])
    further = f" and {len(load.dead) - _NAMED} more" if len(load.dead) > _NAMED else ""
    console.print(
        f"Dead: {named}{further}" if load.dead else "No dead experts", style="yellow" if load.dead else "green"
    )
