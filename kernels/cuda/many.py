"""The layers of a program for steps of many rows: the prefill kernels where they apply."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mixbit.kernels import ops
from mixbit.kernels.cuda import prefill_attention, prefill_delta, prefill_linear, prefill_moe, prefill_rows
from mixbit.kernels.cuda.compiler import Source
from mixbit.kernels.cuda.driver import Buffer, Launch
from mixbit.kernels.cuda.lowering import Bound, Lowering
from mixbit.kernels.cuda.prefill import CHUNK, F32, LEAST_TOKENS, QUERIES, Modules, Plan, Size, Tables
from mixbit.kernels.cuda.prefill_attention import AttentionPlaces, PrefillAttention
from mixbit.kernels.cuda.prefill_delta import DeltaPlaces, DeltaScratch, PrefillDelta
from mixbit.kernels.cuda.prefill_linear import Linear, Output
from mixbit.kernels.cuda.prefill_moe import MlpWeights, Moe, MoeScratch
from mixbit.kernels.cuda.prefill_rows import AddNorm
from mixbit.kernels.cuda.step import StepData
from mixbit.kernels.cuda.works import Work
from mixbit.kernels.executor import Batch

MOST_SEQUENCES = 64
"""Of a step that these layers take."""


class _ByRows(Protocol):
    @property
    def sources(self) -> tuple[Source, ...]: ...
    def launches(self, modules: Modules, rows: int, /) -> list[Launch]: ...


class _BySize(Protocol):
    @property
    def sources(self) -> tuple[Source, ...]: ...
    def launches(self, modules: Modules, size: Size, /) -> list[Launch]: ...


@dataclass(frozen=True, eq=False)
class Layer:
    """One node, by how many rows its value has, or by the size of the step."""

    by_rows: _ByRows | None = None
    by_size: _BySize | None = None

    @property
    def sources(self) -> tuple[Source, ...]:
        """What must be compiled."""
        return tuple(source for part in (self.by_rows, self.by_size) if part is not None for source in part.sources)

    def worthwhile(self, rows: int) -> bool:
        """Whether it serves so many rows better than the kernels for few."""
        return self.by_size is not None or rows >= LEAST_TOKENS

    def launches(self, modules: Modules, size: Size, rows: int) -> list[Launch]:
        """The node's launches; rows: of its value."""
        if self.by_rows is not None:
            return self.by_rows.launches(modules, rows)
        assert self.by_size is not None
        return self.by_size.launches(modules, size)


class PlanData:
    """Where the plan of a step lies on the device."""

    def __init__(self, bound: Bound, rows: int) -> None:
        self._device = bound.device
        chunks, tiles = (4 * Plan.most(rows, MOST_SEQUENCES, each) for each in (CHUNK, QUERIES))
        counts = (chunks, tiles, MOST_SEQUENCES)
        self._host = [self._device.pinned((count,), np.dtype(np.int32)) for count in counts]
        self._memory = [self._device.alloc(4 * count) for count in counts]

    def upload(self, batch: Batch) -> Size:
        """Enqueue the copy of a batch's plan."""
        plan = Plan.of(batch)
        for memory, host, part in zip(
            self._memory, self._host, (plan.chunks, plan.tiles, plan.first_chunks), strict=True
        ):
            host[: part.size] = part.reshape(-1)
            self._device.send(memory, host[: part.size])
        return plan.size

    def tables(self, data: StepData) -> Tables:
        """The tables of a step, for the layers."""
        chunks, tiles, first = self._memory
        starts, contexts, slots = (data.at(i) for i in (3, 4, 5))
        return Tables(chunks, first, tiles, starts, contexts, slots, data.tables, data.width)


