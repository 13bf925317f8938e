"""Grouped-query attention with rotary embedding, optional q/k norms and an optional output gate."""

from __future__ import annotations

from dataclasses import dataclass

from mixbit.engine.fields import Fields
from mixbit.engine.weights import Weights
from mixbit.kernels.ops import AttentionSpec, Columns, ProgramBuilder, Rope, Value


@dataclass(frozen=True, eq=False)
class AttentionConfig:
    """One attention layer. norm_eps: of the q and k norms, None without them. gated: q_proj rows of a
    head are [q | gate], and sigmoid(gate) multiplies the output."""

    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope
    qkv_bias: bool
    output_bias: bool
    norm_eps: float | None
    gated: bool

    @classmethod
    def parse(
        cls,
        config: Fields,
        *,
        head_dim: int,
        rope: Rope,
        qkv_bias: bool,
        output_bias: bool,
        qk_norm: bool = False,
        gated: bool = False,
    ) -> AttentionConfig:
        """Read the sizes from config.json; the rest is the family's. Raises CheckpointError."""
        heads = config.integer("num_attention_heads", maximum=65_536)
        kv_heads = config.integer("num_key_value_heads", heads, maximum=65_536)
        if heads % kv_heads:
            raise config.error("num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
        return cls(
            hidden_size=config.integer("hidden_size"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            rope=rope,
            qkv_bias=qkv_bias,
            output_bias=output_bias,
            norm_eps=config.number("rms_norm_eps", 1e-6) if qk_norm else None,
            gated=gated,
        )


def shared_head_dim(config: Fields) -> int:
    """Values in a head: `head_dim`, or the heads' share of hidden_size where config.json has none."""
    heads, hidden_size = config.integer("num_attention_heads"), config.integer("hidden_size")
    if config.get("head_dim") is None and hidden_size % heads:
        raise config.error("hidden_size", f"a multiple of num_attention_heads, {heads}, or a head_dim")
    return config.integer("head_dim", hidden_size // heads)


def refuse_sliding_window(config: Fields) -> None:
    """Raise CheckpointError if a layer attends to fewer tokens than the context holds."""
    kinds = config.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list):
            raise config.error("layer_types", "a list")
        windowed = "sliding_attention" in kinds
    else:
        first = config.integer("max_window_layers", 0, minimum=0)
        windowed = config.boolean("use_sliding_window", False) and first < config.integer("num_hidden_layers")
    if windowed and config.get("sliding_window") is not None:
        window, context = config.integer("sliding_window"), config.integer("max_position_embeddings")
        if window < context:
            raise config.error(
                "sliding_window",
                f"none, or at least max_position_embeddings, {context}: attention within a window is not supported",
            )


def attention(ops: ProgramBuilder, weights: Weights, path: str, config: AttentionConfig, x: Value) -> Value:
    """Attention of the module at `path`: x [tokens, hidden] -> [tokens, hidden]."""
    size, dim, bias = config.hidden_size, config.head_dim, config.qkv_bias
    q_dim = 2 * dim if config.gated else dim
    q, k, v = ops.batch_matvec(
        x,
        weights.linear(f"{path}.q_proj", config.heads * q_dim, size, bias=bias),
        weights.linear(f"{path}.k_proj", config.kv_heads * dim, size, bias=bias),
        weights.linear(f"{path}.v_proj", config.kv_heads * dim, size, bias=bias),
    )
    spec = AttentionSpec(
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=dim,
        scale=dim**-0.5,
        rope=config.rope,
        q_norm=None if config.norm_eps is None else weights.norm(f"{path}.q_norm", dim, config.norm_eps),
        k_norm=None if config.norm_eps is None else weights.norm(f"{path}.k_norm", dim, config.norm_eps),
    )
    gate = Columns(q, dim, q_dim) if config.gated else None
    out = ops.attention(Columns(q, 0, q_dim), Columns(k, 0, dim), Columns(v, 0, dim), spec, gate)
    (y,) = ops.batch_matvec(out, weights.linear(f"{path}.o_proj", size, config.heads * dim, bias=config.output_bias))
    return y
