"""`mixbit convert IN.gguf OUT`: a GGUF file as an MLX checkpoint, losslessly."""

from __future__ import annotations

from pathlib import Path

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
from mixbit.engine.convert.output import check_loads, new_model_directory, write_json
from mixbit.engine.convert.widths import Width, quantization_section
from mixbit.engine.convert.writer import SHARD_BYTES, Item, Progress, write_model

# Modules that are matrices: where they are dense, the config says so.
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
    if quantization := quantization_section(_widths(file)):
        # Both names: transformers and older readers know the second one.
        config |= {"quantization": quantization, "quantization_config": quantization}
    config["torch_dtype"] = _dtype(file)
    with new_model_directory(out, force=force) as directory:
        write_tokenizer(file, directory, config)
        write_json(directory / "config.json", config)
        write_model(directory, _items(file), progress, shard_bytes)
        check_loads(directory, out)


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


def _widths(file: GgufFile) -> dict[str, Width | None]:
    """Width of every matrix, by module."""
    architecture = architecture_of(file)
    widths: dict[str, Width | None] = {}
    for name, tensor in file.tensors.items():
        if name == ROPE_FREQS:
            continue
        bits = bits_of(tensor)
        module, parameter = mlx_name(architecture, name)
        if parameter == "weight" and module.endswith(_MATRICES):
            widths[module] = None if bits is None else Width(bits, GROUP_SIZE)
        elif bits is not None:
            raise ConvertError(f"{name}: type {tensor.type.name}; expected F32, F16 or BF16")
    return widths
