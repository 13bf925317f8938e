"""Configurations that a model file refuses, by name and value, and what it derives from the rest."""

from __future__ import annotations

from typing import Any

import pytest

from mixbit.engine.errors import CheckpointError
from mixbit.engine.fields import Fields
from mixbit.engine.models import MODELS
from mixbit.engine.models.qwen3_moe import Qwen3Moe
from mixbit.engine.models.qwen3_next import Qwen3Next
from tests.checkpoints import CONFIGS


def parse(model_type: str, **changes: Any) -> Any:
    return MODELS[model_type].parse(Fields({**CONFIGS[model_type], **changes}))


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"hidden_size": None}, "config.json: hidden_size is missing; expected an integer from 1"),
    ("llama", {"hidden_size": "128"}, "hidden_size is '128'; expected an integer"),
    ("llama", {"hidden_size": 128.0}, "hidden_size is 128.0; expected an integer"),
    ("llama", {"hidden_size": True}, "hidden_size is True; expected an integer"),
    ("llama", {"hidden_size": -1}, "hidden_size is -1; expected an integer"),
    ("llama", {"hidden_size": 2**40}, f"hidden_size is {2**40}; expected an integer from 1 to {2**31 - 1}"),
    ("llama", {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    ("llama", {"rms_norm_eps": "small"}, "rms_norm_eps is 'small'; expected a number"),
    ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    ("llama", {"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; expected 'silu' or 'swish': nothing else is supported"),
    ("llama", {"mlp_bias": True}, "mlp_bias is True; expected False"),
    ("llama", {"attention_bias": "yes"}, "attention_bias is 'yes'; expected true or false"),
    ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings is 1; expected true or false"),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads is 3; expected a divisor of num_attention_heads, 4"),
    (
        "llama",
        {"head_dim": None, "num_attention_heads": 3},
        "hidden_size is 128; expected a multiple of num_attention_",
    ),
    ("llama", {"head_dim": 2**20}, "head_dim 1048576"),
    ("llama", {"head_dim": 33}, "rotates 33 values; expected an even count"),
    ("llama", {"rope_traditional": True}, "rope_traditional is True"),
    (
        "llama",
        {"sliding_window": 64, "layer_types": ["sliding_attention"] * 3},
        "sliding_window is 64; expected none, or",
    ),
    ("qwen3", {"layer_types": 5}, "layer_types is 5; expected a list"),
    ("qwen2", {"rope_theta": None}, "rope_theta is missing; expected a number"),
    (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 64},
        "sliding_window is 64; expected none, or at least max",
    ),
    ("qwen3", {"head_dim": None}, "head_dim is missing"),
    ("qwen3_moe", {"num_experts": 0}, "num_experts is 0"),
    ("qwen3_moe", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9; expected an integer from 1 to 8"),
    ("qwen3_moe", {"norm_topk_prob": None}, "norm_topk_prob is missing"),
    ("qwen3_moe", {"mlp_only_layers": 3}, "mlp_only_layers is 3; expected a list of integers"),
    ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
    (
        "qwen3_next",
        {"linear_num_value_heads": 5},
        "linear_num_value_heads is 5; expected a multiple of linear_num_key_h",
    ),
    ("qwen3_next", {"layer_types": ["full_attention"]}, "layer_types is ['full_attention']; expected 4 times one of"),
    ("qwen3_next", {"layer_types": ["mamba"] * 4}, "expected 4 times one of linear_attention, full_attention"),
    ("qwen3_next", {"partial_rotary_factor": 1.5}, "with partial_rotary_factor 1.5 rotates 96 values"),
    ("qwen3_5_moe", {"shared_expert_intermediate_size": None}, "shared_expert_intermediate_size is missing"),
    ("qwen3_5_moe", {"mlp_only_layers": [1]}, "mlp_only_layers is [1]; expected []"),
]


@pytest.mark.parametrize(("model_type", "changes", "message"), REFUSED)
def test_refuses(model_type: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse(model_type, **changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("qwen2", {"use_sliding_window": False, "sliding_window": 64}),  # declared, not used
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3}),  # from layer 3 of 3 on
        ("qwen3", {"use_sliding_window": True, "sliding_window": 512}),  # as long as the context
        ("qwen3", {"layer_types": ["full_attention"] * 3, "sliding_window": 64}),
        ("llama", {"hidden_act": "swish"}),
    ],
)
def test_accepts(model_type: str, changes: dict[str, Any]) -> None:
    parse(model_type, **changes)


def test_dense_layers_of_a_mixture() -> None:
    def dense(**changes: Any) -> list[int]:
        model = parse("qwen3_moe", num_hidden_layers=6, **changes)
        assert isinstance(model, Qwen3Moe)
        return sorted(model.moe.dense_layers)

    assert dense(mlp_only_layers=[]) == []
    assert dense(mlp_only_layers=[0, 5]) == [0, 5]
    assert dense(mlp_only_layers=[3], decoder_sparse_step=2) == [0, 2, 3, 4]


def test_kinds_of_layers() -> None:
    def linear(**changes: Any) -> list[int]:
        model = parse("qwen3_next", **changes)
        assert isinstance(model, Qwen3Next)
        return sorted(model.gated_delta.layers)

    assert linear(full_attention_interval=None) == [0, 1, 2]  # every fourth is attention
    assert linear(full_attention_interval=3) == [0, 1, 3]
    kinds = ["full_attention", "linear_attention", "linear_attention", "full_attention"]
    assert linear(layer_types=kinds) == [1, 2]


def test_normalization_of_router_weights_has_the_default_of_its_family() -> None:
    assert parse("qwen3_next", norm_topk_prob=None).moe.normalize is False
    assert parse("qwen3_5_moe", norm_topk_prob=None).moe.normalize is True
