"""Model definitions over the op table, one file for each `model_type`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from mixbit.engine.fields import Fields
from mixbit.engine.layers.decoder import DecoderConfig
from mixbit.engine.models.llama import Llama
from mixbit.engine.models.qwen2 import Qwen2
from mixbit.engine.models.qwen3 import Qwen3
from mixbit.engine.models.qwen3_5 import Qwen35
from mixbit.engine.models.qwen3_5_moe import Qwen35Moe
from mixbit.engine.models.qwen3_moe import Qwen3Moe
from mixbit.engine.models.qwen3_next import Qwen3Next
from mixbit.engine.weights import Weights
from mixbit.kernels.ops import Program, ProgramBuilder


class Model(Protocol):
    """What a model file defines: a config that was checked, and the program it records."""

    @property
    def frame(self) -> DecoderConfig:
        """Sizes that every model has."""

    @property
    def context_length(self) -> int:
        """Tokens the positions reach."""

    @classmethod
    def parse(cls, config: Fields) -> Model:
        """Read config.json (the text model's part); raises CheckpointError."""

    def build(self, ops: ProgramBuilder, weights: Weights) -> Program:
        """Record the step; raises CheckpointError for tensors that do not fit."""


MODELS: Mapping[str, type[Model]] = {
    "llama": Llama,
    "qwen2": Qwen2,
    "qwen3": Qwen3,
    "qwen3_moe": Qwen3Moe,
    "qwen3_next": Qwen3Next,
    "qwen3_5": Qwen35,
    "qwen3_5_moe": Qwen35Moe,
}

# The text models of vision checkpoints carry a type of their own.
_SAME_TYPE = {"qwen3_5_text": "qwen3_5", "qwen3_5_moe_text": "qwen3_5_moe"}


def supported_type(model_type: object) -> str | None:
    """The key of MODELS that a checkpoint's model_type means, or None if it is not supported."""
    name = _SAME_TYPE.get(model_type, model_type) if isinstance(model_type, str) else None
    return name if name in MODELS else None
