"""A program's work as launches of the kernels for few rows, over arrays that stay where they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mixbit.kernels import ops
from mixbit.kernels.cuda import feed_forward, mixers
from mixbit.kernels.cuda.compiler import Source
from mixbit.kernels.cuda.driver import Buffer, Device
from mixbit.kernels.cuda.feed_forward import MoeWeights
from mixbit.kernels.cuda.linear import FoldedNorm, Kind, Output, linear
from mixbit.kernels.cuda.mixers import AttentionParts, DeltaParts, columns
from mixbit.kernels.cuda.plan import NULL, SCALES, Planned, Scratch, group_of, padded
from mixbit.kernels.cuda.pools import Pool
from mixbit.kernels.cuda.prefill_moe import MlpWeights
from mixbit.kernels.cuda.step import StepData
from mixbit.kernels.cuda.weights import Store
from mixbit.kernels.cuda.works import Work, share_memory
from mixbit.kernels.executor import CacheConfig
from mixbit.kernels.spec import Matrix

_THREADS = 256  # of kernels on rows


@dataclass(frozen=True, eq=False)
class Bound:
    """What belongs to a program, however many rows a step has: weights and pools."""

    device: Device
    kind: Kind
    store: Store
    block_size: int
    attentions: tuple[AttentionParts, ...]
    deltas: tuple[DeltaParts, ...]
    kv_pools: tuple[Pool, ...]
    state_pools: tuple[Pool, ...]

    @classmethod
    def of(cls, program: ops.Program, cache: CacheConfig, device: Device, kind: Kind, store: Store) -> Bound:
        """Allocate the pools and upload the small parameters."""
        width = 4 if kind.dtype == "float32" else 2
        kv_pools, state_pools, attentions, deltas = [], [], [], []
        for node in program.attentions:
            spec = node.spec
            each = cache.block_size * spec.kv_heads * spec.head_dim * width
            keys, values = (Pool.zeros(device, cache.blocks, each) for _ in range(2))
            kv_pools += [keys, values]
            q_norm, k_norm = (
                None if norm is None else store.vector(norm.weight) for norm in (spec.q_norm, spec.k_norm)
            )
            inv_freq = None if spec.rope is None else store.vector(spec.rope.inv_freq)
            attentions.append(AttentionParts(q_norm, k_norm, inv_freq, keys.buffer, values.buffer))
        for delta in program.gated_deltas:
            net = delta.spec
            conv = Pool.zeros(device, cache.state_slots, (net.kernel - 1) * net.channels * width)
            memory = Pool.zeros(device, cache.state_slots, net.value_heads * net.value_dim * net.key_dim * 4)
            state_pools += [conv, memory]
            rate = store.vector(-np.exp(net.a_log.data.astype(np.float32)))
            small = (store.vector(part) for part in (net.conv, net.dt_bias, net.norm.weight))
            taps, dt_bias, norm = small
            deltas.append(DeltaParts(taps, rate, dt_bias, norm, conv.buffer, memory.buffer))
        return cls(
            device, kind, store, cache.block_size, tuple(attentions), tuple(deltas), tuple(kv_pools), tuple(state_pools)
        )


class Lowering:
    """Work over arrays for at most `most` rows. Call `planned` for each number of rows."""

    def __init__(self, program: ops.Program, works: Sequence[Work], bound: Bound, data: StepData, most: int) -> None:
        self.works, self._bound, self._data = tuple(works), bound, data
        self.logits, device = program.logits, bound.device
        width = 4 if bound.kind.dtype == "float32" else 2
        places, dims = share_memory(works, program.logits)
        memory = [device.alloc(most * dim * width) for dim in dims]
        self.places: Mapping[ops.Value, Buffer] = {value: memory[place] for value, place in places.items()}
        self.scratch = Scratch(device)

    def planned(self, work: Work, rows: int, sequences: int, logits: Buffer) -> list[Planned]:
        """The launches of one work. rows: of its values. logits: float32 [rows, vocab], filled by the last work."""
        made = self._planned(work, rows, sequences, logits)
        if self.logits in work.writes and not isinstance(work.node, ops.BatchMatvec):
            made.append(self._rows("to_logits", rows, self.logits.dim, self.places[self.logits], logits))
        return made

    def _planned(self, work: Work, rows: int, sequences: int, logits: Buffer) -> list[Planned]:
        bound, at, node = self._bound, self.places, work.node
        kind, store = bound.kind, bound.store
        x = at[work.reads[0]] if work.reads else None
        norm = None if work.norm is None else FoldedNorm(store.values(work.norm.weight), work.norm.eps)
        residual = None if work.residual is None else at[work.residual]
        out = at[work.writes[0]]
        match node:
            case ops.Embed(table):
                return [self._embed(table, rows, out)]
            case ops.RmsNorm(_, plain):
                return [self._norm(plain, rows, (NULL, NULL), at[node.x], out)]
            case ops.AddNorm(_, delta, plain, total, normed):
                return [self._norm(plain, rows, (at[delta], at[total]), at[node.x], at[normed])]
            case ops.SelectRows(value):
                return [self._rows("select", rows, value.dim, at[value], self._data.logit_rows, out)]
            case ops.BatchMatvec(_, specs, _):
                assert x is not None
                outputs = [
                    Output(
                        store.matrix(spec.matrix),
                        logits if value is self.logits else at[value],
                        None if spec.bias is None else store.vector(spec.bias),
                        exact=value is self.logits,
                    )
                    for spec, value in zip(specs, work.writes, strict=True)
                ]
                return [linear(kind, x, outputs, rows, norm=norm, residual=residual)]
            case ops.Mlp(_, mlp_spec):
                assert x is not None
                return feed_forward.mlp(kind, self._mlp(mlp_spec), x, out, self.scratch, rows, residual)
            case ops.Moe(_, spec):
                assert x is not None
                return feed_forward.moe(kind, self._moe(spec), x, out, self.scratch, rows, norm, residual)
            case ops.Attention(q, k, v, gate):
                inputs = (self._columns(q), self._columns(k), self._columns(v), self._columns(gate))
                parts = bound.attentions[node.cache]
                return mixers.attention(
                    kind, node, bound.block_size, parts, inputs, out, self.scratch, self._data, rows
                )
            case ops.GatedDelta(q, k, v, z, b, a):
                columns_of = tuple(self._columns(part) for part in (q, k, v, z, b, a))
                return [mixers.delta(kind, node, bound.deltas[node.cache], columns_of, out, self._data, sequences)]

    def _columns(self, part: ops.Columns | None) -> np.void:
        return columns(part, None if part is None else self.places[part.value])

    def _mlp(self, spec: ops.MlpSpec) -> MlpWeights:
        return MlpWeights(*(self._bound.store.matrix(matrix) for matrix in (spec.gate, spec.up, spec.down)))

    def _moe(self, spec: ops.MoeSpec) -> MoeWeights:
        store = self._bound.store
        return MoeWeights(
            store.matrix(spec.router),
            self._mlp(spec.experts),
            spec.top_k,
            spec.normalize,
            None if spec.shared is None else self._mlp(spec.shared),
            None if spec.shared_gate is None else store.matrix(spec.shared_gate),
        )

    def _embed(self, table: Matrix, rows: int, out: Buffer) -> Planned:
        weights = self._bound.store.matrix(table)
        defines = (
            *self._bound.kind.defines,
            f"DIM {weights.depth}",
            f"BITS {weights.format.bits}",
            f"GROUP {group_of(weights)}",
            f"PITCH {padded(weights)}",
            f"SCALE {SCALES[weights.format.dtype]}",
        )
        parts = (NULL if part is None else part for part in (weights.codes, weights.scales, weights.biases))
        arguments = (*parts, self._data.tokens, out)
        return Planned(Source("embed.cu", defines), "embed", (rows, 1, 1), _THREADS, arguments)

    def _norm(
        self, norm: ops.Norm, rows: int, added: tuple[Buffer | np.uint64, Buffer | np.uint64], x: Buffer, out: Buffer
    ) -> Planned:
        delta, total = added
        weight = self._bound.store.vector(norm.weight)
        dim = norm.weight.data.size
        arguments = (x, delta, weight, np.float32(norm.eps), total, out, np.int32(dim))
        return Planned(self._source(), "rms_norm", (rows, 1, 1), _THREADS, arguments)

    def _rows(self, kernel: str, rows: int, dim: int, *arguments: Buffer | np.uint64) -> Planned:
        return Planned(self._source(), kernel, (rows, 1, 1), _THREADS, (*arguments, np.int32(dim)))

    def _source(self) -> Source:
        return Source("rows.cu", self._bound.kind.defines)
