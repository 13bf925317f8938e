"""From a model directory to a program whose weights are mapped, resolved and checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mixbit.engine.checkpoint import Checkpoint, Progress, open_checkpoint
from mixbit.engine.errors import CheckpointError
from mixbit.engine.fields import Fields
from mixbit.engine.models import MODELS, supported_type
from mixbit.engine.quantization import Quantization, parse_quantization
from mixbit.engine.weights import Binding, Weights
from mixbit.kernels.ops import Program, ProgramBuilder

_UNSTACKED = re.compile(r"\.mlp\.experts\.(\d+\.|gate_up_proj)")


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model ready to compile. Weights are views of mapped files: nothing of them has been read yet.

    context_length: tokens, rope scaling included. weight_bytes: of the tensors the program uses.
    bindings: by the path of each matrix (its `name` in the program), how it was resolved.
    skipped: stored names of tensors left on purpose. warnings: for people, each a sentence.
    """

    model_type: str
    program: Program
    vocab_size: int
    context_length: int
    weight_bytes: int
    quantization: Quantization
    bindings: Mapping[str, Binding]
    skipped: tuple[str, ...]
    warnings: tuple[str, ...]
    checkpoint: Checkpoint


def load(path: Path, *, top_k_experts: int | None = None, progress: Progress | None = None) -> LoadedModel:
    """Open the model directory at `path`, resolve every tensor and record the program.

    top_k_experts replaces the model's experts per token. progress(stage, done, total) hears of each file.
    Raises CheckpointError, saying what is wrong where and what to do.
    """
    checkpoint = open_checkpoint(path, progress)
    model_type, config = _text_config(checkpoint)
    _refuse_unconverted(checkpoint, model_type)
    model = MODELS[model_type].parse(_override_top_k(config, top_k_experts))
    quantization = parse_quantization(checkpoint)
    weights = Weights(checkpoint, quantization)
    program = model.build(ProgramBuilder(), weights)
    weights.finish()
    unmatched = quantization.unmatched(set(weights.bindings))
    warnings = (f'the override "{key}" in config.json matches no matrix of the model; ignored' for key in unmatched)
    return LoadedModel(
        model_type=model_type,
        program=program,
        vocab_size=model.frame.vocab_size,
        context_length=model.context_length,
        weight_bytes=weights.nbytes,
        quantization=quantization,
        bindings=weights.bindings,
        skipped=(*checkpoint.skipped, *weights.skipped),
        warnings=(*quantization.warnings, *warnings),
        checkpoint=checkpoint,
    )


def _text_config(checkpoint: Checkpoint) -> tuple[str, Fields]:
    """The model type and the config of the text model: the whole file, or its `text_config`."""
    config = Fields(checkpoint.config, str(checkpoint.path / "config.json"))
    model_type = supported_type(config.get("model_type"))
    if model_type is None:
        raise config.error("model_type", f"one of the supported: {', '.join(MODELS)}")
    text = config.section("text_config") or config
    # Where the text model does not say, the whole does; and transformers writes the experts' count under two names.
    inherited = {
        "tie_word_embeddings": config.get("tie_word_embeddings"),
        "num_experts": text.get("num_local_experts"),
    }
    given = {name: value for name, value in text.values.items() if value is not None}
    return model_type, Fields({**inherited, **given}, text.source)


def _override_top_k(config: Fields, top_k: int | None) -> Fields:
    if top_k is None:
        return config
    if config.get("num_experts") is None:
        raise CheckpointError(f"the model has no experts, so that {top_k} active experts cannot be asked for")
    experts = config.integer("num_experts")
    if not 1 <= top_k <= experts:
        raise CheckpointError(f"{top_k} active experts were asked for; the model allows 1 to {experts}")
    return Fields({**config.values, "num_experts_per_tok": top_k}, config.source)


def _refuse_unconverted(checkpoint: Checkpoint, model_type: str) -> None:
    """Refuse the layout of transformers where it differs from MLX's: one tensor for each expert, norms stored
    around zero, convolutions as [channels, 1, kernel]. Dense models are the same in both."""
    for name, stored in checkpoint.tensors.items():
        convolution = name.endswith(".conv1d.weight") and len(stored.shape) == 3 and stored.shape[2] != 1
        if _UNSTACKED.search(name) or convolution:
            raise CheckpointError(
                f"{checkpoint.path}: a {model_type} checkpoint in the layout of transformers ({stored.name} "
                f"{stored.shape}); convert it first: mixbit convert {checkpoint.path} OUT/"
            )
