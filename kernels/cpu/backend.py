"""The CPU backend: a program is recorded once into native code, and a step is one native call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mixbit.kernels import ops
from mixbit.kernels.cpu.pages import keep
from mixbit.kernels.executor import BackendError, Batch, Bytes, CacheConfig, ExecutorOptions, Precision
from mixbit.kernels.experts import Access, ExpertCounts, ExpertMemory, WeightsError, expert_parts, stacks, streamable
from mixbit.kernels.spec import Matrix, QuantizedTensor

if TYPE_CHECKING:
    from mixbit.kernels.cpu import _cpu

READERS = 8  # threads that read experts, each several parts at once: they wait for the disk, and use no core
_NO_CACHE = CacheConfig(blocks=1, block_size=1, state_slots=1)
_NAMES = {
    "portable": "portable code",
    "avx2": "AVX2",
    "avx512": "AVX-512 VNNI",
    "amx": "AVX-512 and AMX",
    "neon": "NEON",
}


class CpuBackend:
    """Runs programs on the CPU, in float32, from weights that stay where they are mapped.

    precision "fast" also keeps keys and values in bfloat16: half of the memory's time, and half of the arithmetic's
    where the processor multiplies bfloat16.
    """

    name = "cpu"

    def unavailable(self) -> str | None:
        """None if the native module was built for this machine."""
        try:
            from mixbit.kernels.cpu import _cpu  # noqa: F401
        except ImportError as error:
            return f"the native module cannot be imported: {error}"
        return None

    def describe(self) -> str:
        """Best instruction set and number of cores: "AVX2, 2 threads"."""
        from mixbit.kernels.cpu import _cpu

        threads = _cpu.usable_cores()
        return f"{_NAMES[_cpu.best_isa()]}, {threads} thread{'s' if threads != 1 else ''}"

    def value_bytes_for(self, precision: Precision) -> int:
        """Bytes of a cached key or value: of bfloat16 in the fast mode, else of float32."""
        return 2 if precision == "fast" else 4

    def step_bytes(self, program: ops.Program, options: ExecutorOptions) -> int:
        """Bytes of values and scratch. They are counted by recording the program; none is touched."""
        from mixbit.kernels.cpu.recorder import record

        native = self._native(_NO_CACHE, replace(options, experts=None))
        record(program, native, {})
        return native.step_bytes

    def least_expert_bytes(self, program: ops.Program) -> int:
        """Room for one expert of each size."""
        return sum({_slot_bytes(node) for node in streamable(program)})

    def read_rate(
        self, program: ops.Program, *, access: Access, count: int, threads: int = READERS, use: bool = False
    ) -> float:
        """Bytes per second at which random experts are read, as many at a time as a token needs of a layer.

        use: the threads also go over every byte of them. Raises WeightsError if one cannot be read, ValueError for a
        program without streamable experts.
        """
        from mixbit.kernels.cpu import _cpu

        nodes, random = list(streamable(program)), np.random.default_rng()
        if not nodes:
            raise ValueError("the program has no experts in files")
        files, chosen, total, together = _files(program), [], 0, nodes[0].spec.top_k
        for node in (nodes[number] for number in random.integers(len(nodes), size=count)):
            expert = int(random.integers(node.spec.router.out_dim))
            parts = expert_parts(node, files)
            chosen.append([(file, offset + expert * nbytes, nbytes) for file, offset, nbytes in parts])
            total += sum(nbytes for _, _, nbytes in parts)
        try:
            timer = _cpu.ReadTimer(
                files=[str(file) for file in files],
                access=_cpu.Access[access],
                threads=threads,
                bytes=together * max(map(_slot_bytes, nodes)),
            )
            seconds = timer.seconds(chosen, together=together, use=use)
        except _cpu.ReadError as error:
            raise WeightsError(str(error)) from None
        return total / seconds

    def compile(self, program: ops.Program, cache: CacheConfig, options: ExecutorOptions) -> CpuExecutor:
        """Record the program natively and allocate its pools; quantized weights and matrices are not copied.

        Raises BackendError for an instruction set that this machine cannot run (the message names those that it
        can), for a dtype other than float32, and for experts that cannot be streamed as asked; ValueError where shapes
        of the program contradict each other.
        """
        from mixbit.kernels.cpu.recorder import record

        native = self._native(cache, options)
        if options.experts is None:
            return CpuExecutor(native, record(program, native, {}), program.hidden.dim)
        if options.experts.nbytes < (least := self.least_expert_bytes(program)):
            raise BackendError(
                f"{options.experts.nbytes} bytes of memory for experts; one of each size takes {least}: give more"
            )
        files = _files(program)
        _stream(native, files, options.experts)
        try:
            weights = record(program, native, files)
        except OSError as error:
            raise BackendError(str(error)) from None
        # While experts come and go, what every token needs stays. It is read beside the first steps.
        Thread(target=keep, args=(_dense(program),), name="dense weights", daemon=True).start()
        return CpuExecutor(native, weights, program.hidden.dim)

    def _native(self, cache: CacheConfig, options: ExecutorOptions) -> _cpu.Program:
        from mixbit.kernels.cpu import _cpu

        if options.dtype not in (None, "float32"):
            raise BackendError(f"the CPU backend computes in float32, not {options.dtype}")
        isas = _cpu.supported_isas()
        if options.isa is not None and options.isa not in isas:
            raise BackendError(
                f"instruction set {options.isa!r} cannot run here; this machine and build run: {', '.join(isas)}"
            )
        return _cpu.Program(
            max_tokens=options.max_tokens,
            blocks=cache.blocks,
            block_size=cache.block_size,
            state_slots=cache.state_slots,
            precision=_cpu.Precision[options.precision],
            threads=options.threads,
            isa=options.isa or _cpu.best_isa(),
            profile=options.profile,
        )


def _files(program: ops.Program) -> dict[Path, int]:
    """Numbers of the files that hold experts."""
    places = (place for node in streamable(program) for matrix in stacks(node) for place in matrix.stored)
    return {file: number for number, file in enumerate(dict.fromkeys(place.file for place in places))}


def _dense(program: ops.Program) -> list[npt.NDArray[np.generic]]:
    """Arrays of the matrices that every token needs, in the order of the program."""
    matrices: dict[Matrix, None] = {}
    for node in program.nodes:
        match node:
            case ops.BatchMatvec():
                matrices |= dict.fromkeys(spec.matrix for spec in node.specs)
            case ops.Mlp():
                matrices |= dict.fromkeys((node.spec.gate, node.spec.up, node.spec.down))
            case ops.Moe(spec=spec):
                matrices |= dict.fromkeys([spec.router, *([spec.shared_gate] if spec.shared_gate else [])])
                matrices |= dict.fromkeys((spec.shared.gate, spec.shared.up, spec.shared.down) if spec.shared else ())
            case ops.Embed():
                matrices[node.table] = None
    return [array for matrix in matrices for array in _arrays(matrix)]


def _arrays(matrix: Matrix) -> tuple[npt.NDArray[np.generic], ...]:
    if isinstance(matrix, QuantizedTensor):
        return matrix.weight, matrix.scales, matrix.biases
    return (matrix.data,)


def _stream(native: _cpu.Program, files: Mapping[Path, int], memory: ExpertMemory) -> None:
    from mixbit.kernels.cpu import _cpu

    names = [str(file) for file in files]
    native.stream_experts(files=names, bytes=memory.nbytes, access=_cpu.Access[memory.access], threads=READERS)


def _slot_bytes(node: ops.Moe) -> int:
    """Memory for one expert of a node: each of its arrays with room for reads that begin and end at pages."""
    page = 4096
    each = (place.nbytes // (matrix.experts or 1) for matrix in stacks(node) for place in matrix.stored)
    return sum(-(-nbytes // page) * page + page for nbytes in each)


class CpuExecutor:
    """A native program, and the weights that it points into."""

    def __init__(self, native: _cpu.Program, weights: tuple[_cpu.Weight, ...], hidden_dim: int) -> None:
        self._native = native
        self._weights = weights
        self.hidden_dim: int | None = hidden_dim

    def run(self, batch: Batch) -> npt.NDArray[np.float32]:
        """Logits [selected, vocab]. ValueError, with nothing changed, for a batch that contradicts itself.

        Raises WeightsError if a streamed expert cannot be read.
        """
        return self._run(batch, hidden=False)

    def hidden_states(self, batch: Batch) -> npt.NDArray[np.float32]:
        """As run: what the head would have been applied to, [selected, hidden_dim]."""
        return self._run(batch, hidden=True)

    def _run(self, batch: Batch, *, hidden: bool) -> npt.NDArray[np.float32]:
        from mixbit.kernels.cpu import _cpu

        try:
            return self._native.run(
                batch.tokens,
                batch.query_starts,
                batch.context_lengths,
                batch.block_tables,
                batch.state_slots,
                batch.logit_rows,
                hidden,
            )
        except _cpu.ReadError as error:
            raise WeightsError(str(error)) from None

    def expert_counts(self) -> Sequence[ExpertCounts]:
        """Of each streamed layer; empty if all stay where they are mapped."""
        return [ExpertCounts(*counts) for counts in self._native.expert_counts()]

    @property
    def expert_bytes(self) -> int:
        """Bytes of the slots of streamed experts."""
        return self._native.expert_bytes

    @property
    def expert_slots(self) -> int:
        """Streamed experts that can be in memory at once."""
        return self._native.expert_slots

    def copy_block(self, source: int, target: int) -> None:
        """Copy a block in every attention layer."""
        self._native.copy_block(source, target)

    def copy_state(self, source: int, target: int) -> None:
        """Copy a slot in every gated delta layer."""
        self._native.copy_state(source, target)

    def export_block(self, block: int) -> Bytes:
        """A block's bytes: layer after layer, keys and values."""
        return self._native.export_block(block)

    def import_block(self, block: int, data: Bytes) -> None:
        """Put back what export_block gave."""
        self._native.import_block(block, data)

    def export_state(self, slot: int) -> Bytes:
        """A slot's bytes: layer after layer, convolution and memory."""
        return self._native.export_state(slot)

    def import_state(self, slot: int, data: Bytes) -> None:
        """Put back what export_state gave."""
        self._native.import_state(slot, data)

    def phase_seconds(self) -> Mapping[str, float]:
        """Seconds by kind of node; empty unless profiling."""
        return self._native.seconds()

    @property
    def cache_bytes(self) -> int:
        """Bytes of the KV and state pools."""
        return self._native.cache_bytes

    @property
    def threads(self) -> int:
        """Threads that share a step."""
        return self._native.threads
