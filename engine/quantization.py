"""What config.json says about the width of each tensor, checked against the shapes that are stored.

A section maps "bits", "group_size" and "mode" to the values of every quantized module, and a module's
path to an override: {"bits": ..., "group_size": ..., "mode": ...}, true (as the rest) or false (not
quantized). A module is quantized where `.scales` is stored. With rows of `in_dim` values, which the
architecture tells, the shapes determine bits = 32 * words / in_dim and group_size = in_dim / scales, so
that the section is a claim to be checked. No width is ever assumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mixbit.engine.checkpoint import Checkpoint, read_json, text_name
from mixbit.engine.errors import CheckpointError
from mixbit.engine.fields import Fields
from mixbit.kernels.spec import BITS, GROUP_SIZES

# An override that gives bits alone means this group size to the converters that write such overrides.
_OVERRIDE_GROUP_SIZE = 64
_KNOWN_MODES = ("mxfp4", "mxfp8", "nvfp4")  # known to MLX, without a kernel here


@dataclass(frozen=True)
class Scheme:
    """How a matrix is quantized."""

    bits: int
    group_size: int
    mode: str = "affine"

    def __str__(self) -> str:
        return f"{self.bits} bits, group {self.group_size}"


@dataclass(frozen=True)
class Claim:
    """What a section says of a module; None: left open. origin: the words that name it, for people.

    quantized: None if the section does not say whether (the global values), else what the override says.
    """

    origin: str
    bits: int | None = None
    group_size: int | None = None
    quantized: bool | None = None

    def __str__(self) -> str:
        if self.quantized is False:
            return "unquantized"
        bits = "unspecified bits" if self.bits is None else f"{self.bits} bits"
        return bits if self.group_size is None else f"{bits}, group {self.group_size}"


@dataclass(frozen=True)
class Quantization:
    """The quantization section of a checkpoint.

    source: where it stands ("quantization"); None if there is none. overrides: by path within the text
    model. keys: the path of each override as config.json writes it.
    """

    source: str | None
    default: Claim
    overrides: Mapping[str, Claim] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def claim(self, path: str) -> Claim:
        """What the section says of the module at `path` (within the text model)."""
        return self.overrides.get(path, self.default)

    def resolve(
        self, path: str, stored: str, weight: tuple[int, ...], scales: tuple[int, ...], in_dim: int
    ) -> tuple[Scheme, Claim]:
        """The scheme of a module that has scales, and the claim that agrees with it.

        stored: its name in the file. weight, scales: shapes; in_dim: values in a row, from the architecture.
        Raises CheckpointError if the claim and the shapes contradict each other or no kernel has the width.
        """
        claim = self.claim(path)
        shapes = f"weight {weight}, scales {scales}, rows of {in_dim} values"
        if self.source is None:
            raise CheckpointError(
                f"{stored}: the tensors are quantized ({shapes}), but config.json has no quantization section; "
                'add "quantization": {"group_size": ..., "bits": ...}'
            )
        words, groups = weight[-1], scales[-1]
        if groups == 0 or in_dim % groups or words * 32 % in_dim:
            raise CheckpointError(
                f"{stored}: no width fits the shapes: {shapes}; {claim.origin} claims {claim}. "
                "The architecture in config.json and the tensors disagree about the length of a row"
            )
        actual = Scheme(words * 32 // in_dim, in_dim // groups)
        agrees = claim.bits in (None, actual.bits) and claim.group_size in (None, actual.group_size)
        if claim.quantized is False or not agrees:
            raise CheckpointError(
                f"{stored}: {claim.origin} claims {claim}, but the tensors hold {actual}: {shapes}. "
                f'If the tensors are right, set "{stored}": '
                f'{{"group_size": {actual.group_size}, "bits": {actual.bits}}} in "{self.source}" of config.json'
            )
        if actual.bits not in BITS or actual.group_size not in GROUP_SIZES:
            raise CheckpointError(
                f"{stored}: {actual} ({shapes}) is not supported; bits {list(BITS)}, groups {list(GROUP_SIZES)} are"
            )
        return actual, claim

    def check_unquantized(self, path: str, stored: str, weight: tuple[int, ...]) -> None:
        """Raise CheckpointError if an override says that a module without scales is quantized."""
        claim = self.claim(path)
        if claim.quantized:
            raise CheckpointError(
                f"{stored}: {claim.origin} claims {claim}, but {stored}.scales is not stored (weight {weight}): "
                f'download the weights again, or set "{stored}": false'
            )

    def unmatched(self, paths: set[str]) -> tuple[str, ...]:
        """Keys of overrides that name none of the modules in `paths`: without effect, worth a warning."""
        return tuple(key for path, key in self.keys.items() if path not in paths)


def parse_quantization(checkpoint: Checkpoint) -> Quantization:
    """The section that counts: `quantization` before `quantization_config`, at the top before text_config.

    Raises CheckpointError for a value that no kernel implements, naming it and what is supported.
    """
    found = _find_section(checkpoint)
    if found is None:
        return Quantization(None, Claim("config.json"))
    source, section = found
    method = section.get("quant_method")
    if method is not None:
        raise CheckpointError(
            f'{source}: quant_method {method!r} is not supported; expected MLX\'s "bits" and "group_size" (affine)'
        )
    default = _parse_claim(section, f'"{source}" of config.json', None)
    overrides: dict[str, Claim] = {}
    keys: dict[str, str] = {}
    warnings: list[str] = []
    for key, value in section.values.items():
        if key in {"bits", "group_size", "mode", "quant_method"}:
            continue
        path = text_name(key + ".")
        if path is None:
            continue
        path = path.removesuffix(".")
        if not isinstance(value, bool | dict):
            if "." in key:
                raise CheckpointError(f"{source}: {key} is {value!r}; expected an object, true or false")
            warnings.append(f"{source}: {key} = {value!r} is not a setting known here; ignored")
            continue
        claim = _parse_override(key, value, default, source)
        if path in overrides and str(overrides[path]) != str(claim):
            raise CheckpointError(
                f"{source}: {keys[path]} claims {overrides[path]} and {key} claims {claim}, for the same module {path}"
            )
        overrides[path], keys[path] = claim, key
    return Quantization(source, default, overrides, keys, tuple(warnings))


def _find_section(checkpoint: Checkpoint) -> tuple[str, Fields] | None:
    config = Fields(checkpoint.config)
    text = config.section("text_config")
    for name in ("quantization", "quantization_config"):
        for place in (config, text):
            section = place.section(name) if place else None
            if section is not None:
                return section.source.removeprefix("config.json ").replace(" ", "."), section
    model_opt = checkpoint.path / "hf_quant_config.json"
    if model_opt.is_file():
        settings = read_json(model_opt).get("quantization")
        algorithm = settings.get("quant_algo") if isinstance(settings, dict) else None
        raise CheckpointError(f"{model_opt}: ModelOpt quantization {algorithm!r} is not supported; affine is")
    return None


def _parse_claim(values: Fields, origin: str, quantized: bool | None) -> Claim:
    mode: Any = values.get("mode") or "affine"
    if mode != "affine":
        known = "is known, but has no kernel here" if mode in _KNOWN_MODES else "is unknown"
        raise CheckpointError(f"{origin}: quantization mode {mode!r} {known}; supported: affine")
    for name, allowed in (("bits", BITS), ("group_size", GROUP_SIZES)):
        value = values.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value not in allowed):
            raise CheckpointError(f"{origin}: {name} is {value!r}; supported: {', '.join(map(str, allowed))}")
    return Claim(origin, values.get("bits"), values.get("group_size"), quantized)


def _parse_override(key: str, value: bool | dict[str, Any], default: Claim, source: str) -> Claim:
    origin = f'the override "{key}" in "{source}"'
    if value is False:
        return Claim(origin, quantized=False)
    if value is True:
        return Claim(origin, default.bits, default.group_size, quantized=True)
    claim = _parse_claim(Fields(value, origin), origin, True)
    group_size = _OVERRIDE_GROUP_SIZE if claim.group_size is None else claim.group_size
    return Claim(origin, claim.bits, group_size, quantized=True)
