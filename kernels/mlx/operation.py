"""How a node is run: prepared once for a program, called once a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx

from mixbit.kernels.mlx.arrays import Values
from mixbit.kernels.mlx.caches import KvPool, StatePool
from mixbit.kernels.mlx.step import Step
from mixbit.kernels.mlx.weights import Weights
from mixbit.kernels.ops import Moe


class Operation(Protocol):
    """One node, with its weights on the device."""

    def __call__(self, step: Step, values: Values) -> None:
        """Read the node's inputs from `values` and put its outputs there, unevaluated."""


class Gathers(Protocol):
    """A stack of experts that rows can be sent through."""

    def gather(self, x: mx.array, experts: mx.array) -> mx.array:
        """x [rows, dim] through experts [rows, k] -> [rows, k, dim]."""


@dataclass(frozen=True, eq=False)
class Binding:
    """What operations are prepared with. Pools are indexed by the `cache` of a node.

    slots: of nodes whose experts are streamed.
    """

    weights: Weights
    kv_pools: tuple[KvPool, ...]
    state_pools: tuple[StatePool, ...]
    slots: Mapping[Moe, Gathers] = field(default_factory=dict)


Table = Mapping[type[Any], Callable[[Any, Binding], Operation]]
"""For each class of node, what prepares its operation: `prepare(node, binding)`."""
