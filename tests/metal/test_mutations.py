"""Each shipped kernel with one fault put in, which the host must refuse: else a green test would say little."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest

from mixbit.kernels.executor import Batch, CacheConfig, ExecutorOptions
from mixbit.kernels.mlx.custom import launch
from mixbit.kernels.mlx.custom.sources import Language, Source, source
from mixbit.kernels.ops import Program
from tests.kernels import test_attention, test_gated_delta
from tests.kernels.builders import Sequences, Tensors, assert_close, program_of
from tests.kernels.conftest import REFERENCE
from tests.kernels.test_executor import PROGRAM
from tests.metal.backend import HostMetalBackend
from tests.metal.host import HostMetal, MetalError

LONG = CacheConfig(blocks=40, block_size=4, state_slots=2)
SYNC = "threadgroup_sync();\n"


@dataclass(frozen=True)
class Case:
    """A program, and how many tokens to give it at once."""

    program: Program
    pieces: tuple[int, ...]

    def batches(self) -> list[Batch]:
        sequences = Sequences(LONG, count=1)
        return [sequences.step({0: np.arange(n) % 8}) for n in self.pieces]


def _moe(rows: int) -> Case:
    tensors = Tensors(seed=40)
    spec = tensors.moe(dim=64, hidden=96, experts=40, top_k=6, bits=4)
    return Case(program_of(tensors.values(rows, 64), lambda b, value: b.moe(value, spec)), (rows,))


def case_of(kernel: str) -> Case:
    """What runs the kernel."""
    if kernel.startswith("attention"):
        return Case(test_attention.layer(test_attention.SHAPES["normed"]), (5, 1))
    if kernel == "gated_delta":
        return Case(test_gated_delta.layer("two-to-one"), (5, 1))
    if kernel == "prefill_experts":
        return _moe(50)
    if kernel.startswith("prefill_delta"):
        return Case(test_gated_delta.layer("two-to-one"), (40, 5))
    return _moe(3) if kernel in {"experts_hidden", "experts_project", "router"} else Case(PROGRAM, (1, 3))


# (kernel, what is in its text, what stands there instead, which of equal places)
FAULTS = {
    "add_norm: no barrier": ("add_norm", SYNC, "", 0),
    "add_norm: one column too many": ("add_norm", "i < DIM", "i <= DIM", 0),
    "attention_write: no barrier": ("attention_write", SYNC, "", 0),
    "attention_write: cell of the next head": ("attention_write", "* HEAD_DIM + at;", "* HEAD_DIM + at + 4096;", 0),
    "attention_decode: past the table": ("attention_decode", "min(first + p, end - 1)", "first + p + 4 * BLOCK", 0),
    "attention_decode: every lane stores the total": ("attention_decode", "if (lane == 0)", "if (lane < 2)", 0),
    "attention_join: one part too many": ("attention_join", "part < parts", "part <= parts", 0),
    "gated_delta: no barrier before the norms": ("gated_delta", SYNC, "", 0),
    "gated_delta: no barrier before the output": ("gated_delta", SYNC, "", 1),
    "gated_delta: a row too many": ("gated_delta", "if (row < VALUE_DIM)", "if (row <= VALUE_DIM)", 0),
    "matvec: rows past the matrix": ("matvec", "min(first + r, uint(OUT - 1))", "first + r + OUT", 0),
    "matvec: tokens past the end": ("matvec", "&& first_token + t < tokens", "", 0),
    "router: logits past the end": ("router", "expert < EXPERTS ?", "expert < 4096 ?", 0),
    "router: a lane leaves early": (
        "router",
        "total = simd_sum(total);",
        "if (lane) return; total = simd_sum(total);",
        0,
    ),
    "experts_hidden: a job too many": ("experts_hidden", "job < pairs", "job <= pairs", 0),
    "experts_hidden: rows past the stack": (
        "experts_hidden",
        "size_t(expert) * HIDDEN",
        "size_t(expert + 40) * HIDDEN",
        0,
    ),
    "experts_project: no barrier": ("experts_project", SYNC, "", 0),
    "prefill_delta_mix: tokens past the end": ("prefill_delta_mix", "token < count && ", "", 0),
    "prefill_delta_mix: a state too short": ("prefill_delta_mix", "token < 0 ?", "token < -1 ?", 0),
    "prefill_delta_mix: lanes past the head": ("prefill_delta_mix", "if (i * 32 + lane < dim)", "", 0),
    "prefill_delta_mix: every run keeps the last inputs": ("prefill_delta_mix", "if (first == 0)", "", 0),
    "prefill_delta_solve: no barrier after the products": ("prefill_delta_solve", SYNC, "", 0),
    "prefill_delta_solve: no barrier before the substitution": ("prefill_delta_solve", SYNC, "", 1),
    "prefill_delta_solve: gates past the end": ("prefill_delta_solve", "if (token < count)", "", 0),
    "prefill_delta_solve: half a simdgroup multiplies": (
        "prefill_delta_solve",
        "column = 0;",
        "column = lane / 16 * 8;",
        0,
    ),
    "prefill_delta_solve: two simdgroups substitute": (
        "prefill_delta_solve",
        "if (simdgroup == 0)",
        "if (simdgroup < 2)",
        1,
    ),
    "prefill_delta_advance: a chunk too many": ("prefill_delta_advance", "n < chunks", "n <= chunks", 0),
    "prefill_delta_advance: values of the next head": (
        "prefill_delta_advance",
        "* VALUE_DIM + first;",
        "* VALUE_DIM + first + 1;",
        0,
    ),
    "prefill_delta_advance: half a simdgroup goes on": (
        "prefill_delta_advance",
        "n < chunks",
        "n < chunks - thread_index_in_simdgroup / 16",
        0,
    ),
    "prefill_delta_norm: a value too many": ("prefill_delta_norm", "i < VALUE_DIM", "i <= VALUE_DIM", 1),
    "prefill_delta_norm: a lane leaves early": (
        "prefill_delta_norm",
        "const float factor",
        "if (lane) return;\nconst float factor",
        0,
    ),
    "prefill_experts: no barrier before the products": ("prefill_experts", SYNC, "", 0),
    "prefill_experts: no barrier after the products": ("prefill_experts", SYNC, "", 1),
    "prefill_experts: no barrier before the sums are read": ("prefill_experts", SYNC, "", 2),
    "prefill_experts: no barrier before the next sums": ("prefill_experts", SYNC, "", 3),
    "prefill_experts: columns past the matrix": ("prefill_experts", "if (at < OUT)", "", 0),
    "prefill_experts: rows of the next expert": ("prefill_experts", "i < used * 16", "i < ROWS * 16", 0),
    "prefill_experts: pairs past the end": ("prefill_experts", "if (row < used)", "", 0),
    "prefill_experts: half a simdgroup multiplies": (
        "prefill_experts",
        "if (top < used) {",
        "if (top < used && thread_index_in_simdgroup < 16) {",
        0,
    ),
}


def run(case: Case, seed: int) -> tuple[HostMetal, list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]]:
    backend = HostMetalBackend(HostMetal(seed=seed, in_place=frozenset({"keys", "cached"})))
    executor = backend.compile(case.program, LONG, ExecutorOptions(max_tokens=64, dtype="float32"))
    return backend.host, [executor.run(batch) for batch in case.batches()]


def run_in_some_order(case: Case) -> None:
    """In three orders of threads: a race need not show in each."""
    for seed in (0, 1, 2):
        run(case, seed)


def mutated(text: Source, old: str, new: str, place: int) -> Source:
    """The text with one occurrence replaced."""
    for part in ("body", "header"):
        pieces = getattr(text, part).split(old)
        if len(pieces) > place + 1:
            changed = old.join(pieces[: place + 1]) + new + old.join(pieces[place + 1 :])
            return text._replace(**{part: changed})
    raise AssertionError(f"{old!r} is not in the text")


@pytest.fixture(autouse=True)
def _on_cpu() -> None:
    mx.set_default_device(mx.cpu)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, old, new, place = FAULTS[fault]

    def with_fault(name: str, language: Language) -> Source:
        text = source(name, language)
        return mutated(text, old, new, place) if name == kernel else text

    monkeypatch.setattr(launch, "source", with_fault)
    refused = r"race|out of bounds|divergence|nothing has written|outside of every buffer"
    with pytest.raises(MetalError, match=refused):
        run_in_some_order(case_of(kernel))


@pytest.mark.parametrize("kernel", sorted({kernel for kernel, *_ in FAULTS.values()}))
def test_without_a_fault_the_kernel_runs_and_is_right(kernel: str) -> None:
    """So that the cases above fail for their faults alone, and do run the kernel that they change."""
    case = case_of(kernel)
    host, outs = run(case, 1)
    assert kernel in host.sources
    reference = REFERENCE.compile(case.program, LONG)
    for out, batch in zip(outs, case.batches(), strict=True):
        assert_close(out, reference.run(batch), 1e-4)
