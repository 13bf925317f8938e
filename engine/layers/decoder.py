"""The frame every model here shares: embedding, residual blocks of a mixer and a feed-forward, and the head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mixbit.engine.fields import Fields
from mixbit.engine.weights import Weights
from mixbit.kernels.ops import Program, ProgramBuilder, Value
from mixbit.kernels.spec import BatchMatvecSpec, Matrix

# A part of a block: (index of the layer, path of the layer, input [rows, hidden]) -> [rows, hidden].
Part = Callable[[int, str, Value], Value]


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of the frame. tied: the head is the embedding; None: it is if no lm_head is stored."""

    hidden_size: int
    layers: int
    vocab_size: int
    norm_eps: float
    tied: bool | None

    @classmethod
    def parse(cls, config: Fields) -> DecoderConfig:
        """Read from config.json."""
        config.require("hidden_act", ("silu", "swish"))
        return cls(
            hidden_size=config.integer("hidden_size"),
            layers=config.integer("num_hidden_layers", maximum=10_000),
            vocab_size=config.integer("vocab_size"),
            norm_eps=config.number("rms_norm_eps", 1e-6),
            tied=None if config.get("tie_word_embeddings") is None else config.boolean("tie_word_embeddings"),
        )


def decoder(ops: ProgramBuilder, weights: Weights, config: DecoderConfig, mixer: Part, feed_forward: Part) -> Program:
    """Pre-norm blocks: x += mixer(norm(x)); x += feed_forward(norm(x)); logits = head(norm(x))."""
    size, eps = config.hidden_size, config.norm_eps
    table = weights.matrix("model.embed_tokens", config.vocab_size, size)
    x = ops.embed(table)
    h = ops.rms_norm(x, weights.norm("model.layers.0.input_layernorm", size, eps))
    for layer in range(config.layers):
        path, last = f"model.layers.{layer}", layer == config.layers - 1
        delta = mixer(layer, path, h)
        if last:  # from here on, rows whose logits nobody asks for have no effect
            x, delta = ops.select_rows(x), ops.select_rows(delta)
        x, h = ops.add_norm(x, delta, weights.norm(f"{path}.post_attention_layernorm", size, eps))
        delta = feed_forward(layer, path, h)
        following = "model.norm" if last else f"model.layers.{layer + 1}.input_layernorm"
        x, h = ops.add_norm(x, delta, weights.norm(following, size, eps))
    (logits,) = ops.batch_matvec(h, _head(weights, config, table))
    return ops.build(logits)


def _head(weights: Weights, config: DecoderConfig, table: Matrix) -> BatchMatvecSpec:
    tied = "lm_head.weight" not in weights if config.tied is None else config.tied
    if not tied:
        return weights.linear("lm_head", config.vocab_size, config.hidden_size)
    weights.skip("lm_head.")  # some checkpoints store the tied matrix a second time
    return BatchMatvecSpec(table)
