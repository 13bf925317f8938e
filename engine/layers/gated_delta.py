"""Gated delta net, the linear attention of Qwen3-Next and Qwen3.5 (arXiv:2412.06464)."""

from __future__ import annotations

from dataclasses import dataclass

from mixbit.engine.fields import Fields
from mixbit.engine.weights import Weights
from mixbit.kernels.ops import Columns, GatedDeltaSpec, ProgramBuilder, Value
from mixbit.kernels.spec import BatchMatvecSpec, DenseTensor

_KINDS = ("linear_attention", "full_attention")


@dataclass(frozen=True)
class GatedDeltaConfig:
    """One gated delta net. ratio: value heads that read one key head. layers: indices of the layers that are one."""

    hidden_size: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    norm_eps: float
    layers: frozenset[int]

    @classmethod
    def parse(cls, config: Fields) -> GatedDeltaConfig:
        """Read from config.json; raises CheckpointError."""
        key_heads = config.integer("linear_num_key_heads", maximum=65_536)
        value_heads = config.integer("linear_num_value_heads", maximum=65_536)
        if value_heads % key_heads:
            raise config.error("linear_num_value_heads", f"a multiple of linear_num_key_heads, {key_heads}")
        return cls(
            hidden_size=config.integer("hidden_size"),
            key_heads=key_heads,
            value_heads=value_heads,
            key_dim=config.integer("linear_key_head_dim", maximum=65_536),
            value_dim=config.integer("linear_value_head_dim", maximum=65_536),
            kernel=config.integer("linear_conv_kernel_dim", minimum=2, maximum=64),
            norm_eps=config.number("rms_norm_eps", 1e-6),
            layers=_linear_layers(config),
        )

    @property
    def ratio(self) -> int:
        """Value heads for each key head."""
        return self.value_heads // self.key_heads

    @property
    def keys(self) -> int:
        """Values of all key heads together: the size of q and of k."""
        return self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        """Values of all value heads together: the size of v, z and the output."""
        return self.value_heads * self.value_dim


@dataclass(frozen=True)
class DeltaInputs:
    """Where the projections leave what the op reads; see `kernels.ops.GatedDelta`."""

    q: Columns
    k: Columns
    v: Columns
    z: Columns
    b: Columns
    a: Columns


def _linear_layers(config: Fields) -> frozenset[int]:
    """Indices of the gated delta layers: from layer_types, else all but every full_attention_interval-th."""
    layers = config.integer("num_hidden_layers", maximum=10_000)
    kinds = config.get("layer_types")
    if kinds is None:
        interval = config.integer("full_attention_interval", 4)
        return frozenset(layer for layer in range(layers) if (layer + 1) % interval)
    if not isinstance(kinds, list) or len(kinds) != layers or not all(kind in _KINDS for kind in kinds):
        raise config.error("layer_types", f"{layers} times one of {', '.join(_KINDS)}")
    return frozenset(layer for layer, kind in enumerate(kinds) if kind == "linear_attention")


def fused_inputs(ops: ProgramBuilder, weights: Weights, path: str, config: GatedDeltaConfig, x: Value) -> DeltaInputs:
    """Qwen3-Next: two matrices; the rows of a key head lie together, as [q, k, v * ratio, z * ratio] and
    [b * ratio, a * ratio]."""
    size, dim, values = config.hidden_size, config.key_dim, config.ratio * config.value_dim
    qkvz, ba = ops.batch_matvec(
        x,
        weights.linear(f"{path}.in_proj_qkvz", 2 * config.keys + 2 * config.values, size),
        weights.linear(f"{path}.in_proj_ba", 2 * config.value_heads, size),
    )
    stride = 2 * dim + 2 * values
    return DeltaInputs(
        q=Columns(qkvz, 0, stride),
        k=Columns(qkvz, dim, stride),
        v=Columns(qkvz, 2 * dim, stride),
        z=Columns(qkvz, 2 * dim + values, stride),
        b=Columns(ba, 0, 2 * config.ratio),
        a=Columns(ba, config.ratio, 2 * config.ratio),
    )


def separate_inputs(
    ops: ProgramBuilder, weights: Weights, path: str, config: GatedDeltaConfig, x: Value
) -> DeltaInputs:
    """Qwen3.5: four matrices; q, k and v are the thirds of the first, each head after head."""
    size, dim, values = config.hidden_size, config.key_dim, config.ratio * config.value_dim
    qkv, z, b, a = ops.batch_matvec(
        x,
        weights.linear(f"{path}.in_proj_qkv", 2 * config.keys + config.values, size),
        weights.linear(f"{path}.in_proj_z", config.values, size),
        weights.linear(f"{path}.in_proj_b", config.value_heads, size),
        weights.linear(f"{path}.in_proj_a", config.value_heads, size),
    )
    return DeltaInputs(
        q=Columns(qkv, 0, dim),
        k=Columns(qkv, config.keys, dim),
        v=Columns(qkv, 2 * config.keys, values),
        z=Columns(z, 0, values),
        b=Columns(b, 0, config.ratio),
        a=Columns(a, 0, config.ratio),
    )


def gated_delta(
    ops: ProgramBuilder, weights: Weights, path: str, config: GatedDeltaConfig, inputs: DeltaInputs
) -> Value:
    """The gated delta net of the module at `path`, after its input projections -> [tokens, hidden]."""
    channels = 2 * config.keys + config.values
    conv = weights.tensor(f"{path}.conv1d.weight", (channels, config.kernel, 1))
    spec = GatedDeltaSpec(
        key_heads=config.key_heads,
        value_heads=config.value_heads,
        key_dim=config.key_dim,
        value_dim=config.value_dim,
        conv=DenseTensor(conv.name, conv.data[:, :, 0]),
        a_log=weights.tensor(f"{path}.A_log", (config.value_heads,)),
        dt_bias=weights.tensor(f"{path}.dt_bias", (config.value_heads,)),
        norm=weights.norm(f"{path}.norm", config.value_dim, config.norm_eps),
    )
    out = ops.gated_delta(inputs.q, inputs.k, inputs.v, inputs.z, inputs.b, inputs.a, spec)
    (y,) = ops.batch_matvec(out, BatchMatvecSpec(weights.matrix(f"{path}.out_proj", config.hidden_size, config.values)))
    return y
