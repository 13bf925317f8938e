"""Runs a program on an MLX device: the graph of a step is built node by node and evaluated once."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mixbit.kernels import ops
from mixbit.kernels.executor import Batch, Bytes, CacheConfig, ExecutorOptions
from mixbit.kernels.experts import ExpertCounts
from mixbit.kernels.mlx.arrays import DTYPES, Values, from_bytes, to_bytes
from mixbit.kernels.mlx.caches import KvPool, StatePool
from mixbit.kernels.mlx.operation import Binding, Table
from mixbit.kernels.mlx.step import Step
from mixbit.kernels.mlx.streaming import make_slots
from mixbit.kernels.mlx.weights import Weights
from mixbit.kernels.spec import QuantizedTensor


class MlxExecutor:
    """A program with its weights and pools on one device."""

    def __init__(
        self,
        program: ops.Program,
        cache: CacheConfig,
        options: ExecutorOptions,
        device: mx.DeviceType,
        table: Table,
        weights: Callable[[mx.Dtype], Weights] = Weights,
    ) -> None:
        """device: mx.cpu or mx.gpu. table: how each node is run. weights: puts tensors there, given their dtype."""
        self._program, self._device, self._profile = program, device, options.profile
        self._block_size = cache.block_size
        self._seconds: defaultdict[str, float] = defaultdict(float)
        dtype = DTYPES[options.dtype or activation_dtype(program, device)]
        with mx.stream(device):
            self._slots = {} if options.experts is None else make_slots(program, options.experts, dtype)
            self._binding = Binding(
                weights(dtype),
                tuple(KvPool(node.spec, cache, dtype) for node in program.attentions),
                tuple(StatePool(node.spec, cache, dtype) for node in program.gated_deltas),
                self._slots,
            )
            self._operations = [(node, table[type(node)](node, self._binding)) for node in program.nodes]
            mx.eval(*self._pools())

    def run(self, batch: Batch) -> npt.NDArray[np.float32]:
        """Logits [selected, vocab] of the step; KV and recurrent state are updated in place."""
        return self._compute(batch, self._program.logits)

    def hidden_states(self, batch: Batch) -> npt.NDArray[np.float32]:
        """As run: what the head would have been applied to, [selected, hidden_dim]."""
        return self._compute(batch, self._program.hidden)

    def expert_counts(self) -> Sequence[ExpertCounts]:
        """Of each streamed layer, in the order of the program."""
        return [slots.counts() for slots in self._slots.values()]

    @property
    def expert_bytes(self) -> int:
        """Bytes of all slots."""
        return sum(slots.nbytes for slots in self._slots.values())

    @property
    def expert_slots(self) -> int:
        """Experts that can be on the device at once."""
        return sum(slots.count for slots in self._slots.values())

    @property
    def hidden_dim(self) -> int | None:
        """Values of a hidden state."""
        return self._program.hidden.dim

    def _compute(self, batch: Batch, wanted: ops.Value) -> npt.NDArray[np.float32]:
        with mx.stream(self._device):
            step = Step.prepare(batch, self._block_size)
            values: Values = {}
            for node, operation in self._operations:
                if wanted.index in values:
                    break
                if len(batch.logit_rows) == 0 and isinstance(node, ops.SelectRows):
                    break  # MLX does not multiply by no rows, and what follows makes nothing but logits
                start = time.perf_counter()
                operation(step, values)
                if self._profile:
                    mx.eval(*values.values(), *self._pools())
                    self._seconds[ops.kind(node)] += time.perf_counter() - start
            result = values.get(wanted.index)
            values.clear()  # so that the evaluation can reuse the memory of each value after its last use
            if result is None:
                mx.eval(*self._pools())
                return np.zeros((0, wanted.dim), np.float32)
            result = result.astype(mx.float32)
            mx.eval(result, *self._pools())
            return np.array(result)

    def copy_block(self, source: int, target: int) -> None:
        """Copy a block in every attention layer."""
        with mx.stream(self._device):
            for pool in self._binding.kv_pools:
                pool.put(target, pool.get(source))

    def copy_state(self, source: int, target: int) -> None:
        """Copy a slot in every gated delta layer."""
        with mx.stream(self._device):
            for pool in self._binding.state_pools:
                pool.put(target, pool.get(source))

    def export_block(self, block: int) -> Bytes:
        """A block's bytes: layer after layer, keys and values."""
        with mx.stream(self._device):
            return to_bytes([array for pool in self._binding.kv_pools for array in pool.get(block)])

    def import_block(self, block: int, data: Bytes) -> None:
        """Put back what export_block gave."""
        with mx.stream(self._device):
            arrays = from_bytes(data, [array for pool in self._binding.kv_pools for array in pool.get(block)])
            for pool in self._binding.kv_pools:
                pool.put(block, (next(arrays), next(arrays)))

    def export_state(self, slot: int) -> Bytes:
        """A slot's bytes: layer after layer, convolution and memory."""
        with mx.stream(self._device):
            return to_bytes([array for pool in self._binding.state_pools for array in pool.get(slot)])

    def import_state(self, slot: int, data: Bytes) -> None:
        """Put back what export_state gave."""
        with mx.stream(self._device):
            arrays = from_bytes(data, [array for pool in self._binding.state_pools for array in pool.get(slot)])
            for pool in self._binding.state_pools:
                pool.put(slot, (next(arrays), next(arrays)))

    def phase_seconds(self) -> Mapping[str, float]:
        """Seconds by kind of node; empty unless profiling, which evaluates each node by itself."""
        return dict(self._seconds)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the pools."""
        return sum(array.nbytes for array in self._pools())

    def _pools(self) -> Iterator[mx.array]:
        for kv in self._binding.kv_pools:
            yield from kv.arrays()
        for state in self._binding.state_pools:
            yield from state.arrays()


def activation_dtype(program: ops.Program, device: mx.DeviceType) -> str:
    """float32 on the CPU, where MLX has fast kernels for nothing else; else the checkpoint's own."""
    if device == mx.cpu:
        return "float32"
    dtypes: Counter[str] = Counter()
    for node in program.nodes:
        matrices = [node.table] if isinstance(node, ops.Embed) else []
        if isinstance(node, ops.BatchMatvec):
            matrices = [spec.matrix for spec in node.specs]
        for matrix in matrices:
            stored = matrix.scales if isinstance(matrix, QuantizedTensor) else matrix.data
            dtypes[stored.dtype.name] += 1
    return dtypes.most_common(1)[0][0]
