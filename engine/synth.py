"""`mixbit synth`: checkpoints of a model's real sizes with random weights, where the weights themselves
cannot be had: to measure speed and memory, and to test loading and serving.

The tensors are those that the model file asks for, so that every supported architecture can be written.
Values are made chunk by chunk: memory stays bounded whatever the size.
"""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from mixbit.engine.convert.output import check_loads, new_model_directory, write_json
from mixbit.engine.convert.widths import Override, Width, WidthRules, quantization_section
from mixbit.engine.convert.writer import Array, Item, Progress, TensorInfo, write_model
from mixbit.engine.errors import UserError
from mixbit.engine.fields import Fields
from mixbit.engine.models import MODELS, supported_type
from mixbit.engine.synth_sizes import SIZES
from mixbit.engine.synth_tokenizer import SPECIAL_TOKENS, write_tokenizer
from mixbit.kernels.ops import Norm, ProgramBuilder
from mixbit.kernels.spec import BatchMatvecSpec, DenseTensor

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_CHUNK_VALUES = 1 << 24
_Spreads = npt.NDArray[np.float32]
FOUR_BITS = Width(4, 64)
_GAIN = 1.5  # a matrix keeps the spread of its input, and some more: logits then differ clearly
# Written anew, or of weights that are not made.
_DROPPED_KEYS = ("quantization", "quantization_config", "vision_config", "eos_token_id", "bos_token_id")


class SynthError(UserError):
    """A model that cannot be imitated as asked; the message says why."""


@dataclass(frozen=True)
class Skew:
    """Routing as in real text: a share of the picks falls on a share of the experts, others for each layer."""

    picks: float
    experts: float


@dataclass(frozen=True)
class SynthOptions:
    """layers: None for the model's own number. width: of all matrices but 8-bit routers; None: bfloat16.

    skew: None for routers that choose all experts about equally often.
    """

    layers: int | None = None
    width: Width | None = FOUR_BITS
    overrides: tuple[Override, ...] = ()
    seed: int = 0
    skew: Skew | None = None


def synthesize(like: str, out: Path, options: SynthOptions, *, progress: Progress, force: bool = False) -> int:
    """Write a checkpoint with the sizes of `like` to the new directory `out`; returns the bytes of its tensors.

    like: a name of SIZES, a config.json or a model directory. Raises UserError.
    """
    config = sizes_of(like, options.layers)
    shapes = tensor_shapes(config)
    rules = WidthRules(str(config["model_type"]), options.width, options.overrides)
    matrices = {path: shape for path, shape in shapes.items() if _is_matrix(path)}
    unmatched = rules.unmatched((path, path) for path in matrices)
    if unmatched:
        raise SynthError(f"override '{unmatched[0]}' matches no matrix; there is, for example: {next(iter(matrices))}")
    widths = {path: rules.choose(path, path, shape[-1], None) for path, shape in matrices.items()}
    factor = None if options.skew is None else router_factor(config, options.skew)
    items = [
        _item(path, shape, widths.get(path), _Numbers(path, options.seed, options.skew, factor))
        for path, shape in shapes.items()
    ]
    _check_space(out, sum(item.nbytes for item in items))
    section = quantization_section(widths, options.width)
    config |= {"eos_token_id": SPECIAL_TOKENS.index("<|im_end|>"), "torch_dtype": "bfloat16"}
    if section is not None:
        config |= {"quantization": section, "quantization_config": section}
    with new_model_directory(out, force=force) as directory:
        write_json(directory / "config.json", config)
        write_tokenizer(directory, config["vocab_size"])
        total = write_model(directory, items, progress)
        check_loads(directory, out)
    return total


