"""What a checkpoint is made of: every class of tensor with its width, and what running it takes.

The classes come from the program, so that what is listed is what is run, at the widths it is run at.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from mixbit.engine.config import EngineConfig
from mixbit.engine.loader import LoadedModel, load
from mixbit.engine.protocol import ModelDescription, TensorClass
from mixbit.engine.sizing import available_memory, block_bytes, slot_bytes
from mixbit.engine.streaming import Streaming, describe_streaming
from mixbit.kernels.ops import (
    AddNorm,
    Attention,
    BatchMatvec,
    Embed,
    GatedDelta,
    Mlp,
    MlpSpec,
    Moe,
    MoeSpec,
    Node,
    RmsNorm,
)
from mixbit.kernels.spec import BatchMatvecSpec, Matrix, QuantizedTensor

_ROLES = {
    "q_proj": "attention q",
    "k_proj": "attention k",
    "v_proj": "attention v",
    "o_proj": "attention o",
    "out_proj": "delta net out",
    "lm_head": "head",
}
_ORDER = ("embedding", "attention", "delta", "mlp", "router", "shared", "experts", "norm", "final", "head")
_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
CACHE_VALUE_BYTES = 4  # KV values are float32 on the CPU


@dataclass(frozen=True)
class OverrideClass:
    """Overrides of config.json that differ by the number of the layer alone; `sets`: the width, for people."""

    modules: str
    sets: str
    count: int


@dataclass(frozen=True)
class Memory:
    """Bytes. available: what can be allocated on this machine now. state: of one sequence, whatever its length.

    cache_token: keys and values of one token, in float32. full_context: one sequence at the model's context
    length. tokens: cached tokens there is room for beside the weights.
    """

    available: int
    weights: int
    cache_token: int
    state: int
    full_context: int
    tokens: int | None

    @property
    def fits(self) -> bool:
        """Whether the weights and a first sequence of 1,000 tokens fit."""
        return self.weights + self.state + 1000 * self.cache_token <= self.available


@dataclass(frozen=True)
class Report:
    """All that `mixbit inspect` tells."""

    path: str
    model_type: str
    layers: Mapping[str, int]
    vocab_size: int
    context_length: int
    experts: tuple[int, int] | None  # (active per token, all)
    classes: tuple[TensorClass, ...]
    overrides: tuple[OverrideClass, ...]
    skipped: Mapping[str, int]  # part of the checkpoint -> tensors
    warnings: tuple[str, ...]
    memory: Memory
    streaming: Streaming | None  # None if all stay in memory

    @property
    def parameters(self) -> int:
        """Values of all tensors."""
        return sum(each.parameters for each in self.classes)

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(each.size for each in self.classes)

    @property
    def token_bytes(self) -> int:
        """Bytes of weights that one token of one sequence reads."""
        return sum(each.token_bytes for each in self.classes)

    def as_json(self) -> dict[str, Any]:
        """Everything, with the sums."""
        sums = {"parameters": self.parameters, "size": self.size, "token_bytes": self.token_bytes}
        document: dict[str, Any] = msgspec.to_builtins(self)
        document |= sums | {"bits_per_weight": round(8 * self.size / self.parameters, 3)}
        document["memory"]["fits"] = self.memory.fits
        document["experts"] = self.experts and {"active": self.experts[0], "total": self.experts[1]}
        return document


@dataclass
class _Entry:
    """One tensor as a node uses it. active: the part of it that one token reads."""

    role: str
    tensor: Matrix
    active: float = 1.0


@dataclass(frozen=True)
class _Format:
    """What the tensors of a class have in common; see TensorClass."""

    role: str
    shape: tuple[int, ...]
    bits: int | None
    group_size: int | None
    mode: str | None
    dtype: str


@dataclass
class _Sum:
    count: int = 0
    parameters: int = 0
    size: int = 0
    token_bytes: float = 0.0
    layers: set[int] = field(default_factory=set)
    overrides: dict[str, None] = field(default_factory=dict)


def describe(model: LoadedModel) -> ModelDescription:
    """What `model` is made of, at the widths it is run at."""
    moe = next((node.spec for node in model.program.nodes if isinstance(node, Moe)), None)
    kinds = Counter(type(node) for node in model.program.nodes)
    layers = {"attention": kinds[Attention], "delta net": kinds[GatedDelta], "mlp": kinds[Mlp], "experts": kinds[Moe]}
    return ModelDescription(
        model_type=model.model_type,
        layers={kind: count for kind, count in layers.items() if count},
        experts=(moe.top_k, moe.router.out_dim) if moe else None,
        classes=_classes(model),
    )


def inspect_model(path: Path, *, available: int | None = None, config: EngineConfig | None = None) -> Report:
    """Describe the model directory at `path` without reading its weights, but for some experts if they are streamed.

    available: bytes of memory to judge by; None takes what this machine has now. config: how it would be served; None
    tells nothing of streaming. Raises CheckpointError for whatever would keep the model from being served.
    """
    model = load(path)
    description = describe(model)
    return Report(
        path=str(path),
        model_type=description.model_type,
        layers=description.layers,
        vocab_size=model.vocab_size,
        context_length=model.context_length,
        experts=description.experts,
        classes=description.classes,
        overrides=_overrides(model),
        skipped=dict(Counter(_part(name) for name in model.skipped)),
        warnings=model.warnings,
        memory=_memory(model, available_memory() if available is None else available),
        streaming=None if config is None else describe_streaming(model, config),
    )


def _classes(model: LoadedModel) -> tuple[TensorClass, ...]:
    sums: dict[_Format, _Sum] = {}
    seen: set[str] = set()
    tied = _tied_head(model)
    for entry in (entry for node in model.program.nodes for entry in _entries(node)):
        tensor = entry.tensor
        total = sums.setdefault(_format("embedding and head" if tensor.name == tied else entry.role, tensor), _Sum())
        total.token_bytes += tensor.nbytes * entry.active
        if tensor.name in seen:
            continue
        seen.add(tensor.name)
        total.count += 1
        total.size += tensor.nbytes
        total.parameters += _parameters(tensor)
        if layer := _LAYER.search(tensor.name):
            total.layers.add(int(layer[0]))
        override = model.quantization.keys.get(tensor.name)
        if override is not None:
            total.overrides[override] = None
    classes = (
        TensorClass(
            **vars(kind),
            count=total.count,
            parameters=total.parameters,
            size=total.size,
            token_bytes=round(total.token_bytes),
            layers=tuple(sorted(total.layers)),
            overrides=tuple(total.overrides),
        )
        for kind, total in sums.items()
    )
    return tuple(sorted(classes, key=lambda each: _ORDER.index(each.role.split()[0])))


def _tied_head(model: LoadedModel) -> str | None:
    """Name of the matrix that is embedding and head at once."""
    tables = {node.table.name for node in model.program.nodes if isinstance(node, Embed)}
    applied = {spec.matrix.name for node in model.program.nodes if isinstance(node, BatchMatvec) for spec in node.specs}
    return next(iter(tables & applied), None)


def _format(role: str, tensor: Matrix) -> _Format:
    if isinstance(tensor, QuantizedTensor):
        shape = (*tensor.weight.shape[:-1], tensor.in_dim)
        return _Format(role, shape, tensor.bits, tensor.group_size, tensor.mode, tensor.scales.dtype.name)
    return _Format(role, tensor.data.shape, None, None, None, tensor.data.dtype.name)


def _parameters(tensor: Matrix) -> int:
    if isinstance(tensor, QuantizedTensor):
        return int(tensor.weight.size) * 32 // tensor.bits
    return int(tensor.data.size)


def _entries(node: Node) -> Iterator[_Entry]:
    """The tensors of a node."""
    match node:
        case Embed():
            yield _Entry("embedding", node.table, 1 / node.table.out_dim)
        case RmsNorm() | AddNorm():
            role = "norm" if _LAYER.search(node.norm.weight.name) else "final norm"
            yield _Entry(role, node.norm.weight)
        case BatchMatvec():
            for spec in node.specs:
                yield from _linear(spec)
        case Attention():
            for norm in (node.spec.q_norm, node.spec.k_norm):
                if norm is not None:
                    yield _Entry("attention q/k norm", norm.weight)
        case GatedDelta():
            yield _Entry("delta net conv", node.spec.conv)
            yield _Entry("delta net norm", node.spec.norm.weight)
            yield _Entry("delta net decay", node.spec.a_log)
            yield _Entry("delta net decay", node.spec.dt_bias)
        case Mlp():
            yield from _mlp("mlp", node.spec)
        case Moe():
            yield from _moe(node.spec)


def _linear(spec: BatchMatvecSpec) -> Iterator[_Entry]:
    last = spec.matrix.name.rpartition(".")[2]
    role = _ROLES.get(last) or f"delta net {last.removeprefix('in_proj_')}"
    yield _Entry(role, spec.matrix)
    if spec.bias is not None:
        yield _Entry(f"{role} bias", spec.bias)


def _mlp(role: str, spec: MlpSpec, active: float = 1.0) -> Iterator[_Entry]:
    yield _Entry(f"{role} gate/up", spec.gate, active)
    yield _Entry(f"{role} gate/up", spec.up, active)
    yield _Entry(f"{role} down", spec.down, active)


def _moe(spec: MoeSpec) -> Iterator[_Entry]:
    yield _Entry("router", spec.router)
    if spec.shared_gate is not None:
        yield _Entry("shared gate", spec.shared_gate)
    if spec.shared is not None:
        yield from _mlp("shared expert", spec.shared)
    yield from _mlp("experts", spec.experts, spec.top_k / spec.router.out_dim)


def _overrides(model: LoadedModel) -> tuple[OverrideClass, ...]:
    """The overrides in effect."""
    found: Counter[tuple[str, str]] = Counter()
    for path, key in model.quantization.keys.items():
        if path in model.bindings:
            scheme = model.bindings[path].scheme
            found[_LAYER.sub("*", key), "unquantized" if scheme is None else str(scheme)] += 1
    return tuple(OverrideClass(modules, sets, count) for (modules, sets), count in found.items())


def _part(name: str) -> str:
    """The part of a checkpoint a skipped tensor belongs to: "vision_tower", "model.visual", "mtp"."""
    pieces = name.split(".")
    return ".".join(pieces[:2]) if pieces[0] in ("model", "language_model") else pieces[0]


def _memory(model: LoadedModel, available: int) -> Memory:
    token = block_bytes(model.program, 1, CACHE_VALUE_BYTES)
    state = slot_bytes(model.program)
    room = max(0, available - model.weight_bytes - state)
    return Memory(
        available=available,
        weights=model.weight_bytes,
        cache_token=token,
        state=state,
        full_context=token * model.context_length + state,
        tokens=room // token if token else None,
    )
