"""Logits of tiny unquantized models against transformers: an oracle that shares no code with MLX.

Models are made from transformers' own configurations, saved by it, converted where its layout differs from
MLX's, and loaded from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch  # type: ignore[import-not-found]
from transformers import AutoConfig, AutoModelForCausalLM

from mixbit.engine.convert.requantize import ConvertOptions, convert_checkpoint
from mixbit.engine.errors import CheckpointError
from mixbit.engine.loader import load
from mixbit.kernels.registry import choose
from tests.checkpoints import CONFIGS, VOCAB_SIZE
from tests.sequence import Sequence

# Of the logits' standard deviation. Seen: 2e-5, and 1e-4 with delta nets, whose prefill transformers sums in chunks.
TOLERANCE = 4e-4
TOKENS = [int(token) for token in np.random.default_rng(3).integers(0, VOCAB_SIZE, 40)]

_TEXT_TYPES = {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}
_CONVERTED = {"qwen3_moe", "qwen3_next", "qwen3_5", "qwen3_5_moe"}


def randomize(model: torch.nn.Module) -> None:
    """Every parameter away from its initial value, at a scale that keeps logits distinct."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.2 * noise)
            elif "conv1d" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(1.5 * noise / parameter.shape[-1] ** 0.5)


def make(directory: Path, model_type: str, changes: Mapping[str, Any]) -> tuple[Path, npt.NDArray[np.float32]]:
    """(a directory that our loader takes, transformers' logits of TOKENS)."""
    config = AutoConfig.for_model(_TEXT_TYPES.get(model_type, model_type), **{**CONFIGS[model_type], **changes})
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_config(config, **options).eval()  # type: ignore[no-untyped-call]
    randomize(model)
    model.save_pretrained(directory / "saved")
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS])).logits[0].numpy()
    if model_type not in _CONVERTED:
        return directory / "saved", logits
    with pytest.raises(CheckpointError, match="in the layout of transformers"):
        load(directory / "saved")
    convert_checkpoint(directory / "saved", directory / "mlx", ConvertOptions(), progress=lambda *step: None)
    return directory / "mlx", logits


CASES: Mapping[str, tuple[str, dict[str, Any]]] = {
    **{model_type: (model_type, {}) for model_type in CONFIGS},
    "tied embeddings": ("qwen2", {"tie_word_embeddings": True}),
    "attention biases": ("qwen3", {"attention_bias": True}),
    "sparse every second layer": ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [0]}),
    "experts not normalized": ("qwen3_moe", {"norm_topk_prob": False}),
    "experts normalized": ("qwen3_next", {"norm_topk_prob": True}),
    "linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
    "llama3 rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "yarn rope": (
        "qwen3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "yarn rope, all settings": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "attention_factor": 1.2,
                "truncate": False,
            }
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_logits(case: str, tmp_path: Path) -> None:
    directory, expected = make(tmp_path, *CASES[case])
    program = load(directory).program
    for backend in ("reference", "cpu"):
        sequence = Sequence(choose(backend).backend, program, len(TOKENS))
        logits = np.concatenate([sequence.run(TOKENS[:30]), *(sequence.run([token]) for token in TOKENS[30:])])
        assert np.abs(logits - expected).max() < TOLERANCE * expected.std(), backend