def sizes_of(like: str, layers: int | None = None) -> dict[str, Any]:
    """config.json of `like` (see synthesize), with another number of layers if asked. Raises SynthError."""
    if like in SIZES:
        config = dict(SIZES[like])
    else:
        path = Path(like)
        file = path / "config.json" if path.is_dir() else path
        try:
            document = json.loads(file.read_bytes())
        except (OSError, ValueError):
            raise SynthError(f"{like!r} is neither a config.json nor one of: {', '.join(SIZES)}") from None
        text = document.get("text_config")
        config = {**document, **text} if isinstance(text, dict) else document
        config = {key: value for key, value in config.items() if key not in {*_DROPPED_KEYS, "text_config"}}
    name = supported_type(config.get("model_type"))
    if name is None:
        raise SynthError(f"model_type {str(config.get('model_type'))!r} is not one of: {', '.join(MODELS)}")
    config["model_type"] = name
    if layers is not None:
        config["num_hidden_layers"] = layers
        kinds = config.get("layer_types")
        if isinstance(kinds, list):
            config["layer_types"] = [kinds[layer % len(kinds)] for layer in range(layers)]
    return config


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """What the model of this config.json takes: matrices [..., out, in] by module path, other tensors by name."""
    shapes = _Shapes()
    recorded: Any = shapes
    MODELS[str(config["model_type"])].parse(Fields(dict(config))).build(ProgramBuilder(), recorded)
    return shapes.found


