"""Typed, checked access to the values of a config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixbit.engine.errors import CheckpointError

_LARGEST = 2**31 - 1
_LARGEST_NUMBER = 1e12


@dataclass(frozen=True)
class Fields:
    """A JSON object and the words that name it in errors. A null value counts as absent.

    Getters without a default raise CheckpointError if the field is absent; all do if it has another type
    or is out of range.
    """

    values: Mapping[str, Any]
    source: str = "config.json"

    def get(self, name: str) -> Any:
        """The raw value, or None."""
        return self.values.get(name)

    def error(self, name: str, expected: str) -> CheckpointError:
        """The error for a field that has a wrong value or none."""
        value = self.get(name)
        if value is None:
            return CheckpointError(f"{self.source}: {name} is missing; expected {expected}")
        return CheckpointError(f"{self.source}: {name} is {value!r}; expected {expected}")

    def integer(self, name: str, default: int | None = None, *, minimum: int = 1, maximum: int = _LARGEST) -> int:
        """An integer within bounds."""
        value = self.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            raise self.error(name, f"an integer from {minimum} to {maximum}")
        return value

    def number(self, name: str, default: float | None = None, *, minimum: float = 0.0) -> float:
        """A finite number, not below the minimum and of a sane size."""
        value = self.get(name)
        if value is None and default is not None:
            return default
        valid = isinstance(value, int | float) and not isinstance(value, bool)
        if not valid or not minimum <= value <= _LARGEST_NUMBER:
            raise self.error(name, f"a number from {minimum:g} to {_LARGEST_NUMBER:g}")
        return float(value)

    def boolean(self, name: str, default: bool | None = None) -> bool:
        """True or false."""
        value = self.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def integers(self, name: str, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """A list of integers."""
        value = self.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, list) or not all(
            isinstance(item, int) and not isinstance(item, bool) for item in value
        ):
            raise self.error(name, "a list of integers")
        return tuple(value)

    def section(self, name: str) -> Fields | None:
        """A nested object, or None if absent."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(name, "an object")
        return Fields(value, f"{self.source} {name}")

    def require(self, name: str, allowed: Sequence[Any]) -> None:
        """Refuse a value that nothing here implements; absent is allowed."""
        value = self.get(name)
        if value is not None and value not in allowed:
            raise self.error(name, f"{' or '.join(map(repr, allowed))}: nothing else is supported")
