"""Runs a program on a CUDA device: a step is one upload, the launches of its size as a graph, one download."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mixbit.kernels import ops
from mixbit.kernels.cuda import many
from mixbit.kernels.cuda.compiler import Compiler, Progress, Source
from mixbit.kernels.cuda.driver import Buffer, Device, Graph, Launch, Module
from mixbit.kernels.cuda.linear import Kind
from mixbit.kernels.cuda.lowering import Bound, Lowering
from mixbit.kernels.cuda.many import Layers, PlanData
from mixbit.kernels.cuda.plan import Planned, sources_of
from mixbit.kernels.cuda.pools import Pools
from mixbit.kernels.cuda.prefill import Size
from mixbit.kernels.cuda.step import StepData
from mixbit.kernels.cuda.weights import Place, Store
from mixbit.kernels.cuda.works import Work, folded, plain
from mixbit.kernels.executor import BackendError, Batch, Bytes, CacheConfig, ExecutorOptions


@dataclass(frozen=True)
class Key:
    """All that the launches of a step depend on. size: of the prefill layers, where they take it."""

    rows: int
    sequences: int
    selected: int
    size: Size | None = None


_MOST_KEPT = 128  # sizes of steps whose launches are kept


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
        self._few = Steps(program, folded(program), self._bound, self._kernels, min(FEW_ROWS, options.max_tokens))
        self._many: Steps | None = None
        few = [rows for rows in (1, 9) if rows <= options.max_tokens]
        self._kernels.prepare(
            sources_of([plan for n in few for _, plans in self._few.planned(n, n, n) for plan in plans])
        )
        device.synchronize()

    def run(self, batch: Batch) -> npt.NDArray[np.float32]:
        """Logits [selected, vocab] of the step; KV and recurrent state are updated in place."""
        self._device.make_current()
        rows, selected = len(batch.tokens), len(batch.logit_rows)
        grouped = many.applies(self._bound.kind.dtype, batch)
        steps = self._few if rows <= FEW_ROWS and not grouped else self._steps_of_many()
        key = steps.upload(batch, grouped=grouped)
        if self._profile:
            self._run_apart(steps, key)
        elif steps is self._few:
            self._device.replay(steps.graph(key))
        else:
            steps.launch(key)
        logits: npt.NDArray[np.float32] = self._device.pinned((selected, self._program.logits.dim), np.dtype("f4"))
        if selected:
            self._device.fetch(logits, steps.logits(selected))
        self._device.synchronize()
        return logits

    def hidden_states(self, batch: Batch) -> npt.NDArray[np.float32]:
        """Not there: a step is one graph, down to the logits."""
        raise BackendError("the CUDA kernels give logits only; --kernels stock gives hidden states too")

    @property
    def hidden_dim(self) -> int | None:
        """None: there are no hidden states."""
        return None

    def _steps_of_many(self) -> Steps:
        if self._many is None:
            works = plain(self._program) if self._bound.kind.dtype == "bfloat16" else folded(self._program)
            self._many = Steps(self._program, works, self._bound, self._kernels, self._rows)
        return self._many

    def _run_apart(self, steps: Steps, key: Key) -> None:
        for work, launches in steps.parts(key):
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
        self.modules: dict[Source, Module] = {}

    def prepare(self, sources: Iterable[Source], progress: Progress | None = None) -> None:
        """Compile what is missing, all together."""
        missing = [source for source in dict.fromkeys(sources) if source not in self.modules]
        for source, code in zip(missing, self._compiler.compile(missing, progress), strict=True):
            self.modules[source] = self.device.load(code)

    def launches(self, planned: list[Planned]) -> list[Launch]:
        """Launches, of kernels compiled if need be."""
        self.prepare(sources_of(planned))
        return [plan.launch(self.modules) for plan in planned]


class Steps:
    """The steps of at most `most` rows, and what was made for each size of step."""

    def __init__(self, program: ops.Program, works: Sequence[Work], bound: Bound, kernels: Kernels, most: int) -> None:
        self._bound, self._kernels, self._device, self._most = bound, kernels, bound.device, most
        self._data = StepData(bound.device, most)
        self._lowering = Lowering(program, works, bound, self._data, most)
        self._dim = program.logits.dim
        self._logits = bound.device.alloc(0)
        self._plan: PlanData | None = None
        self._layers: Layers | None = None
        self._launches: dict[Key, list[Launch]] = {}
        self._graphs: dict[Key, Graph] = {}

    def upload(self, batch: Batch, *, grouped: bool) -> Key:
        """Enqueue the copy of a batch to the device; gives the key of its launches. grouped: for the prefill layers."""
        if self._data.upload(batch):
            self._forget()
        size = None
        if grouped:
            self._plan = self._plan or PlanData(self._bound, self._most)
            size = self._plan.upload(batch)
        return Key(len(batch.tokens), len(batch.context_lengths), len(batch.logit_rows), size)

    def _forget(self) -> None:
        self._device.synchronize()
        self._layers = None
        self._launches.clear()
        self._graphs.clear()

    def logits(self, selected: int) -> Buffer:
        """Where the logits of a step lie: float32 [selected, vocab]."""
        if self._logits.nbytes < selected * self._dim * 4:
            self._forget()
            self._logits = self._device.alloc(selected * self._dim * 4)
        return self._logits

    def _works(self, rows: int, selected: int) -> list[tuple[Work, int]]:
        """The work of a step, each with the rows of its value."""
        counts = [(work, rows if work.writes[0].rows is ops.Rows.TOKENS else selected) for work in self._lowering.works]
        return [(work, count) for work, count in counts if count]

    def planned(self, rows: int, sequences: int, selected: int) -> list[tuple[Work, list[Planned]]]:
        """The work of a step of this size, by the kernels for few rows."""
        logits = self.logits(selected)
        return [
            (work, self._lowering.planned(work, count, sequences, logits))
            for work, count in self._works(rows, selected)
        ]

    def parts(self, key: Key) -> Iterator[tuple[Work, list[Launch]]]:
        """The work of a step, each with its launches, made one after another."""
        logits = self.logits(key.selected)
        layers = {} if key.size is None else self._prefill().layers
        for work, count in self._works(key.rows, key.selected):
            layer = layers.get(work)
            if key.size is not None and layer is not None and layer.worthwhile(count):
                yield work, layer.launches(self._kernels.modules, key.size, count)
            else:
                planned = self._lowering.planned(work, count, key.sequences, logits)
                yield work, self._kernels.launches(planned)

    def _prefill(self) -> Layers:
        assert self._plan is not None
        if self._layers is None:
            tables = self._plan.tables(self._data)
            self._layers = Layers(self._bound, self._lowering, tables, self._logits, self._most)
            self._kernels.prepare(self._layers.sources)
        return self._layers

    def launch(self, key: Key) -> None:
        """Enqueue a step. The first of its size is made while the device already works on it."""
        kept = self._launches.get(key)
        if kept is not None:
            self._device.launch(*kept)
            return
        if len(self._launches) >= _MOST_KEPT:
            self._device.synchronize()
            self._launches.clear()
        kept = []
        for _, launches in self.parts(key):
            self._device.launch(*launches)
            kept += launches
        self._launches[key] = kept

    def graph(self, key: Key) -> Graph:
        """The launches of a step of this size as a graph."""
        self.logits(key.selected)
        if key not in self._graphs:
            if len(self._graphs) >= _MOST_KEPT:
                self._device.synchronize()
                self._graphs.clear()
            self._graphs[key] = self._device.capture([launch for _, made in self.parts(key) for launch in made])
        return self._graphs[key]
