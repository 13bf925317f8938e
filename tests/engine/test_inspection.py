"""Inspection agrees with the files: every byte accounted for, every width where it belongs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mixbit.engine.config import EngineConfig
from mixbit.engine.errors import CheckpointError
from mixbit.engine.inspection import Report, inspect_model
from mixbit.engine.protocol import TensorClass
from mixbit.engine.safetensors import open_safetensors
from tests.checkpoints import CONFIGS, edit_config, write_checkpoint

GB = 10**9


def by_role(report: Report, role: str) -> TensorClass:
    (found,) = [each for each in report.classes if each.role == role]
    return found


@pytest.mark.parametrize("model_type", list(CONFIGS))
def test_every_byte_is_counted_once(model_type: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", model_type, overrides={"*.0.*.down_proj": None, "*.1.*": (3, 32)})
    report = inspect_model(path, available=GB)
    stored = [t for t in open_safetensors(path / "model.safetensors").values() if "vision" not in t.name]
    assert report.size == report.memory.weights == sum(tensor.nbytes for tensor in stored)
    matrices = [t for t in stored if not t.name.endswith((".scales", ".biases"))]
    assert sum(each.count for each in report.classes) == len(matrices)
    document = json.loads(json.dumps(report.as_json()))
    assert document["size"] == sum(each["size"] for each in document["classes"])
    assert document["parameters"] == sum(each["parameters"] for each in document["classes"])


def test_demo_is_four_bits_with_an_eight_bit_embedding(demo_checkpoint: Path) -> None:
    report = inspect_model(demo_checkpoint, available=GB)
    embedding = by_role(report, "embedding and head")
    assert (embedding.bits, embedding.group_size, embedding.mode) == (8, 32, "affine")
    assert embedding.overrides == ("model.embed_tokens",)
    assert embedding.shape == (49152, 576)
    row = embedding.size // 49152
    assert embedding.token_bytes == embedding.size + row  # one row to embed, all of it for the logits
    assert {each.bits for each in report.classes if each.mode} - {8} == {4}
    assert by_role(report, "mlp gate/up").count == 60
    norm, final = by_role(report, "norm"), by_role(report, "final norm")
    assert (norm.count, norm.bits, norm.layers) == (60, None, tuple(range(30)))
    assert (final.count, final.layers) == (1, ())
    assert report.parameters == 134_515_008
    assert [(o.modules, o.sets, o.count) for o in report.overrides] == [("model.embed_tokens", "8 bits, group 32", 1)]
    # 30 layers, 3 KV heads of 64, keys and values, float32
    assert report.memory.cache_token == 30 * 2 * 3 * 64 * 4
    assert report.memory.full_context == 8192 * report.memory.cache_token
    assert report.memory.fits


def test_experts_count_as_far_as_a_token_reads_them(tmp_path: Path) -> None:
    report = inspect_model(write_checkpoint(tmp_path / "model", "qwen3_next"), available=GB)
    assert report.experts == (3, 8)
    experts, embedding = by_role(report, "experts gate/up"), by_role(report, "embedding")
    assert experts.shape == (8, 64, 128)
    assert experts.token_bytes * 8 == experts.size * 3
    assert embedding.token_bytes * 384 == embedding.size
    router, gate = by_role(report, "router"), by_role(report, "shared gate")
    assert (router.bits, router.shape, gate.bits, gate.shape) == (8, (8, 128), 8, (1, 128))
    assert len(router.overrides) == 4
    overrides = {o.modules: (o.sets, o.count) for o in report.overrides}
    assert overrides == {
        "model.layers.*.mlp.gate": ("8 bits, group 64", 4),
        "model.layers.*.mlp.shared_expert_gate": ("8 bits, group 64", 4),
    }
    assert report.layers == {"attention": 2, "delta net": 2, "experts": 4}
    assert {each.layers for each in report.classes if "attention" in each.role} == {(1, 3)}
    assert {each.layers for each in report.classes if "delta" in each.role} == {(0, 2)}
    # per delta net layer: 3 inputs of 448 channels, and 6 heads of 32 x 64, float32
    assert report.memory.state == 2 * 4 * (3 * 448 + 6 * 32 * 64)


def test_layers_of_other_widths_are_classes_of_their_own(tmp_path: Path) -> None:
    overrides = {"*.0.self_attn.q_proj": (3, 32), "*.1.self_attn.q_proj": None}
    report = inspect_model(write_checkpoint(tmp_path / "model", "llama", overrides=overrides), available=GB)
    queries = {(each.bits, each.group_size): each.layers for each in report.classes if each.role == "attention q"}
    assert queries == {(4, 64): (2,), (3, 32): (0,), (None, None): (1,)}
    assert {(o.sets, o.count) for o in report.overrides} == {("3 bits, group 32", 1), ("unquantized", 1)}


def test_what_is_skipped_and_what_does_not_fit(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", "qwen3_5")
    report = inspect_model(path, available=1000)
    assert report.skipped == {"vision_tower": 1}
    assert not report.memory.fits
    assert report.memory.tokens == 0


def test_a_config_that_lies_is_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", "llama")
    edit_config(path, quantization={"group_size": 32, "bits": 8})
    with pytest.raises(CheckpointError, match="claims 8 bits, group 32, but the tensors hold 4 bits, group 64"):
        inspect_model(path)


def test_experts_that_do_not_fit_are_told_with_a_prediction(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", "qwen3_moe", config={"num_experts": 32, "num_experts_per_tok": 4})
    config = EngineConfig(model=str(path), device="cpu", expert_bytes=400_000, cache_bytes=20_000_000)
    streaming = inspect_model(path, config=config).streaming
    assert streaming is not None
    experts = [each for each in inspect_model(path).classes if each.role.startswith("experts")]
    assert streaming.experts == sum(each.size for each in experts)
    assert streaming.token_bytes == sum(each.token_bytes for each in experts) == streaming.experts / 8
    assert (streaming.memory, streaming.resident) == (400_000, inspect_model(path).size - streaming.experts)
    left = 1 - streaming.memory / streaming.experts
    assert streaming.rate == pytest.approx(streaming.disk / (streaming.token_bytes * left))
    assert streaming.disk > 0
    assert inspect_model(path, config=EngineConfig(model=str(path), device="cpu")).streaming is None
