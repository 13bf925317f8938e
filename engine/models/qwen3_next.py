"""Qwen3-Next: gated delta nets, every fourth layer gated attention, and a mixture of experts with a shared
expert (model_type "qwen3_next")."""

from __future__ import annotations

from dataclasses import dataclass

from mixbit.engine.fields import Fields
from mixbit.engine.layers.attention import AttentionConfig, attention
from mixbit.engine.layers.decoder import DecoderConfig, decoder
from mixbit.engine.layers.gated_delta import GatedDeltaConfig, fused_inputs, gated_delta
from mixbit.engine.layers.mlp import MoeConfig, mlp, moe
from mixbit.engine.rope import parse_rope
from mixbit.engine.weights import Weights
from mixbit.kernels.ops import Program, ProgramBuilder, Value


@dataclass(frozen=True, eq=False)
class Qwen3Next:
    """A gated delta net in `gated_delta.layers`, attention elsewhere; experts in all but `moe.dense_layers`."""

    frame: DecoderConfig
    attention: AttentionConfig
    gated_delta: GatedDeltaConfig
    moe: MoeConfig
    mlp_size: int
    context_length: int

    @classmethod
    def parse(cls, config: Fields) -> Qwen3Next:
        """Read config.json; raises CheckpointError for values that are missing, wrong or not supported."""
        head_dim = config.integer("head_dim")
        rope = parse_rope(config, head_dim, partial_rotary_factor=0.25)
        bias = config.boolean("attention_bias", False)
        return cls(
            frame=DecoderConfig.parse(config),
            attention=AttentionConfig.parse(
                config, head_dim=head_dim, rope=rope.rope, qkv_bias=bias, output_bias=bias, qk_norm=True, gated=True
            ),
            gated_delta=GatedDeltaConfig.parse(config),
            moe=MoeConfig.parse(config, shared=True, normalize=False),
            mlp_size=config.integer("intermediate_size"),
            context_length=rope.context_length,
        )

    def build(self, ops: ProgramBuilder, weights: Weights) -> Program:
        """Record the model's step, taking every tensor from `weights`."""

        def mixer(layer: int, path: str, x: Value) -> Value:
            if layer not in self.gated_delta.layers:
                return attention(ops, weights, f"{path}.self_attn", self.attention, x)
            path = f"{path}.linear_attn"
            inputs = fused_inputs(ops, weights, path, self.gated_delta, x)
            return gated_delta(ops, weights, path, self.gated_delta, inputs)

        def feed_forward(layer: int, path: str, x: Value) -> Value:
            if layer in self.moe.dense_layers:
                return mlp(ops, weights, f"{path}.mlp", self.mlp_size, x)
            return moe(ops, weights, f"{path}.mlp", self.moe, x)

        return decoder(ops, weights, self.frame, mixer, feed_forward)
