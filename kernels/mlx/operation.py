"""How a node is run: prepared once for a program, called once a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from mixbit.kernels.mlx.arrays import Values
from mixbit.kernels.mlx.caches import KvPool, StatePool
from mixbit.kernels.mlx.step import Step
from mixbit.kernels.mlx.weights import Weights


class Operation(Protocol):
    """One node, with its weights on the device."""

    def __call__(self, step: Step, values: Values) -> None:
        """Read the node's inputs from `values` and put its outputs there, unevaluated."""


@dataclass(frozen=True, eq=False)
class Binding:
    """What operations are prepared with. Pools are indexed by the `cache` of a node."""

    weights: Weights
    kv_pools: tuple[KvPool, ...]
    state_pools: tuple[StatePool, ...]


Table = Mapping[type[Any], Callable[[Any, Binding], Operation]]
"""For each class of node, what prepares its operation: `prepare(node, binding)`."""
