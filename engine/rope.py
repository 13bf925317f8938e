"""Rotary position embedding: the configuration forms of checkpoints, turned into frequencies.

Types: default, linear (positions divided by a factor), llama3 (Llama 3.1), yarn (arXiv:2309.00071).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mixbit.engine.errors import CheckpointError
from mixbit.engine.fields import Fields
from mixbit.kernels.ops import Rope

_MAX_HEAD_DIM = 4096
# "mrope" gives text tokens three equal positions, which is the default for a text model.
_TYPES = {"default": "default", "mrope": "default", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class RopeConfig:
    """The rotary embedding of a model, and the context length it stretches to (tokens)."""

    rope: Rope
    context_length: int


def parse_rope(
    config: Fields, head_dim: int, *, theta: float | None = None, partial_rotary_factor: float = 1.0
) -> RopeConfig:
    """Read `rope_parameters` or `rope_scaling`, `rope_theta` and `partial_rotary_factor` at either place.

    theta and partial_rotary_factor are the family's values where config.json has none; theta None: required.
    Raises CheckpointError for an unsupported type or values that do not make a rotation.
    """
    sections = (config.section("rope_parameters"), config.section("rope_scaling"))
    parameters = next((section for section in sections if section and section.values), Fields({}, config.source))
    if any(isinstance(value, dict) for value in parameters.values.values()):
        raise CheckpointError(f"{parameters.source}: one rotation per kind of layer is not supported")
    config.require("rope_traditional", (False,))
    base = _either(parameters, config, "rope_theta").number("rope_theta", theta, minimum=2.0)
    partial = _either(parameters, config, "partial_rotary_factor").number(
        "partial_rotary_factor", partial_rotary_factor
    )
    rotated = int(head_dim * partial)
    if not 0 < rotated <= head_dim <= _MAX_HEAD_DIM or rotated % 2:
        raise CheckpointError(
            f"{config.source}: head_dim {head_dim} with partial_rotary_factor {partial:g} rotates {rotated} values; "
            f"expected an even count, at most head_dim, which is at most {_MAX_HEAD_DIM}"
        )
    field = "rope_type" if parameters.get("rope_type") is not None else "type"
    kind: Any = parameters.get(field) or "default"
    if not isinstance(kind, str) or kind not in _TYPES:
        raise parameters.error(field, f"{', '.join(_TYPES)}: nothing else is supported")
    inv_freq = base ** (-np.arange(0, rotated, 2, dtype=np.float64) / rotated)
    length = config.integer("max_position_embeddings")
    match _TYPES[kind]:
        case "linear":
            factor = parameters.number("factor", minimum=1.0)
            return RopeConfig(_rope(inv_freq / factor), int(length * factor))
        case "llama3":
            return RopeConfig(_rope(_llama3(inv_freq, parameters)), length)
        case "yarn":
            original = parameters.integer("original_max_position_embeddings")
            factor = parameters.number("factor", minimum=1.0)
            rope = _rope(_yarn(inv_freq, base, original, factor, parameters), _attention_factor(factor, parameters))
            return RopeConfig(rope, max(length, int(original * factor)))
        case _:
            return RopeConfig(_rope(inv_freq), length)


def _either(first: Fields, second: Fields, name: str) -> Fields:
    return first if first.get(name) is not None else second


def _rope(inv_freq: Float64Array, scale: float = 1.0) -> Rope:
    return Rope(inv_freq.astype(np.float32), scale)


def _llama3(inv_freq: Float64Array, parameters: Fields) -> Float64Array:
    """Divide the frequency of long waves by the factor, keep short ones, blend in between."""
    factor = parameters.number("factor", minimum=1.0)
    low = parameters.number("low_freq_factor")
    high = parameters.number("high_freq_factor")
    original = parameters.integer("original_max_position_embeddings")
    if high <= low:
        raise parameters.error("high_freq_factor", f"more than low_freq_factor, {low:g}")
    turns = original * inv_freq / (2 * math.pi)  # full turns within the original context
    keep: Float64Array = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return inv_freq * (keep + (1 - keep) / factor)


def _yarn(inv_freq: Float64Array, base: float, original: int, factor: float, parameters: Fields) -> Float64Array:
    """Keep dimensions that turn beta_fast times or more within the original context, divide the frequency
    of those below beta_slow by the factor, and blend linearly over the dimensions in between."""
    rotated = 2 * len(inv_freq)

    def dimension(turns: float) -> float:
        return rotated * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    beta_fast = parameters.number("beta_fast", 32.0, minimum=1e-6)
    beta_slow = parameters.number("beta_slow", 1.0, minimum=1e-6)
    low, high = dimension(beta_fast), dimension(beta_slow)
    if parameters.boolean("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    ramp = (np.arange(len(inv_freq)) - low) / (high - low if high != low else 0.001)
    stretch: Float64Array = np.clip(ramp, 0.0, 1.0)
    return inv_freq * (stretch / factor + (1 - stretch))


def _attention_factor(factor: float, parameters: Fields) -> float:
    """What YaRN multiplies cos and sin with: given, or from the factor (0.1 ln(factor) + 1)."""

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0

    if parameters.get("attention_factor") is not None:
        return parameters.number("attention_factor")
    over, under = parameters.number("mscale", 0.0), parameters.number("mscale_all_dim", 0.0)
    return mscale(over) / mscale(under) if over and under else mscale(1.0)
