"""The op table: the verbs a model is written in.

A model file calls these verbs on a `ProgramBuilder` once, at load. The result is a `Program`: a flat
list of nodes over values of shape [rows, dim]. Each backend turns the program into an `Executor`
(see executor.py) that replays it every step, so that Python is not between the ops, and so that a
backend may fuse neighbours. `mixbit.kernels.reference` runs the same program in NumPy and defines
what every node means.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from mixbit.kernels.spec import BatchMatvecSpec, DenseTensor, Matrix


class Rows(Enum):
    """How many rows a value has in a step."""

    TOKENS = "tokens"  # one for each token of the batch
    SELECTED = "selected"  # one for each row whose logits are wanted


@dataclass(frozen=True, eq=False)
class Value:
    """A float activation of shape [rows, dim], named by its place in the program."""

    index: int
    dim: int
    rows: Rows


@dataclass(frozen=True)
class Columns:
    """Where the vectors of each head lie within a row: head h starts at `offset + h * stride`.

    One description serves fused projections, whose outputs are interleaved per head, and separate ones.
    """

    value: Value
    offset: int
    stride: int


@dataclass(frozen=True, eq=False)
class Norm:
    """Root-mean-square norm: x / sqrt(mean(x^2) + eps) * weight, in float32. weight: [dim]."""

    weight: DenseTensor
    eps: float


@dataclass(frozen=True, eq=False)
class Rope:
    """Rotary position embedding on the first 2 * len(inv_freq) values of each head.

    inv_freq: float32 [rotated / 2]; pairs are (i, i + rotated / 2), the angle is position * inv_freq[i].
    scale multiplies cos and sin (YaRN's attention factor; 1 otherwise).
    """

    inv_freq: npt.NDArray[np.float32]
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class AttentionSpec:
    """Causal grouped-query attention over the paged KV cache.

    Per head: optional RMS norm of q and k, RoPE, write k and v to the cache at the token's position,
    softmax(scale * q k^T) v over positions 0..own. Query head h reads KV head h // (heads // kv_heads).
    With a gate, the output is multiplied by sigmoid(gate), elementwise.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: Rope | None
    q_norm: Norm | None = None
    k_norm: Norm | None = None


@dataclass(frozen=True, eq=False)
class GatedDeltaSpec:
    """Gated delta net (Qwen3-Next's linear attention). conv: [channels, kernel] over q | k | v.

    channels = 2 * key_heads * key_dim + value_heads * value_dim. The state of a sequence is the last
    kernel - 1 inputs of the convolution and S [value_heads, value_dim, key_dim], float32.
    Value head h belongs to key head h // (value_heads // key_heads). After the convolution q and k are
    divided by sqrt(sum of squares + 1e-6), and q by sqrt(key_dim).
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv: DenseTensor
    a_log: DenseTensor  # [value_heads]
    dt_bias: DenseTensor  # [value_heads]
    norm: Norm  # weight [value_dim]

    @property
    def kernel(self) -> int:
        """Taps of the convolution."""
        return int(self.conv.data.shape[1])

    @property
    def channels(self) -> int:
        """Channels of the convolution: q, then k, then v, each head after head."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


@dataclass(frozen=True, eq=False)
class MlpSpec:
    """SwiGLU feed-forward: down(silu(gate(x)) * up(x)). For experts each matrix is a stack [E, ...]."""

    gate: Matrix
    up: Matrix
    down: Matrix


@dataclass(frozen=True, eq=False)
class MoeSpec:
    """Mixture of experts: softmax over all router logits in float32, then the top_k largest (equal
    logits: the lower expert first), renormalised to sum 1 only if `normalize`; the weighted sum of the chosen
    experts, plus sigmoid(shared_gate x) * shared(x) where there is a shared expert (without
    shared_gate the factor is 1).
    """

    router: Matrix
    experts: MlpSpec
    top_k: int
    normalize: bool
    shared: MlpSpec | None = None
    shared_gate: Matrix | None = None


@dataclass(frozen=True, eq=False)
class Embed:
    """out[t] = table[token[t]]."""

    table: Matrix
    out: Value


@dataclass(frozen=True, eq=False)
class RmsNorm:
    """out = norm(x)."""

    x: Value
    norm: Norm
    out: Value


@dataclass(frozen=True, eq=False)
class AddNorm:
    """total = x + delta; out = norm(total)."""

    x: Value
    delta: Value
    norm: Norm
    total: Value
    out: Value


@dataclass(frozen=True, eq=False)
class BatchMatvec:
    """outs[i] = specs[i].matrix @ x (+ bias)."""

    x: Value
    specs: tuple[BatchMatvecSpec, ...]
    outs: tuple[Value, ...]


@dataclass(frozen=True, eq=False)
class Attention:
    """Attention of one layer. `cache` counts attention layers: it picks the KV pool."""

    q: Columns  # head_dim values for each query head
    k: Columns  # head_dim values for each KV head
    v: Columns
    gate: Columns | None  # head_dim values for each query head
    spec: AttentionSpec
    cache: int
    out: Value


@dataclass(frozen=True, eq=False)
class GatedDelta:
    """Gated delta net of one layer. `cache` counts such layers: it picks the state pool.

    Columns are per key head, with r = value_heads / key_heads: q, k: key_dim values;
    v, z: r * value_dim; b, a: r.
    """

    q: Columns
    k: Columns
    v: Columns
    z: Columns
    b: Columns
    a: Columns
    spec: GatedDeltaSpec
    cache: int
    out: Value  # [rows, value_heads * value_dim]


@dataclass(frozen=True, eq=False)
class Mlp:
    """out = SwiGLU feed-forward of x."""

    x: Value
    spec: MlpSpec
    out: Value


@dataclass(frozen=True, eq=False)
class Moe:
    """out = mixture of experts of x."""

    x: Value
    spec: MoeSpec
    out: Value


@dataclass(frozen=True, eq=False)
class SelectRows:
    """out[i] = x[batch.logit_rows[i]]."""

    x: Value
    out: Value


Node = Embed | RmsNorm | AddNorm | BatchMatvec | Attention | GatedDelta | Mlp | Moe | SelectRows


def outputs_of(node: Node) -> tuple[Value, ...]:
    """Values that a node makes."""
    match node:
        case AddNorm():
            return (node.total, node.out)
        case BatchMatvec():
            return node.outs
        case _:
            return (node.out,)


def kind(node: Node) -> str:
    """The node's class in snake case ("batch_matvec"): its name in profiles."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(node).__name__).lower()


@dataclass(frozen=True, eq=False)
class Program:
    """A model's step: nodes in order; `values[v.index] is v`; `logits` is the output, [selected, vocab]."""

    nodes: tuple[Node, ...]
    values: tuple[Value, ...]
    logits: Value

    @property
    def hidden(self) -> Value:
        """What the head is applied to: the last layer's output after the final norm, [selected, dim].

        The logits themselves in a program without a head.
        """
        heads = (node for node in self.nodes if isinstance(node, BatchMatvec) and self.logits in node.outs)
        return next((head.x for head in heads), self.logits)

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """The attention layers, in the order of their caches."""
        return tuple(node for node in self.nodes if isinstance(node, Attention))

    @property
    def gated_deltas(self) -> tuple[GatedDelta, ...]:
        """The gated delta layers, in the order of their states."""
        return tuple(node for node in self.nodes if isinstance(node, GatedDelta))


def _check_dim(what: str, got: int, expected: int) -> None:
    if got != expected:
        raise ValueError(f"{what}: {got} values, expected {expected}")


def _check_multiple(what: str, got: int, of: int) -> None:
    if got % of:
        raise ValueError(f"{what}: {got} is not a multiple of {of}")


def _check_columns(what: str, columns: Columns, count: int, width: int) -> None:
    end = columns.offset + (count - 1) * columns.stride + width
    if columns.offset < 0 or columns.stride < width or end > columns.value.dim:
        raise ValueError(
            f"{what}: {count} heads of {width} from {columns.offset} by {columns.stride} "
            f"do not fit in rows of {columns.value.dim}"
        )


def _check_mlp(spec: MlpSpec, dim: int, experts: int | None) -> None:
    for matrix in (spec.gate, spec.up, spec.down):
        if matrix.experts != experts:
            raise ValueError(f"{matrix.name}: a stack of {matrix.experts} experts, expected {experts}")
    for matrix in (spec.gate, spec.up):
        _check_dim(f"columns of {matrix.name}", matrix.in_dim, dim)
    _check_dim(f"rows of {spec.up.name}", spec.up.out_dim, spec.gate.out_dim)
    _check_dim(f"columns of {spec.down.name}", spec.down.in_dim, spec.gate.out_dim)
    _check_dim(f"rows of {spec.down.name}", spec.down.out_dim, dim)


class ProgramBuilder:
    """Records the verbs a model calls. Every verb checks its shapes and returns the value it makes."""

    def __init__(self) -> None:
        self._nodes: list[Node] = []
        self._values: list[Value] = []
        self._attentions = 0
        self._gated_deltas = 0

    def _value(self, dim: int, rows: Rows = Rows.TOKENS) -> Value:
        value = Value(len(self._values), dim, rows)
        self._values.append(value)
        return value

    def embed(self, table: Matrix) -> Value:
        """Rows of `table` [vocab, dim] for the tokens of the batch."""
        out = self._value(table.in_dim)
        self._nodes.append(Embed(table, out))
        return out

    def rms_norm(self, x: Value, norm: Norm) -> Value:
        """norm(x)."""
        _check_dim(norm.weight.name, norm.weight.data.size, x.dim)
        out = self._value(x.dim, x.rows)
        self._nodes.append(RmsNorm(x, norm, out))
        return out

    def add_norm(self, x: Value, delta: Value, norm: Norm) -> tuple[Value, Value]:
        """(x + delta, norm(x + delta)): the residual and the next layer's input."""
        _check_dim("residual", delta.dim, x.dim)
        _check_dim(norm.weight.name, norm.weight.data.size, x.dim)
        total, out = self._value(x.dim, x.rows), self._value(x.dim, x.rows)
        self._nodes.append(AddNorm(x, delta, norm, total, out))
        return total, out

    def batch_matvec(self, x: Value, *specs: BatchMatvecSpec) -> tuple[Value, ...]:
        """Every spec's matrix applied to the same x, in one call, each at its own width."""
        for spec in specs:
            _check_dim(spec.matrix.name, spec.in_dim, x.dim)
        outs = tuple(self._value(spec.out_dim, x.rows) for spec in specs)
        self._nodes.append(BatchMatvec(x, specs, outs))
        return outs

    def attention(self, q: Columns, k: Columns, v: Columns, spec: AttentionSpec, gate: Columns | None = None) -> Value:
        """Attention over the sequence's KV cache; returns [tokens, heads * head_dim]."""
        _check_multiple("query heads", spec.heads, of=spec.kv_heads)
        for name, columns, count in (
            ("q", q, spec.heads),
            ("k", k, spec.kv_heads),
            ("v", v, spec.kv_heads),
            ("gate", gate, spec.heads),
        ):
            if columns is not None:
                _check_columns(name, columns, count, spec.head_dim)
        for norm in (spec.q_norm, spec.k_norm):
            if norm is not None:
                _check_dim(norm.weight.name, norm.weight.data.size, spec.head_dim)
        if spec.rope is not None and 2 * len(spec.rope.inv_freq) > spec.head_dim:
            raise ValueError(f"rope: {2 * len(spec.rope.inv_freq)} values rotated of a head of {spec.head_dim}")
        out = self._value(spec.heads * spec.head_dim)
        self._nodes.append(Attention(q, k, v, gate, spec, self._attentions, out))
        self._attentions += 1
        return out

    def gated_delta(
        self, q: Columns, k: Columns, v: Columns, z: Columns, b: Columns, a: Columns, spec: GatedDeltaSpec
    ) -> Value:
        """Gated delta net over the sequence's state; returns [tokens, value_heads * value_dim]."""
        _check_multiple("value heads", spec.value_heads, of=spec.key_heads)
        ratio = spec.value_heads // spec.key_heads
        for name, columns, width in (
            ("q", q, spec.key_dim),
            ("k", k, spec.key_dim),
            ("v", v, ratio * spec.value_dim),
            ("z", z, ratio * spec.value_dim),
            ("b", b, ratio),
            ("a", a, ratio),
        ):
            _check_columns(name, columns, spec.key_heads, width)
        _check_dim(spec.conv.name, spec.conv.data.shape[0], spec.channels)
        for tensor in (spec.a_log, spec.dt_bias):
            _check_dim(tensor.name, tensor.data.size, spec.value_heads)
        _check_dim(spec.norm.weight.name, spec.norm.weight.data.size, spec.value_dim)
        out = self._value(spec.value_heads * spec.value_dim)
        self._nodes.append(GatedDelta(q, k, v, z, b, a, spec, self._gated_deltas, out))
        self._gated_deltas += 1
        return out

    def mlp(self, x: Value, spec: MlpSpec) -> Value:
        """SwiGLU feed-forward."""
        _check_mlp(spec, x.dim, experts=None)
        out = self._value(spec.down.out_dim, x.rows)
        self._nodes.append(Mlp(x, spec, out))
        return out

    def moe(self, x: Value, spec: MoeSpec) -> Value:
        """Mixture of experts."""
        _check_dim(f"columns of {spec.router.name}", spec.router.in_dim, x.dim)
        _check_mlp(spec.experts, x.dim, experts=spec.router.out_dim)
        if not 1 <= spec.top_k <= spec.router.out_dim:
            raise ValueError(f"{spec.top_k} experts a token, but {spec.router.name} scores {spec.router.out_dim}")
        if spec.shared is not None:
            _check_mlp(spec.shared, x.dim, experts=None)
        if spec.shared_gate is not None:
            _check_dim(f"rows of {spec.shared_gate.name}", spec.shared_gate.out_dim, 1)
            _check_dim(f"columns of {spec.shared_gate.name}", spec.shared_gate.in_dim, x.dim)
        out = self._value(spec.experts.down.out_dim, x.rows)
        self._nodes.append(Moe(x, spec, out))
        return out

    def select_rows(self, x: Value) -> Value:
        """Keep the rows whose logits the batch asks for."""
        out = self._value(x.dim, Rows.SELECTED)
        self._nodes.append(SelectRows(x, out))
        return out

    def build(self, logits: Value) -> Program:
        """The finished program; `logits` must have SELECTED rows."""
        if logits.rows is not Rows.SELECTED:
            raise ValueError("logits must be computed from selected rows")
        return Program(tuple(self._nodes), tuple(self._values), logits)
