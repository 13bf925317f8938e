"""Which width each matrix gets, and how config.json says it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from mixbit.engine.convert.errors import ConvertError
from mixbit.kernels.spec import BITS, GROUP_SIZES

DEFAULT_GROUP_SIZE = 64

# What converters of MLX checkpoints keep at 8 bits, by family (mlx-lm, each model's quant_predicate).
_ROUTER = ("*.mlp.gate",)
_ROUTER_AND_SHARED_GATE = ("*.mlp.gate", "*.mlp.shared_expert_gate")
_AT_8_BITS: Mapping[str, tuple[str, ...]] = {
    "qwen3_moe": _ROUTER,
    "qwen3_next": _ROUTER_AND_SHARED_GATE,
    "qwen3_5_moe": _ROUTER_AND_SHARED_GATE,
}


@dataclass(frozen=True)
class Width:
    """Bits and group size of an affine-quantized matrix."""

    bits: int
    group_size: int

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ConvertError(f"{self.bits} bits: choose one of {', '.join(map(str, BITS))}")
        if self.group_size not in GROUP_SIZES:
            raise ConvertError(f"group size {self.group_size}: choose one of {', '.join(map(str, GROUP_SIZES))}")

    def as_json(self) -> dict[str, int]:
        """As config.json spells it."""
        return {"group_size": self.group_size, "bits": self.bits}


@dataclass(frozen=True)
class Override:
    """The width of the modules whose path matches `pattern`; None leaves them unquantized."""

    pattern: str
    width: Width | None

    def matches(self, *paths: str) -> bool:
        """Whether one of the names of a module fits the glob."""
        return any(fnmatchcase(path, self.pattern) for path in paths)


def parse_override(text: str, group_size: int = DEFAULT_GROUP_SIZE) -> Override:
    """Parse GLOB=BITS, GLOB=BITS:GROUP or GLOB=none. Raises ConvertError."""
    pattern, _, value = text.rpartition("=")
    if not pattern:
        raise ConvertError(f"override {text!r}: expected GLOB=BITS[:GROUP], for example '*.switch_mlp.*=2:32'")
    if value.lower() in ("none", "false"):
        return Override(pattern, None)
    bits, _, group = value.partition(":")
    try:
        return Override(pattern, Width(int(bits), int(group) if group else group_size))
    except ValueError:
        raise ConvertError(f"override {text!r}: {value!r} is not BITS, BITS:GROUP or none") from None
    except ConvertError as error:
        raise ConvertError(f"override {text!r}: {error}") from None


@dataclass(frozen=True)
class WidthRules:
    """Decides by the last override that matches, then the family's 8-bit routers, then `width`.

    width: of all matrices; None keeps what they have (and then the family's rule does not apply).
    """

    model_type: str
    width: Width | None
    overrides: Sequence[Override]

    def choose(self, module: str, stored: str, in_dim: int, current: Width | None) -> Width | None:
        """The width of `module` (its path within the text model; `stored`: in the file), None for unquantized.

        current: its width now. Raises ConvertError if an override's groups do not divide rows of in_dim values.
        """
        for override in reversed(self.overrides):
            if override.matches(module, stored):
                width = override.width
                if width is not None and in_dim % width.group_size:
                    raise ConvertError(
                        f"{stored}: rows of {in_dim} values do not divide into groups of {width.group_size}, "
                        f"which override '{override.pattern}' asks for"
                    )
                return width
        if self.width is None:
            return current
        at_8_bits = any(fnmatchcase(module, pattern) for pattern in _AT_8_BITS.get(self.model_type, ()))
        width = Width(8, DEFAULT_GROUP_SIZE) if at_8_bits else self.width
        return width if in_dim % width.group_size == 0 else None

    def unmatched(self, paths: Iterable[tuple[str, str]]) -> list[str]:
        """Patterns that match none of the (module, stored) names."""
        known = list(paths)
        return [o.pattern for o in self.overrides if not any(o.matches(*names) for names in known)]


def quantization_section(widths: Mapping[str, Width | None], default: Width | None = None) -> dict[str, Any] | None:
    """`quantization` of config.json for these modules (by stored path), None if none of them is quantized.

    default: the global width; None takes the commonest. Modules of another width are listed by name.
    """
    counts = Counter(width for width in widths.values() if width is not None)
    if not counts:
        return None
    common = default or counts.most_common(1)[0][0]
    section: dict[str, Any] = {**common.as_json(), "mode": "affine"}
    for module, width in widths.items():
        if width != common:
            section[module] = False if width is None else width.as_json()
    return section
