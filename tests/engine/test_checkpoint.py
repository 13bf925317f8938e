"""Model directories: shards, missing and doubled parts, and which tensors belong to the text model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mixbit.engine.checkpoint import INDEX_FILE, open_checkpoint, text_name
from mixbit.engine.errors import CheckpointError
from tests.checkpoints import write_checkpoint, write_json, write_safetensors


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", "llama", shards=3, config={"num_hidden_layers": 1})


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ("model.layers.0.mlp.gate.weight", "model.layers.0.mlp.gate.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("language_model.model.layers.0.mlp.gate.scales", "model.layers.0.mlp.gate.scales"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("model.language_model.layers.0.mlp.gate.weight", "model.layers.0.mlp.gate.weight"),
        ("vision_tower.blocks.0.attn.qkv.weight", None),
        ("model.visual.blocks.0.attn.qkv.weight", None),
        ("mtp.layers.0.mlp.gate.weight", None),
        ("language_model.mtp.fc.weight", None),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", None),
        ("model.layers.0.mlp.mtp_like.weight", "model.layers.0.mlp.mtp_like.weight"),
    ],
)
def test_names_within_the_text_model(stored: str, expected: str | None) -> None:
    assert text_name(stored) == expected


def test_opens_shards_and_keeps_the_stored_names(sharded: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    checkpoint = open_checkpoint(sharded, lambda *step: seen.append(step))
    assert checkpoint.tensors["model.norm.weight"].shape == (128,)
    assert {tensor.file.name for tensor in checkpoint.tensors.values()} == {
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    }
    assert checkpoint.generation_config["temperature"] == 0.7
    assert seen == [("opening weights", i, 3) for i in range(4)]


def test_parts_of_other_models_are_listed(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, "qwen3_5"))
    assert checkpoint.skipped == ("vision_tower.patch_embed.weight",)
    assert checkpoint.tensors["lm_head.weight"].name == "language_model.lm_head.weight"


def test_shards_without_an_index(sharded: Path) -> None:
    whole = open_checkpoint(sharded).tensors.keys()
    (sharded / INDEX_FILE).unlink()
    assert open_checkpoint(sharded).tensors.keys() == whole
    (sharded / "model-00003-of-00003.safetensors").unlink()
    assert "1 of 3 weight files are missing (model-00003-of-00003.safetensors)" in refusal(sharded)


def test_missing_generation_config_is_empty(sharded: Path) -> None:
    (sharded / "generation_config.json").unlink()
    assert open_checkpoint(sharded).generation_config == {}


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    assert "1 of 3 weight files are missing (model-00002-of-00003.safetensors)" in refusal(sharded)


def test_index_that_names_the_wrong_shard(sharded: Path) -> None:
    index = json.loads((sharded / INDEX_FILE).read_text())
    index["weight_map"]["model.norm.weight"] = "model-00003-of-00003.safetensors"
    write_json(sharded / INDEX_FILE, index)
    assert "places tensor model.norm.weight in model-00003-of-00003.safetensors, which does not hold it" in refusal(
        sharded
    )


def test_index_that_names_a_tensor_nobody_stores(sharded: Path) -> None:
    index = json.loads((sharded / INDEX_FILE).read_text())
    index["weight_map"]["model.extra.weight"] = "model-00001-of-00003.safetensors"
    write_json(sharded / INDEX_FILE, index)
    assert "places tensor model.extra.weight" in refusal(sharded)


@pytest.mark.parametrize("place", ["../secret.safetensors", "/etc/passwd", "model.bin", 5, None])
def test_index_that_leaves_the_directory(sharded: Path, place: object) -> None:
    write_json(sharded / INDEX_FILE, {"weight_map": {"a": place}})
    assert f"tensor a is placed in {place!r}, which is not a .safetensors file here" in refusal(sharded)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["a"]}])
def test_index_without_a_weight_map(sharded: Path, index: object) -> None:
    write_json(sharded / INDEX_FILE, index)
    assert "no weight_map" in refusal(sharded)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {})
    for i in (1, 2):
        write_safetensors(tmp_path / f"model-0000{i}-of-00002.safetensors", {"a": np.zeros(2, np.float32)})
    message = refusal(tmp_path)
    assert "tensor a is stored twice, in model-00001-of-00002.safetensors and model-00002-of-00002" in message


def test_two_tensors_of_one_name(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {})
    zeros = np.zeros(2, np.float32)
    write_safetensors(tmp_path / "model.safetensors", {"language_model.lm_head.weight": zeros, "lm_head.weight": zeros})
    assert "language_model.lm_head.weight and lm_head.weight are both lm_head.weight" in refusal(tmp_path)


def test_not_a_model_directory(tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent") == f"{tmp_path / 'absent'}: no such directory"
    (tmp_path / "notes.txt").write_text("")
    assert "not a model directory: it has no config.json (found: notes.txt)" in refusal(tmp_path)
    gguf = tmp_path / "model.gguf"
    gguf.write_text("")
    assert f"convert it first: mixbit convert {gguf} OUT/" in refusal(gguf)


def test_directory_without_weights(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {})
    assert "it has a config.json but no model*.safetensors" in refusal(tmp_path)
    (tmp_path / "pytorch_model.bin").write_text("")
    assert "found pytorch_model.bin, a format that is not loaded" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json: not valid JSON"),
        ("", "config.json: not valid JSON"),
        ("[1]", "config.json: expected a JSON object, found list"),
        ("[" * 100_000, "config.json: not valid JSON"),
        ("\udcff", "config.json: not valid JSON"),
    ],
)
def test_config_that_is_not_an_object(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert message in refusal(tmp_path)
