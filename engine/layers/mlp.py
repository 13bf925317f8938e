"""SwiGLU feed-forward and mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass

from mixbit.engine.fields import Fields
from mixbit.engine.weights import Weights
from mixbit.kernels.ops import MlpSpec, MoeSpec, ProgramBuilder, Value


@dataclass(frozen=True)
class MoeConfig:
    """A mixture of experts. shared_size: width of the expert every token passes, None without one.

    dense_layers: indices of the layers that have a plain feed-forward instead.
    """

    hidden_size: int
    experts: int
    top_k: int
    expert_size: int
    shared_size: int | None
    normalize: bool
    dense_layers: frozenset[int]

    @classmethod
    def parse(cls, config: Fields, *, shared: bool, normalize: bool | None) -> MoeConfig:
        """Read from config.json. normalize: the family's norm_topk_prob where it has none; None: required."""
        experts = config.integer("num_experts", maximum=65_536)
        step = config.integer("decoder_sparse_step", 1)
        dense = set(config.integers("mlp_only_layers", ()))
        dense |= {layer for layer in range(config.integer("num_hidden_layers", maximum=10_000)) if (layer + 1) % step}
        return cls(
            hidden_size=config.integer("hidden_size"),
            experts=experts,
            top_k=config.integer("num_experts_per_tok", maximum=experts),
            expert_size=config.integer("moe_intermediate_size"),
            shared_size=config.integer("shared_expert_intermediate_size") if shared else None,
            normalize=config.boolean("norm_topk_prob", normalize),
            dense_layers=frozenset(dense),
        )


def _swiglu(weights: Weights, path: str, size: int, inner: int, experts: int | None = None) -> MlpSpec:
    return MlpSpec(
        gate=weights.matrix(f"{path}.gate_proj", inner, size, experts),
        up=weights.matrix(f"{path}.up_proj", inner, size, experts),
        down=weights.matrix(f"{path}.down_proj", size, inner, experts),
    )


def mlp(ops: ProgramBuilder, weights: Weights, path: str, inner: int, x: Value) -> Value:
    """The feed-forward of the module at `path`, `inner` values wide."""
    return ops.mlp(x, _swiglu(weights, path, x.dim, inner))


def moe(ops: ProgramBuilder, weights: Weights, path: str, config: MoeConfig, x: Value) -> Value:
    """The mixture of experts of the module at `path`; the experts are stacked in `switch_mlp`."""
    size = config.hidden_size
    shared = shared_gate = None
    if config.shared_size is not None:
        shared = _swiglu(weights, f"{path}.shared_expert", size, config.shared_size)
        shared_gate = weights.matrix(f"{path}.shared_expert_gate", 1, size)
    spec = MoeSpec(
        router=weights.matrix(f"{path}.gate", config.experts, size),
        experts=_swiglu(weights, f"{path}.switch_mlp", size, config.expert_size, config.experts),
        top_k=config.top_k,
        normalize=config.normalize,
        shared=shared,
        shared_gate=shared_gate,
    )
    return ops.moe(x, spec)
