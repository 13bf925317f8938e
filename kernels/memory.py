"""Backends whose device has memory of its own."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class OwnMemory(Protocol):
    """A backend that keeps weights and caches away from the host's memory."""

    def free_memory(self) -> int:
        """Bytes of the device that can be allocated now."""

    def value_bytes(self, dtype: str | None) -> int:
        """Bytes of a cached key or value, with activations of `dtype` (None: the backend's choice)."""
