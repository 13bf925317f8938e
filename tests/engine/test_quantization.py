"""What a quantization section claims, in every form, and how shapes confirm or contradict it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mixbit.engine.checkpoint import Checkpoint
from mixbit.engine.errors import CheckpointError
from mixbit.engine.quantization import Quantization, Scheme, parse_quantization
from tests.checkpoints import write_json

GATE = "model.layers.0.mlp.gate"


def parse(config: dict[str, Any], path: Path = Path("model")) -> Quantization:
    return parse_quantization(Checkpoint(path, config, {}, {}, ()))


def resolve(section: dict[str, Any], bits: int, group: int, *, path: str = GATE, in_dim: int = 256) -> Scheme:
    """The scheme of a tensor of 8 rows stored at `bits` and `group`."""
    shapes = (8, in_dim * bits // 32), (8, in_dim // group)
    return parse({"quantization": section}).resolve(path, path, *shapes, in_dim)[0]


def refusal(section: Any, bits: int = 4, group: int = 64, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        resolve(section, bits, group, **options)
    return str(caught.value)


ALL = {"group_size": 64, "bits": 4}


@pytest.mark.parametrize(
    ("section", "bits", "group"),
    [
        ({"group_size": 64, "bits": 4}, 4, 64),
        ({"group_size": 64, "bits": 4, "mode": "affine"}, 4, 64),
        ({**ALL, GATE: {"group_size": 64, "bits": 8}}, 8, 64),
        ({**ALL, GATE: {"bits": 8}}, 8, 64),  # an override without group_size means 64
        ({"group_size": 32, "bits": 4, GATE: {"bits": 8}}, 8, 64),  # whatever the rest has
        ({**ALL, GATE: {"group_size": 32}}, 2, 32),  # without bits: the shapes say
        ({**ALL, GATE: True}, 4, 64),
        ({**ALL, GATE: {"group_size": 128, "bits": 3, "mode": "affine"}}, 3, 128),
        ({**ALL, "model.layers.1.mlp.gate": {"bits": 8}}, 4, 64),
        ({**ALL, f"language_model.{GATE}": {"bits": 8}}, 8, 64),
        ({**ALL, "model.language_model.layers.0.mlp.gate": {"bits": 8}}, 8, 64),
        ({"bits": 5}, 5, 32),  # no group size claimed anywhere
        ({"group_size": 32}, 1, 32),
        ({}, 6, 128),
        ({**ALL, "vision_tower.blocks.0": {"bits": 7}}, 4, 64),  # of no concern
    ],
)
def test_resolves(section: dict[str, Any], bits: int, group: int) -> None:
    assert resolve(section, bits, group) == Scheme(bits, group)


def test_the_same_product_of_bits_and_group_is_told_apart() -> None:
    """2 bits at 128, 4 at 64 and 8 at 32 give scales and words in one proportion; the length of a row decides."""
    for bits, group in ((2, 128), (4, 64), (8, 32)):
        assert resolve({}, bits, group) == Scheme(bits, group)


@pytest.mark.parametrize(
    ("config", "source", "bits"),
    [
        ({"quantization": {"bits": 4}, "quantization_config": {"bits": 8}}, "quantization", 4),
        ({"quantization_config": {"bits": 8}}, "quantization_config", 8),
        ({"quantization": None, "quantization_config": {"bits": 8}}, "quantization_config", 8),
        ({"text_config": {"quantization": {"bits": 3}}}, "text_config.quantization", 3),
        ({"text_config": {"quantization": {"bits": 3}}, "quantization": {"bits": 2}}, "quantization", 2),
        (
            {"text_config": {"quantization": {"bits": 3}}, "quantization_config": {"bits": 2}},
            "text_config.quantization",
            3,
        ),
        ({"text_config": {"quantization_config": {"bits": 6}}}, "text_config.quantization_config", 6),
        ({}, None, None),
    ],
)
def test_the_section_that_counts(config: dict[str, Any], source: str | None, bits: int | None) -> None:
    quantization = parse(config)
    assert quantization.source == source
    assert quantization.default.bits == bits


def test_the_claim_that_applied_is_named() -> None:
    quantization = parse({"quantization": {**ALL, f"language_model.{GATE}": {"bits": 8}}})
    assert quantization.resolve(GATE, GATE, (8, 64), (8, 4), 256)[1].origin == (
        f'the override "language_model.{GATE}" in "quantization"'
    )
    assert quantization.resolve("lm_head", "lm_head", (8, 32), (8, 4), 256)[1].origin == '"quantization" of config.json'


def test_conflict_names_tensor_claims_shapes_and_remedy() -> None:
    message = refusal(ALL, bits=8)
    assert message == (
        f'{GATE}: "quantization" of config.json claims 4 bits, group 64, but the tensors hold 8 bits, group 64: '
        "weight (8, 64), scales (8, 4), rows of 256 values. "
        f'If the tensors are right, set "{GATE}": {{"group_size": 64, "bits": 8}} in "quantization" of config.json'
    )


@pytest.mark.parametrize(
    ("section", "bits", "group", "expected"),
    [
        (ALL, 4, 32, "claims 4 bits, group 64, but the tensors hold 4 bits, group 32"),
        ({**ALL, GATE: {"bits": 8}}, 4, 64, f'the override "{GATE}" in "quantization" claims 8 bits, group 64, but'),
        ({**ALL, GATE: {"bits": 8}}, 8, 32, "claims 8 bits, group 64, but the tensors hold 8 bits, group 32"),
        ({**ALL, GATE: False}, 4, 64, "claims unquantized, but the tensors hold 4 bits, group 64"),
        ({**ALL, GATE: True}, 8, 64, "claims 4 bits, group 64, but the tensors hold 8 bits"),
        ({}, 7, 64, "7 bits, group 64 (weight (8, 56), scales (8, 4), rows of 256 values) is not supported"),
        ({}, 4, 16, "4 bits, group 16"),
    ],
)
def test_conflict(section: dict[str, Any], bits: int, group: int, expected: str) -> None:
    message = refusal(section, bits, group)
    assert expected in message
    assert message.startswith(GATE)
    assert f"scales (8, {256 // group})" in message


def test_scales_without_any_section() -> None:
    with pytest.raises(CheckpointError, match=r"quantized .* but config\.json has no quantization section"):
        parse({}).resolve(GATE, GATE, (8, 32), (8, 4), 256)


@pytest.mark.parametrize(("weight", "scales"), [((8, 33), (8, 4)), ((8, 32), (8, 3)), ((8, 32), (8, 0))])
def test_shapes_that_no_width_explains(weight: tuple[int, ...], scales: tuple[int, ...]) -> None:
    with pytest.raises(CheckpointError, match=r"no width fits the shapes: weight \(8, .*rows of 256 values"):
        parse({"quantization": ALL}).resolve(GATE, GATE, weight, scales, 256)


def test_override_without_scales() -> None:
    quantization = parse({"quantization": {**ALL, GATE: {"bits": 8}, "lm_head": False}})
    with pytest.raises(CheckpointError, match=rf"claims 8 bits, group 64, but {GATE}\.scales is not stored"):
        quantization.check_unquantized(GATE, GATE, (8, 256))
    quantization.check_unquantized("lm_head", "lm_head", (8, 256))
    quantization.check_unquantized("model.embed_tokens", "model.embed_tokens", (8, 256))


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"group_size": 64, "bits": 7}, "bits is 7; supported: 1, 2, 3, 4, 5, 6, 8"),
        ({"group_size": 64, "bits": "4"}, "bits is '4'"),
        ({"group_size": 64, "bits": True}, "bits is True"),
        ({"group_size": 64, "bits": 4.0}, "bits is 4.0"),
        ({"group_size": 16, "bits": 4}, "group_size is 16; supported: 32, 64, 128"),
        ({**ALL, GATE: {"bits": 7}}, f'the override "{GATE}" in "quantization": bits is 7'),
        ({**ALL, "mode": "mxfp4"}, "mode 'mxfp4' is known, but has no kernel here; supported: affine"),
        ({**ALL, "mode": "nvfp4", "group_size": 16}, "mode 'nvfp4' is known, but has no kernel"),
        ({**ALL, GATE: {"bits": 8, "group_size": 32, "mode": "mxfp8"}}, "mode 'mxfp8' is known"),
        ({**ALL, "mode": "int4"}, "mode 'int4' is unknown; supported: affine"),
        ({**ALL, "mode": 4}, "mode 4 is unknown"),
        ({**ALL, GATE: 8}, f"quantization: {GATE} is 8; expected an object, true or false"),
        ({**ALL, GATE: None}, f"quantization: {GATE} is None"),
        ({**ALL, "quant_method": "gptq"}, "quant_method 'gptq' is not supported"),
        (
            {**ALL, GATE: {"bits": 8}, f"language_model.{GATE}": {"bits": 6}},
            f"{GATE} claims 8 bits, group 64 and language_model.{GATE} claims 6 bits, group 64",
        ),
        ([4], "quantization is [4]; expected an object"),
    ],
)
def test_values_that_no_kernel_implements(section: Any, expected: str) -> None:
    assert expected in refusal(section)


def test_overrides_that_match_nothing_are_told() -> None:
    quantization = parse({"quantization": {**ALL, "language_model.model.old": {"bits": 8}, GATE: True, "extra": 3}})
    assert quantization.unmatched({GATE, "lm_head"}) == ("language_model.model.old",)
    assert quantization.warnings == ("quantization: extra = 3 is not a setting known here; ignored",)


def test_model_opt_is_named(tmp_path: Path) -> None:
    write_json(tmp_path / "hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4"}})
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json: ModelOpt quantization 'NVFP4' is not supported"):
        parse({}, tmp_path)
    assert parse({"quantization": ALL}, tmp_path).default.bits == 4
