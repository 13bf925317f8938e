"""Random programs of one or two verbs on the native module, against the NumPy reference: `make sanitize`.

    python -m tests.native.fuzz [--module FILE] [--cases N] [--seed S] [--only CASE]

Sizes are chosen to miss every tile: one row, one token, groups at the edge, no logits asked for, heads that lie in
rows with gaps, arrays that begin anywhere. --module takes another build of the native module, such as one with
AddressSanitizer; weights are then allocated to their exact size, so that a read past their end is seen.
Every case has a number; a failure prints it, and --only runs it alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mixbit.kernels.executor import Batch, CacheConfig, ExecutorOptions
from mixbit.kernels.ops import AttentionSpec, Columns, GatedDeltaSpec, Program, ProgramBuilder, Rope, Value
from mixbit.kernels.reference.backend import ReferenceBackend
from mixbit.kernels.spec import BITS, GROUP_SIZES, BatchMatvecSpec, DenseTensor, Matrix
from tests.kernels.builders import Sequences, Tensors, feed

VOCABULARY = 40
DTYPES = ("float32", "float16", "bfloat16")


class FuzzError(AssertionError):
    """A case whose results are wrong; the message has its number and what it was."""


@dataclass
class Case:
    """What one number stands for: sizes and values come from it alone."""

    rng: np.random.Generator
    tensors: Tensors

    def upto(self, most: int) -> int:
        """From 1 to `most`, small more often, and `most` itself now and then."""
        return int(self.rng.choice([1, 2, 3, most, *self.rng.integers(1, most + 1, 4)]).clip(1, most))

    def one_of(self, *values: Any) -> Any:
        """One of the values."""
        return values[self.rng.integers(len(values))]

    def matrix(self, rows: int, cols: int, *stack: int) -> Matrix:
        """Any width whose groups divide the columns."""
        groups = [size for size in GROUP_SIZES if cols % size == 0]
        bits = self.one_of(None, *BITS) if groups else None
        return self.tensors.matrix(
            *stack, rows, cols, bits=bits, group_size=self.one_of(*groups) if groups else 32, dtype=self.one_of(*DTYPES)
        )

    def dim(self, most: int = 320) -> int:
        """Columns: whole groups, or any number."""
        return int(self.one_of(32, 64, 96, 128, 160, 256, 288, self.upto(most)))

    def columns(self, x: Value, layout: list[tuple[int, int, int]]) -> list[Columns]:
        """Places in rows of x for (heads, width, gap) each, one after another."""
        places, start = [], 0
        for heads, width, gap in layout:
            places.append(Columns(x, start, width + gap))
            start += heads * (width + gap)
        assert start <= x.dim
        return places


def _matvec(case: Case) -> Program:
    dim = case.dim()
    builder, x = feed(case.tensors.values(VOCABULARY, dim))
    specs = []
    for _ in range(case.upto(4)):
        rows = case.upto(150)
        bias = DenseTensor("bias", case.tensors.values(rows)) if case.one_of(True, False) else None
        specs.append(BatchMatvecSpec(case.matrix(rows, dim), bias))
    outs = builder.batch_matvec(x, *specs)
    return builder.build(builder.select_rows(outs[case.rng.integers(len(outs))]))


def _rows(case: Case) -> Program:
    dim = case.dim()
    builder = ProgramBuilder()
    x = builder.embed(case.matrix(VOCABULARY, dim))
    y = builder.rms_norm(x, case.tensors.norm(dim, dtype=case.one_of(*DTYPES)))
    selected, delta = builder.select_rows(x), builder.select_rows(y)
    total, out = builder.add_norm(selected, delta, case.tensors.norm(dim))
    return builder.build(case.one_of(total, out))


def _mlp(case: Case) -> Program:
    dim, hidden = case.dim(), case.dim(200)
    builder, x = feed(case.tensors.values(VOCABULARY, dim))
    spec = replace(
        case.tensors.mlp(dim, hidden, bits=None),
        gate=case.matrix(hidden, dim),
        up=case.matrix(hidden, dim),
        down=case.matrix(dim, hidden),
    )
    return builder.build(builder.select_rows(builder.mlp(x, spec)))


def _moe(case: Case) -> Program:
    dim, hidden, experts = case.one_of(32, 64, 96, 128), case.one_of(32, 64, 160), case.upto(40)
    builder, x = feed(case.tensors.values(VOCABULARY, dim))
    shared = case.one_of(True, False)
    spec = case.tensors.moe(
        dim,
        hidden,
        experts,
        case.upto(experts),
        bits=case.one_of(None, *BITS),
        router_bits=case.one_of(None, *BITS),
        normalize=case.one_of(True, False),
        shared=shared,
        shared_gate=case.one_of(True, False),
    )
    return builder.build(builder.select_rows(builder.moe(x, spec)))


def _attention(case: Case) -> Program:
    kv_heads, head_dim = case.upto(3), 4 * case.upto(24)
    heads = kv_heads * case.upto(5)
    gated = case.one_of(True, False)
    layout = [(heads, head_dim, case.one_of(0, 0, 3)), *[(kv_heads, head_dim, case.one_of(0, 0, 5))] * 2]
    layout += [(heads, head_dim, 0)] if gated else []
    builder, x = feed(case.tensors.values(VOCABULARY, sum(n * (width + gap) for n, width, gap in layout) + 1))
    rotated = 2 * int(case.rng.integers(0, head_dim // 2 + 1))
    spec = AttentionSpec(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=Rope(case.rng.uniform(0, 1, rotated // 2).astype(np.float32)) if rotated else None,
        q_norm=case.tensors.norm(head_dim) if case.one_of(True, False) else None,
        k_norm=case.tensors.norm(head_dim) if case.one_of(True, False) else None,
    )
    places = case.columns(x, layout)
    out = builder.attention(places[0], places[1], places[2], spec, places[3] if gated else None)
    return builder.build(builder.select_rows(out))


def _gated_delta(case: Case) -> Program:
    key_heads, ratio = case.upto(3), case.upto(3)
    key_dim, value_dim = 4 * case.upto(17), 4 * case.upto(17)
    value_heads = key_heads * ratio
    spec = GatedDeltaSpec(
        key_heads=key_heads,
        value_heads=value_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        conv=case.tensors.dense(2 * key_heads * key_dim + value_heads * value_dim, 1 + case.upto(4)),
        a_log=case.tensors.dense(value_heads, scale=1.0),
        dt_bias=case.tensors.dense(value_heads, scale=1.0),
        norm=case.tensors.norm(value_dim),
    )
    widths = (key_dim, key_dim, ratio * value_dim, ratio * value_dim, ratio, ratio)
    layout = [(key_heads, width, case.one_of(0, 0, 3)) for width in widths]
    builder, x = feed(case.tensors.values(VOCABULARY, sum(n * (width + gap) for n, width, gap in layout) + 1))
    q, k, v, z, b, a = case.columns(x, layout)
    return builder.build(builder.select_rows(builder.gated_delta(q, k, v, z, b, a, spec)))


KINDS: Mapping[str, Callable[[Case], Program]] = {
    "matvec": _matvec,
    "rows": _rows,
    "mlp": _mlp,
    "moe": _moe,
    "attention": _attention,
    "gated_delta": _gated_delta,
}


def _anywhere(value: Any, rng: np.random.Generator) -> Any:
    """The same program with every array in memory of its own, of the exact size, begun at any multiple of its
    items' size: as tensors lie in files."""
    if isinstance(value, np.ndarray):
        skip = int(rng.integers(0, 5)) * value.itemsize
        memory = np.empty(skip + value.nbytes, np.uint8)
        memory[skip:] = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        return memory[skip:].view(value.dtype).reshape(value.shape)
    if isinstance(value, tuple):
        return tuple(_anywhere(each, rng) for each in value)
    if is_dataclass(value) and not isinstance(value, (Value, Columns, type)):
        return replace(value, **{each.name: _anywhere(getattr(value, each.name), rng) for each in fields(value)})
    return value


