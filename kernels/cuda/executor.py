"""Runs a program on a CUDA device: a step is one upload, the launches of its size as a graph, one download."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import numpy.typing as npt

from mixbit.kernels import ops
from mixbit.kernels.cuda.compiler import Compiler, Source
from mixbit.kernels.cuda.driver import Buffer, Device, Graph, Launch, Module
from mixbit.kernels.cuda.linear import Kind
from mixbit.kernels.cuda.lowering import Bound, Lowering
from mixbit.kernels.cuda.plan import Planned, sources_of
from mixbit.kernels.cuda.pools import Pools
from mixbit.kernels.cuda.step import StepData
from mixbit.kernels.cuda.weights import Place, Store
from mixbit.kernels.cuda.works import Work, folded
from mixbit.kernels.executor import Batch, Bytes, CacheConfig, ExecutorOptions

Key = tuple[int, int, int]  # rows, sequences, rows of logits

FEW_ROWS = 64
"""Rows up to which a step is a graph over the kernels that read each weight for few rows."""


class CudaExecutor:
    """A program with its weights and pools on one device."""

    def __init__(
        self,
        program: ops.Program,
        cache: CacheConfig,
        options: ExecutorOptions,
        device: Device,
        compiler: Compiler,
        place: Place | None = None,
    ) -> None:
        """place: puts a weight on the device, `device.put` if not given."""
        device.make_current()
        self._program, self._device, self._profile = program, device, options.profile
        dtype = options.dtype or "bfloat16"
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._kernels = Kernels(device, compiler)
        self._bound = Bound.of(program, cache, device, Kind(dtype, device.multiprocessors), Store(device, dtype, place))
        self._blocks = Pools(device, self._bound.kv_pools)
        self._states = Pools(device, self._bound.state_pools)
        self._rows = options.max_tokens
        self._few = Steps(program, self._bound, self._kernels, min(FEW_ROWS, options.max_tokens))
        self._many: Steps | None = None
        sizes = [(rows, rows, rows) for rows in (1, 9, 17) if rows <= min(FEW_ROWS, options.max_tokens)]
        self._kernels.prepare(planned for size in sizes for _, planned in self._few.planned(size))
        device.synchronize()

    def run(self, batch: Batch) -> npt.NDArray[np.float32]:
        """Logits [selected, vocab] of the step; KV and recurrent state are updated in place."""
        self._device.make_current()
        rows, selected = len(batch.tokens), len(batch.logit_rows)
        key = (rows, len(batch.context_lengths), selected)
        steps = self._few if rows <= FEW_ROWS else self._steps_of_many()
        steps.upload(batch)
        if self._profile:
            self._run_apart(steps, key)
        elif rows <= FEW_ROWS:
            self._device.replay(steps.graph(key))
        else:
            self._device.launch(*steps.launches(key))
        logits: npt.NDArray[np.float32] = self._device.pinned((selected, self._program.logits.dim), np.dtype("f4"))
        if selected:
            self._device.fetch(logits, steps.logits(selected))
        self._device.synchronize()
        return logits

    def _steps_of_many(self) -> Steps:
        if self._many is None:
            self._many = Steps(self._program, self._bound, self._kernels, self._rows)
        return self._many

    def _run_apart(self, steps: Steps, key: Key) -> None:
        for work, planned in steps.planned(key):
            launches = self._kernels.launches(planned)
            milliseconds = self._device.milliseconds(lambda made=launches: self._device.launch(*made))  # type: ignore[misc]
            self._seconds[ops.kind(work.node)] += milliseconds / 1e3

    def copy_block(self, source: int, target: int) -> None:
        """Copy a block in every attention layer."""
        self._device.make_current()
        self._blocks.copy(source, target)

    def copy_state(self, source: int, target: int) -> None:
        """Copy a slot in every gated delta layer."""
        self._device.make_current()
        self._states.copy(source, target)

    def export_block(self, block: int) -> Bytes:
        """A block's bytes: layer after layer, keys and values."""
        self._device.make_current()
        return self._blocks.export(block)

    def import_block(self, block: int, data: Bytes) -> None:
        """Put back what export_block gave."""
        self._device.make_current()
        self._blocks.restore(block, data)

    def export_state(self, slot: int) -> Bytes:
        """A slot's bytes: layer after layer, convolution and memory."""
        self._device.make_current()
        return self._states.export(slot)

    def import_state(self, slot: int, data: Bytes) -> None:
        """Put back what export_state gave."""
        self._device.make_current()
        self._states.restore(slot, data)

    def phase_seconds(self) -> Mapping[str, float]:
        """Seconds by kind of node; empty unless profiling, which times each node by itself."""
        return dict(self._seconds)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the pools."""
        return self._blocks.nbytes + self._states.nbytes


class Kernels:
    """Compiled kernels of one device."""

    def __init__(self, device: Device, compiler: Compiler) -> None:
        self.device = device
        self._compiler = compiler
        self._modules: dict[Source, Module] = {}

    def prepare(self, planned: Iterable[list[Planned]], progress: Callable[[int, int], None] | None = None) -> None:
        """Compile what is missing, all together."""
        sources = sources_of([plan for plans in planned for plan in plans])
        missing = [source for source in sources if source not in self._modules]
        for source, code in zip(missing, self._compiler.compile(missing, progress), strict=True):
            self._modules[source] = self.device.load(code)

    def launches(self, planned: list[Planned]) -> list[Launch]:
        """Launches, of kernels compiled if need be."""
        self.prepare([planned])
        return [plan.launch(self._modules) for plan in planned]


class Steps:
    """The steps of at most `most` rows, and what was made for each size of step."""

    def __init__(self, program: ops.Program, bound: Bound, kernels: Kernels, most: int) -> None:
        self._kernels, self._device = kernels, bound.device
        self._data = StepData(bound.device, most)
        self._lowering = Lowering(program, folded(program), bound, self._data, most)
        self._dim = program.logits.dim
        self._logits = bound.device.alloc(0)
        self._launches: dict[Key, list[Launch]] = {}
        self._graphs: dict[Key, Graph] = {}

    def upload(self, batch: Batch) -> None:
        """Enqueue the copy of a batch to the device."""
        if self._data.upload(batch):
            self._forget()

    def _forget(self) -> None:
        self._device.synchronize()
        self._launches.clear()
        self._graphs.clear()

    def logits(self, selected: int) -> Buffer:
        """Where the logits of a step lie: float32 [selected, vocab]."""
        if self._logits.nbytes < selected * self._dim * 4:
            self._forget()
            self._logits = self._device.alloc(selected * self._dim * 4)
        return self._logits

    def planned(self, key: Key) -> list[tuple[Work, list[Planned]]]:
        """The work of a step of this size, and its launches."""
        rows, sequences, selected = key
        logits = self.logits(selected)
        made = []
        for work in self._lowering.works:
            count = rows if work.writes[0].rows is ops.Rows.TOKENS else selected
            if count:
                made.append((work, self._lowering.planned(work, count, sequences, logits)))
        return made

    def launches(self, key: Key) -> list[Launch]:
        """All launches of a step of this size."""
        if key not in self._launches:
            planned = [plan for _, plans in self.planned(key) for plan in plans]
            self._launches[key] = self._kernels.launches(planned)
        return self._launches[key]

    def graph(self, key: Key) -> Graph:
        """The launches of a step of this size as a graph."""
        if key not in self._graphs:
            self._graphs[key] = self._device.capture(self.launches(key))
        return self._graphs[key]