class _Shapes:
    """Stands for engine.weights.Weights while a model is recorded: notes what is asked for, takes no memory."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[int, ...]] = {}

    def __contains__(self, name: str) -> bool:
        return True

    def _note(self, name: str, shape: Sequence[int]) -> DenseTensor:
        self.found[name] = tuple(shape)
        return DenseTensor(name, np.broadcast_to(np.float32(0), tuple(shape)))

    def matrix(self, path: str, out_dim: int, in_dim: int, experts: int | None = None) -> DenseTensor:
        return self._note(path, (out_dim, in_dim) if experts is None else (experts, out_dim, in_dim))

    def linear(self, path: str, out_dim: int, in_dim: int, *, bias: bool = False) -> BatchMatvecSpec:
        matrix = self.matrix(path, out_dim, in_dim)
        return BatchMatvecSpec(matrix, self._note(f"{path}.bias", (out_dim,)) if bias else None)

    def norm(self, path: str, dim: int, eps: float) -> Norm:
        return Norm(self._note(f"{path}.weight", (dim,)), eps)

    def tensor(self, name: str, shape: Sequence[int]) -> DenseTensor:
        return self._note(name, shape)

    def skip(self, prefix: str) -> None:
        pass


def router_factor(config: Mapping[str, Any], skew: Skew) -> float:
    """How much larger the logits of a layer's favoured experts must be spread than those of the others.

    Of normal logits those above one threshold are chosen: it lies at one quantile of the favoured, at another of the
    others, and the quotient of the quantiles is the factor. Raises SynthError if no factor gives the skew.
    """
    experts, top_k = config.get("num_experts"), config.get("num_experts_per_tok")
    if not experts or not top_k:
        raise SynthError("a skew was asked for, but the model has no experts")
    chosen = top_k / experts
    favoured = chosen * skew.picks / skew.experts
    others = chosen * (1 - skew.picks) / (1 - skew.experts)
    if not 0 < others <= favoured < 0.5:
        raise SynthError(
            f"{skew.picks:.0%} of the picks cannot fall on {skew.experts:.0%} of the experts where {top_k} of "
            f"{experts} are chosen; ask for less skew"
        )
    normal = NormalDist()
    return normal.inv_cdf(1 - others) / normal.inv_cdf(1 - favoured)


def favoured_experts(path: str, seed: int, experts: int, skew: Skew) -> npt.NDArray[np.intp]:
    """Numbers of the experts that the router at `path` prefers."""
    return _random(f"{path}.favoured", seed).permutation(experts)[: round(skew.experts * experts)]


def _is_matrix(path: str) -> bool:
    return not path.endswith((".weight", ".bias", ".A_log", ".dt_bias"))


@dataclass(frozen=True)
class _Numbers:
    """Random numbers of one tensor: the same whatever else is written."""

    path: str
    seed: int
    skew: Skew | None
    factor: float | None

    def begin(self) -> np.random.Generator:
        return _random(self.path, self.seed)

    def spreads(self, rows: int, in_dim: int, spread: float) -> Iterator[_Spreads]:
        """Of the values of each row, [rows, 1], chunk after chunk."""
        favoured = np.zeros(0, np.intp)
        if self.skew is not None and self.path.endswith(".mlp.gate"):
            favoured = favoured_experts(self.path, self.seed, rows, self.skew)
        step = max(1, _CHUNK_VALUES // in_dim)
        for start in range(0, rows, step):
            spreads = np.full((min(step, rows - start), 1), spread, np.float32)
            spreads[favoured[(favoured >= start) & (favoured < start + step)] - start] *= self.factor or 1.0
            yield spreads


def _item(path: str, shape: tuple[int, ...], width: Width | None, numbers: _Numbers) -> Item:
    if not _is_matrix(path):
        dtype = np.dtype(np.float32) if path.endswith(".A_log") else _BFLOAT16
        info = TensorInfo(path, dtype, shape)
        return Item((info,), lambda: iter([(_vector(path, shape, numbers.begin()).astype(dtype),)]))
    *lead, in_dim = shape
    spread = 1.0 if path.endswith("embed_tokens") else _GAIN / math.sqrt(in_dim)
    chunks = partial(numbers.spreads, math.prod(lead), in_dim, spread)
    if width is None:
        info = TensorInfo(f"{path}.weight", _BFLOAT16, shape)
        return Item((info,), lambda: _dense(numbers.begin(), chunks(), in_dim))
    groups = (*lead, in_dim // width.group_size)
    parts = (
        TensorInfo(f"{path}.weight", np.dtype(np.uint32), (*lead, in_dim * width.bits // 32)),
        TensorInfo(f"{path}.scales", _BFLOAT16, groups),
        TensorInfo(f"{path}.biases", _BFLOAT16, groups),
    )
    return Item(parts, lambda: _quantized(numbers.begin(), chunks(), in_dim, width))


def _random(path: str, seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64([seed, zlib.crc32(path.encode())]))


def _vector(name: str, shape: tuple[int, ...], random: np.random.Generator) -> Array:
    """A norm's weights, a bias, a convolution or the decay of a gated delta net, as trained ones are spread."""
    if name.endswith("A_log"):
        return np.log(random.uniform(0.5, 8, shape))
    noise = random.standard_normal(shape)
    return 1 + 0.1 * noise if name.endswith("norm.weight") else 0.5 * noise


def _dense(random: np.random.Generator, chunks: Iterator[_Spreads], in_dim: int) -> Iterator[tuple[Array, ...]]:
    for spreads in chunks:
        yield ((random.standard_normal((len(spreads), in_dim), np.float32) * spreads).astype(_BFLOAT16),)


def _quantized(
    random: np.random.Generator, chunks: Iterator[_Spreads], in_dim: int, width: Width
) -> Iterator[tuple[Array, ...]]:
    """Codes are even; scales differ from group to group; the values' mean is zero."""
    steps = 2**width.bits - 1
    for spreads in chunks:
        rows, step = len(spreads), 2 * spreads * math.sqrt(3) / steps
        codes = random.integers(0, 1 << 32, (rows, in_dim * width.bits // 32), np.uint32)
        scales = (step * random.uniform(0.7, 1.3, (rows, in_dim // width.group_size))).astype(_BFLOAT16)
        yield codes, scales, (scales.astype(np.float32) * np.float32(-steps / 2)).astype(_BFLOAT16)


def _check_space(out: Path, size: int) -> None:
    place = out.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if size > free:
        raise SynthError(f"the checkpoint takes {size / 1e9:.1f} GB; {place} has {free / 1e9:.1f} GB free")
