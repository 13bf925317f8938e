"""A model directory: its configuration files and its tensors, from one file or from shards."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixbit.engine.errors import CheckpointError
from mixbit.engine.safetensors import StoredTensor, open_safetensors

Progress = Callable[[str, int, int], None]

INDEX_FILE = "model.safetensors.index.json"

# Parts of a checkpoint that a text model has no use for: vision towers and their projectors,
# multi-token prediction heads, and rotary tables that old conversions stored.
_OTHER_PARTS = re.compile(
    r"^(model\.)?(vision_tower|vision_model|visual|multi_modal_projector|mtp)\.|\.rotary_emb\.inv_freq$"
)
_SHARD = re.compile(r"^(.*)-(\d+)-of-(\d+)\.safetensors$")


def text_name(stored: str) -> str | None:
    """The name within the text model ("model.layers.0...", "lm_head...") of a stored tensor or module.

    None for the other parts of a checkpoint, which are skipped. Vision checkpoints put the text model
    under `language_model.` (MLX) or `model.language_model.` (transformers).
    """
    if stored.startswith("model.language_model."):
        name = "model." + stored.removeprefix("model.language_model.")
    else:
        name = stored.removeprefix("language_model.")
    return None if _OTHER_PARTS.search(name) else name


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a model directory holds. tensors are keyed by `text_name`; each keeps the name it is stored under.

    config and generation_config are the parsed JSON files; the latter is empty where the file is absent.
    skipped: stored names of the tensors that are not the text model's.
    """

    path: Path
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    skipped: tuple[str, ...]


def open_checkpoint(path: Path, progress: Progress | None = None) -> Checkpoint:
    """Map every file of the model directory and check its headers; no weight is read.

    Raises CheckpointError if this is not a model directory, a file is missing, corrupt or truncated, or
    two tensors claim one name.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such directory")
    if not path.is_dir():
        hint = f"; convert it first: mixbit convert {path} OUT/" if path.suffix == ".gguf" else ""
        raise CheckpointError(f"{path}: a file, not a model directory{hint}")
    if not (path / "config.json").is_file():
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise CheckpointError(f"{path}: not a model directory: it has no config.json (found: {found})")
    config = read_json(path / "config.json")
    generation = path / "generation_config.json"
    tensors: dict[str, StoredTensor] = {}
    skipped: list[str] = []
    for stored in _stored_tensors(path, progress or (lambda stage, done, total: None)).values():
        name = text_name(stored.name)
        if name is None:
            skipped.append(stored.name)
        elif name in tensors:
            raise CheckpointError(f"{path}: tensors {tensors[name].name} and {stored.name} are both {name}; remove one")
        else:
            tensors[name] = stored
    return Checkpoint(path, config, read_json(generation) if generation.is_file() else {}, tensors, tuple(skipped))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError with the place of the fault."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _stored_tensors(path: Path, progress: Progress) -> dict[str, StoredTensor]:
    index = _read_index(path / INDEX_FILE) if (path / INDEX_FILE).is_file() else {}
    files = sorted(set(index.values())) if index else _files_without_index(path)
    missing = [name for name in files if not (path / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(files)} weight files are missing ({', '.join(missing[:4])}); "
            "download them again"
        )
    tensors: dict[str, StoredTensor] = {}
    for done, name in enumerate(files):
        progress("opening weights", done, len(files))
        for tensor in open_safetensors(path / name).values():
            if tensor.name in tensors:
                first = tensors[tensor.name].file.name
                raise CheckpointError(f"{path}: tensor {tensor.name} is stored twice, in {first} and {name}")
            tensors[tensor.name] = tensor
    progress("opening weights", len(files), len(files))
    for tensor_name, name in index.items():
        if tensor_name not in tensors or tensors[tensor_name].file.name != name:
            raise CheckpointError(f"{path}: {INDEX_FILE} places tensor {tensor_name} in {name}, which does not hold it")
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    """The weight map: file name for each tensor name; files lie beside the index."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: no weight_map of tensor names to files")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{path}: tensor {name} is placed in {file!r}, which is not a .safetensors file here")
    return weight_map


def _files_without_index(path: Path) -> list[str]:
    """Every model*.safetensors, and the absent members of a numbered set."""
    names = {entry.name for entry in path.glob("model*.safetensors")}
    if not names:
        others = sorted(
            entry.name for entry in path.iterdir() if entry.suffix in {".bin", ".pt", ".pth", ".gguf", ".npz"}
        )
        hint = f" (found {others[0]}, a format that is not loaded; see mixbit convert --help)" if others else ""
        raise CheckpointError(f"{path}: it has a config.json but no model*.safetensors{hint}")
    for match in filter(None, map(_SHARD.match, tuple(names))):
        stem, number, total = match.groups()
        width = len(number)
        names |= {f"{stem}-{i:0{width}}-of-{total}.safetensors" for i in range(1, min(int(total), 9999) + 1)}
    return sorted(names)
