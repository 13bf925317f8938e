"""LLaMA: the plain decoder (model_type "llama")."""

from __future__ import annotations

from dataclasses import dataclass

from mixbit.engine.fields import Fields
from mixbit.engine.layers.attention import AttentionConfig, attention, refuse_sliding_window, shared_head_dim
from mixbit.engine.layers.decoder import DecoderConfig, decoder
from mixbit.engine.layers.mlp import mlp
from mixbit.engine.rope import parse_rope
from mixbit.engine.weights import Weights
from mixbit.kernels.ops import Program, ProgramBuilder, Value


@dataclass(frozen=True, eq=False)
class Llama:
    """Attention and SwiGLU in every layer."""

    frame: DecoderConfig
    attention: AttentionConfig
    mlp_size: int
    context_length: int

    @classmethod
    def parse(cls, config: Fields) -> Llama:
        """Read config.json; raises CheckpointError for values that are missing, wrong or not supported."""
        config.require("mlp_bias", (False,))
        refuse_sliding_window(config)
        head_dim = shared_head_dim(config)
        rope = parse_rope(config, head_dim, theta=10_000.0)
        bias = config.boolean("attention_bias", False)
        return cls(
            frame=DecoderConfig.parse(config),
            attention=AttentionConfig.parse(config, head_dim=head_dim, rope=rope.rope, qkv_bias=bias, output_bias=bias),
            mlp_size=config.integer("intermediate_size"),
            context_length=rope.context_length,
        )

    def build(self, ops: ProgramBuilder, weights: Weights) -> Program:
        """Record the model's step, taking every tensor from `weights`."""

        def mixer(layer: int, path: str, x: Value) -> Value:
            return attention(ops, weights, f"{path}.self_attn", self.attention, x)

        def feed_forward(layer: int, path: str, x: Value) -> Value:
            return mlp(ops, weights, f"{path}.mlp", self.mlp_size, x)

        return decoder(ops, weights, self.frame, mixer, feed_forward)
