"""`mixbit convert IN.gguf OUT`: a GGUF file as an MLX checkpoint, losslessly."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from gguf.constants import GGMLQuantizationType as Type

from mixbit.engine.convert.errors import ConvertError
from mixbit.engine.convert.gguf_config import (
    ROPE_FREQS,
    architecture_of,
    mlx_name,
    model_config,
    row_order,
)
from mixbit.engine.convert.gguf_file import GgufFile, read_gguf
from mixbit.engine.convert.gguf_tensors import GROUP_SIZE, as_item, bits_of
from mixbit.engine.convert.gguf_tokenizer import write_tokenizer
from mixbit.engine.convert.output import new_model_directory, write_json
from mixbit.engine.convert.writer import SHARD_BYTES, Item, Progress, write_model

# Modules that a converter would quantize: where they are dense, the config says so.
_MATRICES = ("_proj", "embed_tokens", "lm_head", "mlp.gate")


def import_gguf(
    source: Path, out: Path, *, progress: Progress, force: bool = False, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write the model in `source` to the new directory `out`.

    Quantized values, taken as real numbers, are the same in both. Raises ConvertError if the architecture, a
    tensor type, the tokenizer or a setting has no exact counterpart, or if `out` exists and not `force`.
    """
    progress("reading", 0, 1)
    file = read_gguf(source)
    architecture = architecture_of(file)
    config = model_config(file, architecture)
    if quantization := _quantization(file):
        # Both names: transformers and older readers know the second one.
        config |= {"quantization": quantization, "quantization_config": quantization}
    config["torch_dtype"] = _dtype(file)
    with new_model_directory(out, force=force) as directory:
        write_tokenizer(file, directory, config)
        write_json(directory / "config.json", config)
        write_model(directory, _items(file), progress, shard_bytes)


def _items(file: GgufFile) -> list[Item]:
    architecture = architecture_of(file)
    items = []
    for name, tensor in file.tensors.items():
        if name != ROPE_FREQS:  # already in the config, as rope_scaling
            module, parameter = mlx_name(architecture, name)
            items.append(as_item(tensor, module, parameter, row_order(file, architecture, name)))
    return items


def _dtype(file: GgufFile) -> str:
    """The float type of the embedding's values; quantized tensors carry float16 scales."""
    kind = file.tensors["token_embd.weight"].type
    return {Type.F32: "float32", Type.BF16: "bfloat16"}.get(kind, "float16")


def _quantization(file: GgufFile) -> dict[str, Any]:
    """The config's `quantization`: the width that most matrices have, and the others by name."""
    architecture = architecture_of(file)
    widths: dict[str, int | None] = {}
    for name, tensor in file.tensors.items():
        if name != ROPE_FREQS:
            module, parameter = mlx_name(architecture, name)
            if parameter == "weight" and module.endswith(_MATRICES):
                widths[module] = bits_of(tensor)
            elif bits_of(tensor) is not None:
                raise ConvertError(f"{name}: type {tensor.type.name}; expected F32, F16 or BF16")
    counts = Counter(bits for bits in widths.values() if bits is not None)
    if not counts:
        return {}
    common = counts.most_common(1)[0][0]
    quantization: dict[str, Any] = {"group_size": GROUP_SIZE, "bits": common, "mode": "affine"}
    for module, bits in widths.items():
        if bits is None:
            quantization[module] = False
        elif bits != common:
            quantization[module] = {"group_size": GROUP_SIZE, "bits": bits}
    return quantization