class Layers:
    """What runs each node of many rows. None for a node that the kernels for few rows must do."""

    def __init__(self, bound: Bound, lowering: Lowering, tables: Tables, logits: Buffer, most: int) -> None:
        """logits: where the program's logits go, float32."""
        self._bound, self._lowering, self._tables, self._logits, self._most = bound, lowering, tables, logits, most
        self._delta_scratch: dict[tuple[int, ...], DeltaScratch] = {}
        self._moe_scratch: dict[tuple[int, ...], MoeScratch] = {}
        self.layers: Mapping[Work, Layer | None] = {work: self._layer(work) for work in lowering.works}

    @property
    def sources(self) -> list[Source]:
        """What must be compiled."""
        return [source for layer in self.layers.values() if layer is not None for source in layer.sources]

    def _layer(self, work: Work) -> Layer | None:
        at, store, device = self._lowering.places, self._bound.store, self._bound.device
        match work.node:
            case ops.BatchMatvec(x, specs, outs) if prefill_linear.applies([spec.matrix for spec in specs]):
                exact = self._lowering.logits
                outputs = [
                    Output(
                        store.matrix(spec.matrix),
                        self._logits if out is exact else at[out],
                        **({"out_dtype": F32} if out is exact else {}),
                        bias=None if spec.bias is None else store.vector(spec.bias),
                        bias_dtype=F32,
                    )
                    for spec, out in zip(specs, outs, strict=True)
                ]
                return Layer(by_rows=Linear(device, at[x], outputs))
            case ops.RmsNorm(x, norm, out) if prefill_rows.applies(x.dim):
                return Layer(by_rows=AddNorm(x.dim, norm.eps, at[x], store.vector(norm.weight), at[out]))
            case ops.AddNorm(x, delta, norm, total, out) if prefill_rows.applies(x.dim):
                weight = store.vector(norm.weight)
                return Layer(by_rows=AddNorm(x.dim, norm.eps, at[x], weight, at[out], at[delta], at[total]))
            case ops.Mlp(x, spec, out) if prefill_moe.mlp_applies(spec):
                hidden = self._lowering.scratch("prefill hidden", self._most * spec.gate.out_dim * 2)
                return Layer(by_rows=prefill_moe.Mlp(device, self._mlp(spec), at[x], hidden, at[out]))
            case ops.Moe(x, spec, out) if prefill_moe.moe_applies(spec):
                return Layer(by_rows=self._moe(spec, at[x], at[out]))
            case ops.Attention() if prefill_attention.applies(work.node):
                return Layer(by_size=self._attention(work.node))
            case ops.GatedDelta() if prefill_delta.applies(work.node):
                return Layer(by_size=self._delta(work.node))
            case _:
                return None

    def _mlp(self, spec: ops.MlpSpec) -> MlpWeights:
        return MlpWeights(*(self._bound.store.matrix(matrix) for matrix in (spec.gate, spec.up, spec.down)))

    def _moe(self, spec: ops.MoeSpec, x: Buffer, out: Buffer) -> Moe:
        device, store = self._bound.device, self._bound.store
        shared = None if spec.shared is None else self._mlp(spec.shared)
        hidden = 0 if spec.shared is None else spec.shared.gate.out_dim
        sizes = (spec.top_k, spec.router.out_dim, spec.router.in_dim, spec.experts.gate.out_dim, hidden)
        if sizes not in self._moe_scratch:
            self._moe_scratch[sizes] = MoeScratch(device, spec, self._most)
        shared_gate = None if spec.shared_gate is None else store.matrix(spec.shared_gate)
        scratch, router = self._moe_scratch[sizes], store.matrix(spec.router)
        return Moe(device, spec, router, self._mlp(spec.experts), shared, shared_gate, scratch, x, out)

    def _attention(self, node: ops.Attention) -> PrefillAttention:
        at, parts, spec = self._lowering.places, self._bound.attentions[node.cache], node.spec
        places = AttentionPlaces(
            q=at[node.q.value],
            k=at[node.k.value],
            v=at[node.v.value],
            gate=None if node.gate is None else at[node.gate.value],
            q_norm=parts.q_norm,
            k_norm=parts.k_norm,
            inv_freq=parts.inv_freq,
            keys=parts.keys,
            values=parts.values,
            queries=self._lowering.scratch("prefill queries", self._most * spec.heads * spec.head_dim * 2),
            out=at[node.out],
        )
        return PrefillAttention(node, self._bound.block_size, places, self._tables)

    def _delta(self, node: ops.GatedDelta) -> PrefillDelta:
        at, parts, spec = self._lowering.places, self._bound.deltas[node.cache], node.spec
        sizes = (spec.key_heads, spec.value_heads, spec.key_dim, spec.value_dim)
        if sizes not in self._delta_scratch:
            self._delta_scratch[sizes] = DeltaScratch(self._bound.device, spec, self._most, MOST_SEQUENCES)
        places = DeltaPlaces(
            q=at[node.q.value],
            k=at[node.k.value],
            v=at[node.v.value],
            z=at[node.z.value],
            b=at[node.b.value],
            a=at[node.a.value],
            taps=parts.taps,
            rate=parts.rate,
            dt_bias=parts.dt_bias,
            norm=parts.norm,
            conv=parts.conv,
            memory=parts.memory,
            out=at[node.out],
        )
        return PrefillDelta(node, places, self._delta_scratch[sizes], self._tables, "bfloat16")


def applies(dtype: str, batch: Batch) -> bool:
    """Whether a step is for these layers: not so few rows that each weight is read for few, nor one token each."""
    rows, sequences = len(batch.tokens), len(batch.context_lengths)
    return dtype == "bfloat16" and rows >= LEAST_TOKENS and rows > sequences <= MOST_SEQUENCES
