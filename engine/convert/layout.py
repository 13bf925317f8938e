"""The tensors of a checkpoint under the names and in the layout of MLX.

Checkpoints of transformers differ in the mixture-of-experts and hybrid families: experts are stored one
by one or with gate and up fused, convolutions are [channels, 1, kernel], and norms are stored around zero.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from mixbit.engine.checkpoint import Checkpoint
from mixbit.engine.convert.errors import ConvertError
from mixbit.engine.convert.sources import Codes, Source
from mixbit.engine.convert.widths import Width
from mixbit.engine.convert.writer import Array
from mixbit.engine.safetensors import StoredTensor

_HYBRID = ("qwen3_next", "qwen3_5", "qwen3_5_moe")
_PREFIXES = {"qwen3_5": "language_model.", "qwen3_5_moe": "language_model."}
_EXPERT = re.compile(r"(?P<mlp>.*\.mlp)\.experts\.(?P<index>\d+)\.(?P<name>gate_proj|up_proj|down_proj)\.weight")
_FUSED = re.compile(r"(?P<mlp>.*\.mlp)\.experts\.(?P<name>gate_up_proj|down_proj)")
_ZERO_CENTRED = re.compile(r"model\.norm\.weight|.*\.(input_layernorm|post_attention_layernorm|q_norm|k_norm)\.weight")


def stored_prefix(model_type: str) -> str:
    """What MLX puts before the text model's names: that of vision checkpoints for the families that have them."""
    return _PREFIXES.get(model_type, "")


def is_transformers_layout(tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether experts are unstacked or fused, or convolutions not yet transposed."""
    return any(
        _EXPERT.fullmatch(name)
        or _FUSED.fullmatch(name)
        or (name.endswith("conv1d.weight") and len(tensor.shape) == 3 and tensor.shape[2] != 1)
        for name, tensor in tensors.items()
    )


def read_sources(
    checkpoint: Checkpoint, model_type: str, *, tied: bool, widths: Mapping[str, Width | None]
) -> list[Source]:
    """Every tensor to be written, in the order of the checkpoint.

    tied: whether the head is the embedding, so that a stored one is dropped. widths: by module, of those
    that are quantized now. Raises ConvertError if experts are missing or a tensor is in no known layout.
    """
    reader = _Reader(stored_prefix(model_type), widths)
    tensors = dict(checkpoint.tensors)
    zero_centred = model_type in _HYBRID and is_transformers_layout(tensors)
    experts = _expert_groups(tensors)
    sources: list[Source] = []
    for name, tensor in tensors.items():
        if tied and name.startswith("lm_head."):
            continue
        if match := _EXPERT.fullmatch(name):
            members = experts.pop((match["mlp"], match["name"]), None)
            if members is not None:
                sources.append(reader.stack(f"{match['mlp']}.switch_mlp.{match['name']}", members))
        elif match := _FUSED.fullmatch(name):
            sources += reader.fused(match["mlp"], match["name"], tensor)
        elif not name.endswith((".scales", ".biases")) or f"{name.rsplit('.', 1)[0]}.weight" not in tensors:
            plus_one = zero_centred and _ZERO_CENTRED.fullmatch(name) is not None
            sources.append(reader.single(name, tensors, plus_one=plus_one))
    return sources


def _expert_groups(tensors: Mapping[str, StoredTensor]) -> dict[tuple[str, str], list[StoredTensor]]:
    """Stored tensors of each (mlp, projection) in the order of the experts."""
    found: dict[tuple[str, str], dict[int, StoredTensor]] = {}
    for name, tensor in tensors.items():
        if match := _EXPERT.fullmatch(name):
            found.setdefault((match["mlp"], match["name"]), {})[int(match["index"])] = tensor
    for (mlp, name), members in found.items():
        missing = sorted(set(range(max(members) + 1)) - members.keys())
        if missing:
            raise ConvertError(f"{mlp}.experts.{missing[0]}.{name}.weight is missing: a shard may not be downloaded")
    return {key: [members[index] for index in range(len(members))] for key, members in found.items()}


class _Reader:
    """Makes sources of stored tensors."""

    def __init__(self, prefix: str, widths: Mapping[str, Width | None]) -> None:
        self.prefix, self.widths = prefix, widths

    def _source(self, module: str, parameter: str, shape: tuple[int, ...], pieces: list[Array]) -> Source:
        return Source(module, self.prefix + module, parameter, shape, pieces[0].dtype, tuple(pieces))

    def stack(self, module: str, members: list[StoredTensor]) -> Source:
        shape = members[0].shape
        for member in members:
            if member.shape != shape or len(shape) != 2:
                raise ConvertError(f"{member.name}: shape {member.shape}, but {members[0].name} has {shape}")
        return self._source(module, "weight", (len(members), *shape), [member.array() for member in members])

    def fused(self, mlp: str, name: str, tensor: StoredTensor) -> list[Source]:
        """`gate_up_proj` [experts, 2 * inner, in] and `down_proj` [experts, in, inner]."""
        data = tensor.array()
        if data.ndim != 3 or (name == "gate_up_proj" and data.shape[1] % 2):
            raise ConvertError(f"{tensor.name}: shape {tensor.shape}, expected [experts, out, in]")
        experts, rows, in_dim = data.shape
        if name == "down_proj":
            parts = {"down_proj": slice(None)}
        else:
            parts = {"gate_proj": slice(rows // 2), "up_proj": slice(rows // 2, None)}
        return [
            self._source(
                f"{mlp}.switch_mlp.{part}",
                "weight",
                (experts, data[0, rows_of].shape[0], in_dim),
                [data[expert, rows_of] for expert in range(experts)],
            )
            for part, rows_of in parts.items()
        ]

    def single(self, name: str, tensors: Mapping[str, StoredTensor], *, plus_one: bool) -> Source:
        module, _, parameter = name.rpartition(".")
        data = tensors[name].array()
        if f"{module}.scales" in tensors and parameter == "weight":
            return self._quantized(module, data, tensors)
        if module.endswith("conv1d") and data.ndim == 3 and data.shape[2] != 1:
            data = data.reshape(data.shape[0], data.shape[2], data.shape[1])  # [channels, 1, kernel]: the 1 moves
        source = self._source(module, parameter, data.shape, [data.reshape(-1, data.shape[-1])])
        return replace(source, plus_one=plus_one)

    def _quantized(self, module: str, weight: Array, tensors: Mapping[str, StoredTensor]) -> Source:
        width = self.widths[module]
        if width is None:
            raise ConvertError(f"{module}: has scales, but is not quantized according to config.json")
        flat = [
            array.reshape(-1, array.shape[-1])
            for array in (weight, tensors[f"{module}.scales"].array(), tensors[f"{module}.biases"].array())
        ]
        shape = (*weight.shape[:-1], weight.shape[-1] * 32 // width.bits)
        codes = Codes(flat[0], flat[1], flat[2], width)
        return Source(module, self.prefix + module, "weight", shape, flat[1].dtype, codes=codes)
