"""What backends say of memory: those whose device has its own, and those whose caches are narrow."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from mixbit.kernels.executor import Precision


@runtime_checkable
class OwnMemory(Protocol):
    """A backend that keeps weights and caches away from the host's memory."""

    def free_memory(self) -> int:
        """Bytes of the device that can be allocated now."""

    def value_bytes(self, dtype: str | None) -> int:
        """Bytes of a cached key or value, with activations of `dtype` (None: the backend's choice)."""


@runtime_checkable
class NarrowCache(Protocol):
    """A backend in the host's memory whose keys and values may be narrower than its activations."""

    def value_bytes_for(self, precision: Precision) -> int:
        """Bytes of a cached key or value in a mode."""
