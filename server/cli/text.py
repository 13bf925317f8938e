"""How the commands write numbers."""

from __future__ import annotations


def size(count: float) -> str:
    """Bytes for people, in powers of ten as disks and files are sold: "97 B", "1.23 MB", "44.8 GB"."""
    units = ["B", "kB", "MB", "GB", "TB"]
    value, unit = float(count), units.pop(0)
    while value >= 999.5 and units:
        value, unit = value / 1000, units.pop(0)
    digits = 0 if unit == "B" or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {unit}"


def number(count: float) -> str:
    """A count for people: "134.5M", "79.7B"."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f}{unit}"
    return f"{count:.0f}"
