"""The reference backend: NumPy in float32, slow, and the definition of every node."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mixbit.kernels import ops
from mixbit.kernels.executor import Batch, Bytes, CacheConfig, ExecutorOptions
from mixbit.kernels.reference.attention import KvPool, attention
from mixbit.kernels.reference.gated_delta import StatePool, gated_delta
from mixbit.kernels.reference.matrix import Float32Array, batch_matvec, dequantize
from mixbit.kernels.reference.mlp import mlp
from mixbit.kernels.reference.moe import moe
from mixbit.kernels.reference.norm import rms_norm


class ReferenceBackend:
    """Runs a program node by node in NumPy. `isa`, `threads` and `dtype` have no meaning here."""

    name = "reference"

    def unavailable(self) -> str | None:
        """None: NumPy is always there."""
        return None

    def describe(self) -> str:
        """What runs the program, in words."""
        return "NumPy, float32"

    def compile(self, program: ops.Program, cache: CacheConfig, options: ExecutorOptions) -> ReferenceExecutor:
        """Allocate the pools; weights stay where they are and are expanded at each use."""
        return ReferenceExecutor(
            program,
            [KvPool.zeros(node.spec, cache) for node in program.attentions],
            [StatePool.zeros(node.spec, cache) for node in program.gated_deltas],
            options.profile,
        )


@dataclass(eq=False)
class ReferenceExecutor:
    """A program and its pools."""

    program: ops.Program
    kv_pools: list[KvPool]
    state_pools: list[StatePool]
    profile: bool
    _seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def run(self, batch: Batch) -> npt.NDArray[np.float32]:
        """Logits [selected, vocab] of the step; pools are updated in place."""
        return self._compute(batch, self.program.logits)

    def hidden_states(self, batch: Batch) -> npt.NDArray[np.float32]:
        """As run: what the head would have been applied to, [selected, hidden_dim]."""
        return self._compute(batch, self.program.hidden)

    @property
    def hidden_dim(self) -> int | None:
        """Values of a hidden state."""
        return self.program.hidden.dim

    def _compute(self, batch: Batch, wanted: ops.Value) -> Float32Array:
        values: dict[ops.Value, Float32Array] = {}
        for node in self.program.nodes:
            if wanted in values:
                break
            start = time.perf_counter()
            self._run_node(node, values, batch)
            if self.profile:
                self._seconds[ops.kind(node)] += time.perf_counter() - start
        return values[wanted]

    def _run_node(self, node: ops.Node, values: dict[ops.Value, Float32Array], batch: Batch) -> None:
        match node:
            case ops.Embed(table, out):
                values[out] = dequantize(table, batch.tokens)
            case ops.RmsNorm(x, norm, out):
                values[out] = rms_norm(norm, values[x])
            case ops.AddNorm(x, delta, norm, total, out):
                values[total] = values[x] + values[delta]
                values[out] = rms_norm(norm, values[total])
            case ops.BatchMatvec(x, specs, outs):
                values.update(zip(outs, batch_matvec(specs, values[x]), strict=True))
            case ops.Attention():
                values[node.out] = self._attention(node, values, batch)
            case ops.GatedDelta():
                values[node.out] = self._gated_delta(node, values, batch)
            case ops.Mlp(x, spec, out):
                values[out] = mlp(spec, values[x])
            case ops.Moe(x, moe_spec, out):
                values[out] = moe(moe_spec, values[x])
            case ops.SelectRows(x, out):
                values[out] = values[x][batch.logit_rows]

    def _attention(self, node: ops.Attention, values: Mapping[ops.Value, Float32Array], batch: Batch) -> Float32Array:
        spec = node.spec
        q = heads_of(node.q, values, spec.heads, spec.head_dim)
        k = heads_of(node.k, values, spec.kv_heads, spec.head_dim)
        v = heads_of(node.v, values, spec.kv_heads, spec.head_dim)
        gate = None if node.gate is None else heads_of(node.gate, values, spec.heads, spec.head_dim)
        return attention(spec, q, k, v, gate, self.kv_pools[node.cache], batch)

    def _gated_delta(
        self, node: ops.GatedDelta, values: Mapping[ops.Value, Float32Array], batch: Batch
    ) -> Float32Array:
        spec, tokens = node.spec, len(batch.tokens)
        ratio = spec.value_heads // spec.key_heads

        def columns(where: ops.Columns, width: int) -> Float32Array:
            return heads_of(where, values, spec.key_heads, width)

        value_shape = (tokens, spec.value_heads, spec.value_dim)
        return gated_delta(
            spec,
            columns(node.q, spec.key_dim),
            columns(node.k, spec.key_dim),
            columns(node.v, ratio * spec.value_dim).reshape(value_shape),
            columns(node.z, ratio * spec.value_dim).reshape(value_shape),
            columns(node.b, ratio).reshape(tokens, spec.value_heads),
            columns(node.a, ratio).reshape(tokens, spec.value_heads),
            self.state_pools[node.cache],
            batch,
        )

    def copy_block(self, source: int, target: int) -> None:
        """Copy a block in every attention layer."""
        for part in self._block_parts():
            part[target] = part[source]

    def copy_state(self, source: int, target: int) -> None:
        """Copy a slot in every gated delta layer."""
        for part in self._state_parts():
            part[target] = part[source]

    def export_block(self, block: int) -> Bytes:
        """A block's bytes: layer after layer, keys and values."""
        return _read(self._block_parts(), block)

    def import_block(self, block: int, data: Bytes) -> None:
        """Put back what export_block gave."""
        _write(self._block_parts(), block, data)

    def export_state(self, slot: int) -> Bytes:
        """A slot's bytes: layer after layer, convolution and memory."""
        return _read(self._state_parts(), slot)

    def import_state(self, slot: int, data: Bytes) -> None:
        """Put back what export_state gave."""
        _write(self._state_parts(), slot, data)

    def _block_parts(self) -> list[Float32Array]:
        return [part for pool in self.kv_pools for part in (pool.keys, pool.values)]

    def _state_parts(self) -> list[Float32Array]:
        return [part for pool in self.state_pools for part in (pool.conv, pool.memory)]

    def phase_seconds(self) -> Mapping[str, float]:
        """Seconds by kind of node; empty unless profiling."""
        return dict(self._seconds)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the pools."""
        kv = sum(pool.keys.nbytes + pool.values.nbytes for pool in self.kv_pools)
        return kv + sum(pool.conv.nbytes + pool.memory.nbytes for pool in self.state_pools)


def _read(parts: list[Float32Array], number: int) -> Bytes:
    return np.concatenate([np.zeros(0, np.uint8), *(part[number].reshape(-1).view(np.uint8) for part in parts)])


def _write(parts: list[Float32Array], number: int, data: Bytes) -> None:
    size = sum(part[number].nbytes for part in parts)
    if data.nbytes != size:
        raise ValueError(f"{data.nbytes} bytes, expected {size}")
    for part in parts:
        piece, data = data[: part[number].nbytes], data[part[number].nbytes :]
        part[number] = piece.view(np.float32).reshape(part[number].shape)


def heads_of(columns: ops.Columns, values: Mapping[ops.Value, Float32Array], count: int, width: int) -> Float32Array:
    """[rows, count, width]: `width` values for each of `count` heads."""
    starts = columns.offset + columns.stride * np.arange(count)
    return values[columns.value][:, starts[:, None] + np.arange(width)]