def _spaced(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Equal, but every second item of a larger array."""
    wide = np.zeros((*array.shape, 2), array.dtype)
    wide[..., 0] = array
    return wide[..., 0]


def _steps(case: Case, cache: CacheConfig, most: int) -> list[Batch]:
    """Sequences that come, go on, start anew and change company."""
    sequences = Sequences(cache, count=4, seed=int(case.rng.integers(1 << 30)))
    room = cache.blocks // 4 * cache.block_size
    batches = []
    for _ in range(case.upto(5)):
        chosen = case.rng.permutation(4)[: case.upto(4)]
        step = {}
        for sequence in chosen.tolist():
            count = case.one_of(1, 1, case.upto(most // 4))
            if sequences.lengths.get(sequence, 0) + count > room or case.rng.integers(6) == 0:
                sequences.restart(sequence)
            step[sequence] = case.rng.integers(0, VOCABULARY, min(count, room))
        total = sum(map(len, step.values()))
        rows = case.rng.integers(0, total, case.one_of(0, 1, case.upto(min(total + 2, most))))
        batch = sequences.step(step, rows.tolist())
        if case.one_of(True, False):
            batch = replace(batch, **{each.name: _spaced(getattr(batch, each.name)) for each in fields(batch)})
        batches.append(batch)
    return batches


@dataclass(frozen=True)
class Mode:
    """A way to run the native module. tolerance: a share of the largest value of a step, at least of `least`."""

    options: Mapping[str, Any]
    tolerance: float
    least: float


# int8 activations are off by a share of the inputs, which are around 1, however small their products come out.
MODES: Mapping[str, Mode] = {
    "exact": Mode({"precision": "exact"}, 3e-5, 1e-3),
    "fast": Mode({"precision": "fast"}, 0.05, 1.0),
}


def run_case(number: int, modes: Mapping[str, Mode]) -> None:
    """Raise FuzzError if one of the modes is further from the reference than its tolerance."""
    from mixbit.kernels.cpu import _cpu
    from mixbit.kernels.cpu.backend import CpuBackend

    rng = np.random.default_rng(number)
    case = Case(rng, Tensors(number))
    kind = list(KINDS)[number % len(KINDS)]
    program = KINDS[kind](case)
    program = replace(program, nodes=_anywhere(program.nodes, rng))
    cache = CacheConfig(blocks=4 * case.upto(6), block_size=case.one_of(1, 3, 4, 16, 32), state_slots=5)
    most = 4 * case.upto(40)
    batches = _steps(case, cache, most)
    reference = ReferenceBackend().compile(program, cache, ExecutorOptions(max_tokens=most))
    wanted = [reference.run(batch) for batch in batches]
    name, mode = list(modes.items())[case.rng.integers(len(modes))]
    isa, threads = case.one_of(*_cpu.supported_isas()), case.upto(3)
    told = f"case {number}: {kind}, {name}, {isa}, {threads} threads"
    executor = CpuBackend().compile(
        program, cache, ExecutorOptions(max_tokens=most, threads=threads, isa=isa, **mode.options)
    )
    for place, (batch, want) in enumerate(zip(batches, wanted, strict=True)):
        got = executor.run(batch)
        limit = mode.tolerance * max(float(np.abs(want).max(initial=0)), mode.least)
        worst = float(np.abs(got - want).max(initial=0)) if got.shape == want.shape else np.inf
        if not worst <= limit:
            raise FuzzError(
                f"{told}, step {place} of {len(batch.tokens)} tokens: off by {worst:.3g}, allowed {limit:.3g}"
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--module", help="a build of mixbit.kernels.cpu._cpu to use")
    parser.add_argument("--cases", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", type=int, metavar="CASE", help="run one case")
    args = parser.parse_args()
    if args.module:
        _use(args.module)
    cases = range(args.seed, args.seed + args.cases) if args.only is None else [args.only]
    failed = 0
    for number in cases:
        try:
            run_case(number, MODES)
        except FuzzError as error:
            failed += 1
            print(error, flush=True)
    print(f"{len(cases)} cases, {failed} failures")
    return failed != 0


def _use(file: str) -> None:
    """Import this file wherever the native module is asked for."""
    name = "mixbit.kernels.cpu._cpu"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    package = importlib.import_module("mixbit.kernels.cpu")
    package._cpu = module  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.exit(main())
