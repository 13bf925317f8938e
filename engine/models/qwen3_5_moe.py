"""Qwen3.5 MoE: Qwen3.5's mixers and experts with a shared expert in every layer (model_type "qwen3_5_moe")."""

from __future__ import annotations

from dataclasses import dataclass

from mixbit.engine.fields import Fields
from mixbit.engine.layers.attention import AttentionConfig, attention
from mixbit.engine.layers.decoder import DecoderConfig, decoder
from mixbit.engine.layers.gated_delta import GatedDeltaConfig, gated_delta, separate_inputs
from mixbit.engine.layers.mlp import MoeConfig, moe
from mixbit.engine.rope import parse_rope
from mixbit.engine.weights import Weights
from mixbit.kernels.ops import Program, ProgramBuilder, Value


@dataclass(frozen=True, eq=False)
class Qwen35Moe:
    """A gated delta net in `gated_delta.layers`, gated attention elsewhere; experts in every layer."""

    frame: DecoderConfig
    attention: AttentionConfig
    gated_delta: GatedDeltaConfig
    moe: MoeConfig
    context_length: int

    @classmethod
    def parse(cls, config: Fields) -> Qwen35Moe:
        """Read the text config; raises CheckpointError for values that are missing, wrong or not supported."""
        config.require("decoder_sparse_step", (1,))
        config.require("mlp_only_layers", ([],))
        head_dim = config.integer("head_dim")
        rope = parse_rope(config, head_dim, partial_rotary_factor=0.25)
        bias = config.boolean("attention_bias", False)
        return cls(
            frame=DecoderConfig.parse(config),
            attention=AttentionConfig.parse(
                config, head_dim=head_dim, rope=rope.rope, qkv_bias=bias, output_bias=bias, qk_norm=True, gated=True
            ),
            gated_delta=GatedDeltaConfig.parse(config),
            moe=MoeConfig.parse(config, shared=True, normalize=True),
            context_length=rope.context_length,
        )

    def build(self, ops: ProgramBuilder, weights: Weights) -> Program:
        """Record the model's step, taking every tensor from `weights`."""

        def mixer(layer: int, path: str, x: Value) -> Value:
            if layer not in self.gated_delta.layers:
                return attention(ops, weights, f"{path}.self_attn", self.attention, x)
            path = f"{path}.linear_attn"
            inputs = separate_inputs(ops, weights, path, self.gated_delta, x)
            return gated_delta(ops, weights, path, self.gated_delta, inputs)

        def feed_forward(layer: int, path: str, x: Value) -> Value:
            return moe(ops, weights, f"{path}.mlp", self.moe, x)

        return decoder(ops, weights, self.frame, mixer, feed_forward)
