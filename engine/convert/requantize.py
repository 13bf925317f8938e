"""`mixbit convert IN OUT` for safetensors: an MLX or transformers checkpoint at other widths, in MLX layout."""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mixbit.engine.checkpoint import Checkpoint, open_checkpoint
from mixbit.engine.convert.errors import ConvertError
from mixbit.engine.convert.layout import is_transformers_layout, read_sources
from mixbit.engine.convert.output import check_loads, new_model_directory, write_json
from mixbit.engine.convert.sources import Source
from mixbit.engine.convert.widths import DEFAULT_GROUP_SIZE, Override, Width, WidthRules, quantization_section
from mixbit.engine.convert.writer import SHARD_BYTES, Array, Item, Progress, TensorInfo, write_model
from mixbit.engine.loader import load
from mixbit.engine.models import MODELS, supported_type
from mixbit.kernels.quantize import quantize

DTYPES: Mapping[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
# Everything else stays behind: nothing that could be executed is copied.
_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
)
# Of other parts of the checkpoint, of code, or written anew.
_DROPPED_KEYS = ("auto_map", "_name_or_path", "vision_config", "quantization", "quantization_config")
_CHUNK_VALUES = 1 << 22


@dataclass(frozen=True)
class ConvertOptions:
    """What to change. width: of all matrices, None keeps their widths. dtype: of unquantized tensors and of
    scales, None keeps theirs (A_log always keeps its own: its exponential decays the state at every token)."""

    width: Width | None = None
    overrides: tuple[Override, ...] = ()
    dtype: str | None = None


@dataclass(frozen=True, eq=False)
class _Plan:
    """A source, the width it gets and the float dtype that it or its scales get."""

    source: Source
    width: Width | None
    dtype: np.dtype[Any]


def convert_checkpoint(
    source: Path,
    out: Path,
    options: ConvertOptions,
    *,
    progress: Progress,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the checkpoint in `source` to the new directory `out`, as `options` say.

    Matrices whose width and dtype stay are copied code by code. Raises CheckpointError if the input is
    inconsistent, ConvertError if it cannot be converted as asked.
    """
    checkpoint = open_checkpoint(source, progress)
    model_type = _model_type(checkpoint)
    plans, section = _plan(checkpoint, model_type, options)
    config = {key: value for key, value in checkpoint.config.items() if key not in _DROPPED_KEYS}
    if isinstance(text := config.get("text_config"), dict):
        config["text_config"] = {key: value for key, value in text.items() if key not in _DROPPED_KEYS}
    if section is not None:
        config |= {"quantization": section, "quantization_config": section}
    if options.dtype is not None:
        config["torch_dtype"] = options.dtype
    with new_model_directory(out, force=force) as directory:
        write_json(directory / "config.json", config)
        for name in _COPIED:
            if (source / name).is_file():
                shutil.copyfile(source / name, directory / name)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            write_model(directory, [_item(plan, pool) for plan in plans], progress, shard_bytes)
        check_loads(directory, out)


def _model_type(checkpoint: Checkpoint) -> str:
    stored = checkpoint.config.get("model_type")
    name = supported_type(stored)
    if name is None:
        raise ConvertError(
            f"{checkpoint.path}: model_type {str(stored)!r} cannot be converted; supported: {', '.join(MODELS)}"
        )
    method = (checkpoint.config.get("quantization_config") or {}).get("quant_method")
    if method is not None and "quantization" not in checkpoint.config:
        raise ConvertError(
            f"{checkpoint.path}: quantized by {method!r}; start from the unquantized or an MLX checkpoint"
        )
    return name


def _plan(
    checkpoint: Checkpoint, model_type: str, options: ConvertOptions
) -> tuple[list[_Plan], dict[str, Any] | None]:
    """What becomes of each tensor, and the new quantization section."""
    now: dict[str, Width | None] = {}
    default = options.width
    if not is_transformers_layout(checkpoint.tensors):
        model = load(checkpoint.path)  # every width, checked against the architecture
        for path, binding in model.bindings.items():
            scheme = binding.scheme
            now[path] = None if scheme is None else Width(scheme.bits, scheme.group_size)
        claim = model.quantization.default
        if default is None and claim.bits is not None:
            default = Width(claim.bits, claim.group_size or DEFAULT_GROUP_SIZE)
    sources = read_sources(checkpoint, model_type, tied=_is_tied(checkpoint.config), widths=now)
    rules = WidthRules(model_type, options.width, options.overrides)
    matrices = [source for source in sources if source.quantizable]
    unmatched = rules.unmatched((source.module, source.stored) for source in matrices)
    if unmatched:
        raise ConvertError(
            f"override '{unmatched[0]}' matches no matrix; there are, for example: {_examples(matrices)}"
        )
    widths = {s.stored: rules.choose(s.module, s.stored, s.in_dim, s.width) for s in matrices}
    dtype = None if options.dtype is None else DTYPES[options.dtype]
    plans = [
        _Plan(
            s,
            widths.get(s.stored) if s.quantizable else None,
            s.dtype if dtype is None or s.parameter == "A_log" else dtype,
        )
        for s in sources
    ]
    return plans, quantization_section(widths, default)


def _is_tied(config: Mapping[str, Any]) -> bool:
    text = config.get("text_config") or {}
    return bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))


def _examples(matrices: list[Source]) -> str:
    return ", ".join(source.module for source in matrices[:: max(1, len(matrices) // 4)])


def _item(plan: _Plan, pool: ThreadPoolExecutor) -> Item:
    source, width, dtype = plan.source, plan.width, plan.dtype
    name = f"{source.stored}.{source.parameter}"
    if width is None:
        info = TensorInfo(name, dtype, source.shape)
        return Item((info,), lambda: _in_order(pool, partial(_dense, source, dtype), source.spans(_CHUNK_VALUES)))
    *lead, in_dim = source.shape
    groups = (*lead, in_dim // width.group_size)
    parts = (
        TensorInfo(name, np.dtype(np.uint32), (*lead, in_dim * width.bits // 32)),
        TensorInfo(f"{source.stored}.scales", dtype, groups),
        TensorInfo(f"{source.stored}.biases", dtype, groups),
    )
    make = _copy if width == source.width else partial(_quantize, width)
    return Item(parts, lambda: _in_order(pool, partial(make, source, dtype), source.spans(_CHUNK_VALUES)))


def _dense(source: Source, dtype: np.dtype[Any], span: tuple[int, int]) -> tuple[Array, ...]:
    return (source.dense(*span, dtype),)


def _copy(source: Source, dtype: np.dtype[Any], span: tuple[int, int]) -> tuple[Array, ...]:
    assert source.codes is not None
    part, codes = slice(*span), source.codes
    return codes.weight[part], codes.scales[part].astype(dtype), codes.biases[part].astype(dtype)


def _quantize(width: Width, source: Source, dtype: np.dtype[Any], span: tuple[int, int]) -> tuple[Array, ...]:
    packed, scales, biases = quantize(source.values(*span), width.bits, width.group_size)
    return packed, scales.astype(dtype), biases.astype(dtype)


def _in_order(
    pool: ThreadPoolExecutor, make: Callable[[tuple[int, int]], tuple[Array, ...]], spans: Iterable[tuple[int, int]]
) -> Iterator[tuple[Array, ...]]:
    """make(span) for each span, in order; a few are made ahead, so that memory stays bounded."""
    ahead = (os.cpu_count() or 1) + 1
    pending: deque[Future[tuple[Array, ...]]] = deque()
    for span in spans:
        pending.append(pool.submit(make, span))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
