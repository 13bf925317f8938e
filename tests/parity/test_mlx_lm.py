"""Logits of every model type against mlx-lm, from the same mixed-precision checkpoint, in float32 on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from mlx_lm.utils import load_model

from mixbit.engine.loader import load
from mixbit.kernels.ops import Program
from mixbit.kernels.registry import choose
from tests.checkpoints import CONFIGS, ROUTERS_AT_8_BITS, VOCAB_SIZE, Width, write_checkpoint
from tests.sequence import Sequence

FloatArray = npt.NDArray[np.float32]

# Widest difference of a logit, as a share of the logits' standard deviation. Seen: up to 5e-5.
TOLERANCE = 1e-4

BACKENDS = ("reference", "cpu", "mlx-cpu")

# On top of 4 bits, group 64: every width, every group size, and unquantized layers.
MIXED: Mapping[str, Width | None] = {
    **ROUTERS_AT_8_BITS,
    "model.embed_tokens": (8, 32),
    "lm_head": (6, 128),
    "model.layers.0.*.q_proj": (2, 32),
    "model.layers.0.*.in_proj_qkv*": (2, 32),
    "model.layers.0.mlp.up_proj": (5, 128),
    "model.layers.0.mlp.switch_mlp.up_proj": (5, 128),
    "model.layers.1.mlp.down_proj": (3, 64),
    "model.layers.1.mlp.switch_mlp.down_proj": (3, 32),
    "model.layers.1.*.v_proj": (6, 64),
    "model.layers.2.mlp.*gate_proj": (1, 128),
    "model.layers.2.*.o_proj": None,
    "model.layers.2.*.out_proj": None,
    "model.layers.2.mlp.switch_mlp.down_proj": None,
    "model.layers.2.mlp.gate": None,
}

TOKENS = [int(token) for token in np.random.default_rng(7).integers(0, VOCAB_SIZE, 37)]


@dataclass(frozen=True)
class Case:
    """A checkpoint, what mlx-lm says of TOKENS: logits [tokens, vocab], hidden states [tokens, dim]; our program."""

    expected: FloatArray
    hidden: FloatArray
    program: Program


def mlx_lm_outputs(directory: Path, tokens: list[int]) -> tuple[FloatArray, FloatArray]:
    """Logits, and the hidden states after the final norm."""
    with mx.stream(mx.cpu):
        model, _ = load_model(directory)
        body: Any = getattr(model, "language_model", model).model  # type: ignore[union-attr]
        outputs = model(mx.array([tokens])), body(mx.array([tokens]))
        logits, hidden = (np.array(each[0].astype(mx.float32)) for each in outputs)
        return logits, hidden


def difference(actual: FloatArray, expected: FloatArray) -> float:
    return float(np.abs(actual - expected).max() / expected.std())


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    """Checkpoints by model type and options; each is written and asked of mlx-lm once."""
    made: dict[str, Case] = {}

    def get(model_type: str, **options: Any) -> Case:
        key = f"{model_type} {options}"
        if key not in made:
            directory = tmp_path_factory.mktemp(model_type)
            write_checkpoint(directory, model_type, **{"overrides": MIXED, **options})
            model = load(directory)
            assert model.warnings == ()
            made[key] = Case(*mlx_lm_outputs(directory, TOKENS), model.program)
        return made[key]

    return get


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model_type", CONFIGS)
def test_prefill_in_one_piece(case: Callable[..., Case], model_type: str, backend: str) -> None:
    expected, program = case(model_type).expected, case(model_type).program
    sequence = Sequence(choose(backend).backend, program, len(TOKENS))
    assert difference(sequence.run(TOKENS), expected) < TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model_type", CONFIGS)
def test_prefill_in_chunks_then_step_by_step(case: Callable[..., Case], model_type: str, backend: str) -> None:
    """Chunks of 2, 17 and 1 tokens (less than the convolution's window, across a block, single), then steps.
    The first chunk asks for no logits at all, as a scheduler does in the middle of a prompt."""
    expected, program = case(model_type).expected, case(model_type).program
    sequence = Sequence(choose(backend).backend, program, len(TOKENS))
    assert sequence.run(TOKENS[:2], []).shape == (0, VOCAB_SIZE)
    logits = [sequence.run(TOKENS[2:19]), sequence.run(TOKENS[19:20])]
    logits += [sequence.run(TOKENS[i : i + 1]) for i in range(20, len(TOKENS))]
    assert difference(np.concatenate(logits), expected[2:]) < TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model_type", CONFIGS)
def test_hidden_states_whole_and_in_chunks(case: Callable[..., Case], model_type: str, backend: str) -> None:
    made = case(model_type)
    sequence = Sequence(choose(backend).backend, made.program, len(TOKENS))
    assert difference(sequence.hidden_states(TOKENS), made.hidden) < TOLERANCE
    sequence.reset()
    chunks = [sequence.hidden_states(TOKENS[:2]), sequence.hidden_states(TOKENS[2:20])]
    chunks.append(sequence.hidden_states(TOKENS[20:]))
    assert difference(np.concatenate(chunks), made.hidden) < TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_new_sequence_starts_from_nothing(case: Callable[..., Case], backend: str) -> None:
    """The same blocks and state slot, used before by other tokens."""
    expected, program = case("qwen3_next").expected, case("qwen3_next").program
    sequence = Sequence(choose(backend).backend, program, len(TOKENS))
    sequence.run(TOKENS[::-1])
    sequence.reset()
    assert difference(sequence.run(TOKENS), expected) < TOLERANCE


ROPE_FORMS: Mapping[str, dict[str, Any]] = {
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama3": {
        "max_position_embeddings": 131072,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    "yarn with mscale": {
        "rope_scaling": {
            "type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 16,
            "beta_slow": 2,
            "mscale": 0.7,
            "mscale_all_dim": 0.4,
        }
    },
}


@pytest.mark.parametrize("form", ROPE_FORMS)
def test_rope_scaling(case: Callable[..., Case], form: str) -> None:
    made = case("llama", config=ROPE_FORMS[form])
    assert difference(Sequence(choose("reference").backend, made.program, 64).run(TOKENS), made.expected) < TOLERANCE
    plain = case("llama")
    assert difference(plain.expected, made.expected) > 0.05, "the rotation has to matter"


VARIANTS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "tied, unquantized": ("llama", {"bits": None, "config": {"tie_word_embeddings": True}}),
    "tied, quantized embedding": ("qwen3", {"config": {"tie_word_embeddings": True}}),
    "biases on q, k, v and o": ("llama", {"config": {"attention_bias": True}}),
    "every second layer sparse": ("qwen3_moe", {"config": {"decoder_sparse_step": 2, "mlp_only_layers": [0, 2]}}),
    "weights of the experts not normalized": ("qwen3_moe", {"config": {"norm_topk_prob": False}}),
    "weights of the experts normalized": ("qwen3_next", {"config": {"norm_topk_prob": True}}),
    "experts unquantized": ("qwen3_next", {"overrides": {**MIXED, "*.switch_mlp.*": None}}),
    "nothing quantized": ("qwen3_5_moe", {"bits": None}),
    "shards": ("qwen3_5_moe", {"shards": 3}),
    "text model alone": ("qwen3_5", {"vision": False}),
    "small q and k, where epsilon counts": ("qwen3_next", {"factors": {"*.conv1d.weight": 0.003}}),
    "three delta nets before attention": ("qwen3_5", {"config": {"full_attention_interval": 4}}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant(case: Callable[..., Case], variant: str) -> None:
    model_type, options = VARIANTS[variant]
    made = case(model_type, **options)
    sequence = Sequence(choose("reference").backend, made.program, len(TOKENS))
    assert difference(sequence.run(TOKENS), made.expected) < TOLERANCE
