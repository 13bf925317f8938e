"""Frequencies of every rope type; parity with mlx-lm is tested on whole models in tests/parity."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from mixbit.engine.errors import CheckpointError
from mixbit.engine.fields import Fields
from mixbit.engine.rope import RopeConfig, parse_rope

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def parse(head_dim: int = 128, **config: Any) -> RopeConfig:
    return parse_rope(Fields({"max_position_embeddings": 4096, "rope_theta": 10000.0, **config}), head_dim)


def plain(count: int, rotated: int, theta: float = 10000.0) -> np.ndarray:
    return np.array([theta ** (-2 * i / rotated) for i in range(count)])


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"rope_scaling": None},
        {"rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "rope_theta": None},
        {"rope_parameters": {"rope_theta": 10000.0}, "rope_theta": 5.0},
        {"rope_parameters": {"rope_type": "mrope", "mrope_section": [24, 20, 20]}},
        {"rope_scaling": {"type": "default"}, "rope_parameters": {}},
    ],
)
def test_default(config: dict[str, Any]) -> None:
    found = parse(**config)
    np.testing.assert_allclose(found.rope.inv_freq, plain(64, 128), rtol=1e-6)
    assert found.rope.inv_freq.dtype == np.float32
    assert (found.rope.scale, found.context_length) == (1.0, 4096)


@pytest.mark.parametrize(
    "config", [{"partial_rotary_factor": 0.25}, {"rope_parameters": {"partial_rotary_factor": 0.25}}]
)
def test_partial_rotation(config: dict[str, Any]) -> None:
    np.testing.assert_allclose(parse(256, **config).rope.inv_freq, plain(32, 64), rtol=1e-6)


def test_linear_stretches_positions_and_context() -> None:
    found = parse(rope_scaling={"type": "linear", "factor": 4.0})
    np.testing.assert_allclose(found.rope.inv_freq, plain(64, 128) / 4, rtol=1e-6)
    assert found.context_length == 16384


def test_llama3_keeps_short_waves_and_stretches_long_ones() -> None:
    found = parse(rope_scaling=LLAMA3, max_position_embeddings=131072)
    frequencies = plain(64, 128)
    waves = 2 * math.pi / frequencies
    short, long = waves < 8192 / 4, waves > 8192 / 1
    ratio = found.rope.inv_freq / frequencies
    np.testing.assert_allclose(ratio[short], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[long], 1 / 8, rtol=1e-6)
    between = ratio[~short & ~long]
    assert len(between) > 3
    assert ((between > 1 / 8) & (between < 1)).all()
    assert (np.diff(ratio) <= 1e-6).all()
    assert found.context_length == 131072


def test_an_empty_section_does_not_hide_the_other() -> None:
    assert parse(rope_parameters={}, rope_scaling={"type": "linear", "factor": 2.0}).context_length == 8192


def test_yarn() -> None:
    found = parse(rope_scaling=YARN, rope_theta=1e6, max_position_embeddings=40960)
    ratio = found.rope.inv_freq / plain(64, 128, 1e6)
    # Dimensions that turn 32 times in the original context, and once: 23.59 rounded down, 39.65 rounded up.
    np.testing.assert_allclose(ratio[:24], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[40:], 1 / 4, rtol=1e-6)
    np.testing.assert_allclose(ratio[31], (1 - 8 / 17) + 8 / 17 / 4, rtol=1e-6)
    assert found.rope.scale == pytest.approx(0.1 * math.log(4) + 1)
    assert found.context_length == 131072


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({"attention_factor": 1.5}, 1.5),
        ({"mscale": 0.5, "mscale_all_dim": 2.0}, (0.05 * math.log(4) + 1) / (0.2 * math.log(4) + 1)),
        ({"mscale": 0.5}, 0.1 * math.log(4) + 1),  # alone it has no meaning
    ],
)
def test_yarn_attention_factor(changes: dict[str, Any], scale: float) -> None:
    assert parse(rope_scaling={**YARN, **changes}).rope.scale == pytest.approx(scale)


def test_yarn_never_shortens_the_context() -> None:
    assert parse(rope_scaling={**YARN, "factor": 2.0}, max_position_embeddings=131072).context_length == 131072


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling: type is 'dynamic'; expected default,"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type is 'longrope'"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "rope_type is ['yarn']"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor is 0.5; expected a number from 1 to"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": None}}, "low_freq_factor is missing"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor is 1.0; expected more than low_freq"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "original_max_position_embeddings is missing"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'; expected an object"),
        ({"rope_parameters": {"full_attention": {}}}, "one rotation per kind of layer is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 1e300}}, "factor is 1e+300"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"max_position_embeddings": None}, "max_position_embeddings is missing"),
        ({"partial_rotary_factor": 0.0}, "rotates 0 values"),
        ({"partial_rotary_factor": float("inf")}, "partial_rotary_factor is inf"),
    ],
)
def test_refuses(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse(**config)
    assert message in str(caught.value)
