"""Loading whole checkpoints: what is bound, and every way in which weights and configuration can disagree."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixbit.engine.checkpoint import open_checkpoint
from mixbit.engine.errors import CheckpointError
from mixbit.engine.loader import load
from mixbit.engine.models import MODELS
from mixbit.kernels.ops import Embed, Mlp, Moe, Rows
from mixbit.kernels.spec import DenseTensor, QuantizedTensor
from tests.checkpoints import CONFIGS, edit_config, write_checkpoint, write_safetensors

GATE = "model.layers.0.mlp.gate"


@pytest.fixture
def qwen3_moe(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path, "qwen3_moe")


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(path, **options)
    return str(caught.value)


def edit_tensors(path: Path, edit: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = {tensor.name: tensor.array().copy() for tensor in open_checkpoint(path).tensors.values()}
    edit(tensors)
    write_safetensors(path / "model.safetensors", tensors)


def edit_quantization(path: Path, **changes: Any) -> None:
    section = json.loads((path / "config.json").read_text())["quantization"] | changes
    edit_config(path, quantization={key: value for key, value in section.items() if value != "remove"})


@pytest.mark.parametrize("model_type", CONFIGS)
def test_loads_every_model_type(tmp_path: Path, model_type: str) -> None:
    model = load(write_checkpoint(tmp_path, model_type))
    assert model.model_type == model_type
    assert model.vocab_size == model.program.logits.dim == CONFIGS[model_type]["vocab_size"]
    assert model.context_length == 512
    assert model.warnings == ()
    assert model.program.logits.rows is Rows.SELECTED
    stored = sum(tensor.nbytes for tensor in model.checkpoint.tensors.values())
    assert model.weight_bytes == stored


def test_every_model_has_a_checkpoint_to_test_with() -> None:
    assert MODELS.keys() == CONFIGS.keys()


def test_matrices_carry_their_own_widths(qwen3_moe: Path) -> None:
    model = load(qwen3_moe)
    moe = next(node for node in model.program.nodes if isinstance(node, Moe)).spec
    assert isinstance(moe.router, QuantizedTensor)
    assert (moe.router.name, moe.router.bits, moe.router.group_size) == (GATE, 8, 64)
    assert isinstance(moe.experts.gate, QuantizedTensor)
    assert (moe.experts.gate.bits, moe.experts.gate.experts) == (4, 8)
    assert model.bindings[GATE].origin == f'the override "{GATE}" in "quantization"'
    assert model.bindings["lm_head"].origin == '"quantization" of config.json'


def test_weights_are_views_of_the_file(qwen3_moe: Path) -> None:
    table = next(node for node in load(qwen3_moe).program.nodes if isinstance(node, Embed)).table
    assert isinstance(table, QuantizedTensor)
    assert not table.weight.flags.owndata
    assert not table.weight.flags.writeable


def test_layers_listed_as_dense_are_dense(qwen3_moe: Path) -> None:
    nodes = [node for node in load(qwen3_moe).program.nodes if isinstance(node, Mlp | Moe)]
    assert [type(node) for node in nodes] == [Moe, Mlp, Moe, Moe]


def test_unaligned_tensors_load(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "llama", dtype="bfloat16")
    edit_tensors(path, lambda tensors: None)
    data = path.joinpath("model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length] + b" " * (3 - length % 2)  # an odd start
    path.joinpath("model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    table = next(node for node in load(path).program.nodes if isinstance(node, Embed)).table
    assert isinstance(table, QuantizedTensor)
    assert not table.weight.flags.aligned


# --- the fault this project exists for ---


@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen3_next", "qwen3_5_moe"])
def test_gate_without_its_override_is_refused(tmp_path: Path, model_type: str) -> None:
    path = write_checkpoint(tmp_path, model_type)
    prefix = "language_model." if model_type == "qwen3_5_moe" else ""
    edit_quantization(path, **{prefix + GATE: "remove"})
    message = refusal(path)
    assert f"{prefix}{GATE}: " in message
    assert "claims 4 bits, group 64, but the tensors hold 8 bits, group 64" in message
    assert "weight (8, 32), scales (8, 2), rows of 128 values" in message
    assert f'set "{prefix}{GATE}": {{"group_size": 64, "bits": 8}}' in message


def test_override_that_claims_too_much(qwen3_moe: Path) -> None:
    edit_quantization(qwen3_moe, **{"model.layers.2.self_attn.q_proj": {"bits": 8}})
    assert "model.layers.2.self_attn.q_proj: " in refusal(qwen3_moe)
    assert "claims 8 bits, group 64, but the tensors hold 4 bits, group 64" in refusal(qwen3_moe)


def test_whole_section_missing(qwen3_moe: Path) -> None:
    edit_config(qwen3_moe, quantization=None, quantization_config=None)
    assert "model.embed_tokens: the tensors are quantized" in refusal(qwen3_moe)


def test_override_of_an_unquantized_module(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "llama", overrides={"model.layers.1.mlp.up_proj": None})
    load(path)
    edit_quantization(path, **{"model.layers.1.mlp.up_proj": True})
    assert "claims 4 bits, group 64, but model.layers.1.mlp.up_proj.scales is not stored" in refusal(path)


def test_override_without_effect_is_a_warning(qwen3_moe: Path) -> None:
    edit_quantization(qwen3_moe, **{"model.layers.9.mlp.gate": {"bits": 8}, "vision_tower.proj": {"bits": 8}})
    assert load(qwen3_moe).warnings == (
        'the override "model.layers.9.mlp.gate" in config.json matches no matrix of the model; ignored',
    )


# --- tensors that do not fit ---


@pytest.mark.parametrize("name", ["model.norm.weight", f"{GATE}.weight", f"{GATE}.biases", "lm_head.weight"])
def test_missing_tensor(qwen3_moe: Path, name: str) -> None:
    edit_tensors(qwen3_moe, lambda tensors: tensors.pop(name))
    assert f"{name} is missing" in refusal(qwen3_moe)


def test_missing_scales(qwen3_moe: Path) -> None:
    edit_tensors(qwen3_moe, lambda tensors: tensors.pop("lm_head.scales"))
    message = refusal(qwen3_moe)
    assert "lm_head.weight in model.safetensors: shape (384, 16) (packed codes, but no .scales beside them)" in message
    assert "implies (384, 128)" in message


def test_extra_tensors(qwen3_moe: Path) -> None:
    def add(tensors: dict[str, np.ndarray]) -> None:
        tensors |= {f"model.layers.{i}.mlp.gate.bias": np.zeros(8, np.float32) for i in range(5)}

    edit_tensors(qwen3_moe, add)
    message = refusal(qwen3_moe)
    assert "5 tensors belong to nothing in this model: model.layers.0.mlp.gate.bias" in message
    assert "and 1 more" in message


def test_layers_beyond_the_config(qwen3_moe: Path) -> None:
    edit_config(qwen3_moe, num_hidden_layers=3)
    assert "belong to nothing in this model: model.layers.3." in refusal(qwen3_moe)
    edit_config(qwen3_moe, num_hidden_layers=5)
    assert "tensor model.layers.4.input_layernorm.weight is missing" in refusal(qwen3_moe)


def test_sizes_that_lie(qwen3_moe: Path) -> None:
    edit_config(qwen3_moe, vocab_size=300)
    assert "model.embed_tokens: weight (384, 16) and scales (384, 2), but config.json implies (300,) rows" in refusal(
        qwen3_moe
    )
    edit_config(qwen3_moe, vocab_size=384, hidden_size=256)
    assert '"quantization" of config.json claims 4 bits, group 64, but the tensors hold 2 bits, group 128' in refusal(
        qwen3_moe
    )
    edit_config(qwen3_moe, hidden_size=100)
    assert "no width fits the shapes: weight (384, 16), scales (384, 2), rows of 100 values" in refusal(qwen3_moe)


def test_wrong_dtypes(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "llama")
    edit_tensors(path, lambda tensors: tensors.update({"model.norm.weight": np.zeros(128, np.int64)}))
    assert "model.norm.weight in model.safetensors has dtype I64" in refusal(path)
    edit_tensors(
        write_checkpoint(path, "llama"), lambda tensors: tensors.update({"model.norm.weight": np.zeros(128, np.uint8)})
    )
    assert "model.norm.weight: dtype uint8 is not one of float32" in refusal(path)
    edit_tensors(
        write_checkpoint(path, "llama"),
        lambda tensors: tensors.update({"lm_head.biases": tensors["lm_head.biases"].astype(np.float16)}),
    )
    assert "lm_head: dtype of scales float32 and biases float16 differ" in refusal(path)


def test_tied_head(tmp_path: Path) -> None:
    """Stored twice or once, said or not: the embedding is the head where there is no other or config.json says so."""
    path = write_checkpoint(tmp_path, "llama", bits=None)
    edit_config(path, tie_word_embeddings=True)
    assert load(path).skipped == ("lm_head.weight",)
    edit_tensors(path, lambda tensors: tensors.pop("lm_head.weight"))
    assert load(path).skipped == ()
    edit_config(path, tie_word_embeddings=None)
    assert "lm_head" not in load(path).bindings
    edit_config(path, tie_word_embeddings=False)
    assert "tensor lm_head.weight is missing" in refusal(path)


# --- experts per token ---


def test_active_experts_can_be_chosen(qwen3_moe: Path) -> None:
    def top_k(**options: Any) -> set[int]:
        nodes = load(qwen3_moe, **options).program.nodes
        return {node.spec.top_k for node in nodes if isinstance(node, Moe)}

    assert top_k() == {3}
    assert top_k(top_k_experts=8) == {8}
    assert "9 active experts were asked for; the model allows 1 to 8" in refusal(qwen3_moe, top_k_experts=9)
    assert "0 active experts" in refusal(qwen3_moe, top_k_experts=0)


def test_active_experts_of_a_dense_model(tmp_path: Path) -> None:
    assert "the model has no experts" in refusal(write_checkpoint(tmp_path, "llama"), top_k_experts=2)


def test_the_other_name_of_the_experts_count(qwen3_moe: Path) -> None:
    edit_config(qwen3_moe, num_experts=None, num_local_experts=8)
    assert load(qwen3_moe, top_k_experts=2).model_type == "qwen3_moe"
    edit_config(qwen3_moe, num_local_experts=None)
    assert "num_experts is missing" in refusal(qwen3_moe)


# --- layouts and types ---


def test_unconverted_experts_are_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "qwen3_moe", bits=None)

    def unstack(tensors: dict[str, np.ndarray]) -> None:
        stack = tensors.pop("model.layers.0.mlp.switch_mlp.up_proj.weight")
        tensors |= {f"model.layers.0.mlp.experts.{i}.up_proj.weight": matrix for i, matrix in enumerate(stack)}

    edit_tensors(path, unstack)
    message = refusal(path)
    assert (
        "a qwen3_moe checkpoint in the layout of transformers (model.layers.0.mlp.experts.0.up_proj.weight" in message
    )
    assert f"mixbit convert {path} OUT/" in message


def test_unconverted_convolution_is_refused(tmp_path: Path) -> None:
    """The convolution is the mark of norms stored around zero, which nothing else would show."""
    path = write_checkpoint(tmp_path, "qwen3_5", bits=None, vision=False)
    name = "model.layers.0.linear_attn.conv1d.weight"
    edit_tensors(path, lambda tensors: tensors.update({name: np.swapaxes(tensors[name], 1, 2).copy()}))
    assert f"in the layout of transformers ({name} (448, 1, 4))" in refusal(path)


def test_layout_of_transformers_is_the_same_for_dense_models(tmp_path: Path) -> None:
    model = load(write_checkpoint(tmp_path, "qwen2", bits=None, dtype="bfloat16"))
    assert model.quantization.source is None
    table = next(node for node in model.program.nodes if isinstance(node, Embed)).table
    assert isinstance(table, DenseTensor)


@pytest.mark.parametrize("model_type", ["gpt_oss", "Llama", "", 5, None])
def test_unsupported_model_type_lists_the_supported(qwen3_moe: Path, model_type: object) -> None:
    edit_config(qwen3_moe, model_type=model_type)
    message = refusal(qwen3_moe)
    assert "model_type is missing" in message if model_type is None else f"model_type is {model_type!r}" in message
    assert all(supported in message for supported in MODELS)


def test_text_model_of_a_vision_checkpoint(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "qwen3_5_moe")
    assert load(path).skipped == ("vision_tower.patch_embed.weight",)
    config = json.loads((path / "config.json").read_text())
    text = config.pop("text_config")
    assert text["model_type"] == "qwen3_5_moe_text"
    edit_config(path, text_config=None, **text)  # a text checkpoint keeps the type of the part
    assert load(path).model_type == "qwen3_5_moe"
    edit_config(path, text_config="x")
    assert "text_config is 'x'; expected an object" in refusal(path)
