"""Streamed experts: results equal to the bit to those with all in memory, and clear ends where files fail."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import numpy.typing as npt
import pytest

from mixbit.engine.loader import load
from mixbit.kernels.cpu.backend import CpuBackend, CpuExecutor
from mixbit.kernels.cpu.recorder import record
from mixbit.kernels.executor import BackendError, CacheConfig, ExecutorOptions, Precision
from mixbit.kernels.experts import Access, ExpertMemory, WeightsError, expert_bytes, stacks, streamable
from mixbit.kernels.ops import AddNorm, MlpSpec, Moe, Program
from mixbit.kernels.spec import Matrix, StoredArray
from tests.checkpoints import VOCAB_SIZE, write_checkpoint
from tests.kernels.builders import Sequences

CACHE = CacheConfig(blocks=80, block_size=16, state_slots=4)
EXPERTS = 24
WIDTHS = {
    "*.mlp.gate": (8, 64),
    "*.shared_expert_gate": (8, 64),
    "*.layers.2.mlp.switch_mlp.*": (2, 32),  # other sizes: slots of their own
    "*.layers.3.mlp.switch_mlp.down_proj": None,
}


@pytest.fixture(scope="module", params=["qwen3_moe", "qwen3_next"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(
        tmp_path_factory.mktemp("models") / request.param,
        request.param,
        shards=3,
        overrides=WIDTHS,
        config={"num_experts": EXPERTS, "num_experts_per_tok": 4},
    )


@pytest.fixture(scope="module")
def program(directory: Path) -> Program:
    return load(directory).program


def compile_cpu(program: Program, experts: ExpertMemory | None, precision: Precision = "exact") -> CpuExecutor:
    options = ExecutorOptions(max_tokens=256, threads=2, precision=precision, experts=experts)
    return CpuBackend().compile(program, CACHE, options)


def steps() -> Iterator[dict[int, list[int]]]:
    """A long prompt, decoding, a second prompt beside it, decoding of both, and a third prompt in two chunks."""
    random = np.random.default_rng(0)

    def tokens(count: int) -> list[int]:
        return [int(token) for token in random.integers(0, VOCAB_SIZE, count)]

    yield {0: tokens(250)}
    for _ in range(8):
        yield {0: tokens(1)}
    yield {1: tokens(20), 0: tokens(1)}
    for _ in range(8):
        yield {0: tokens(1), 1: tokens(1)}
    yield {2: tokens(200)}
    yield {2: tokens(100), 1: tokens(1)}


def converse(executor: CpuExecutor) -> npt.NDArray[np.float32]:
    sequences = Sequences(CACHE, count=3)
    return np.concatenate([executor.run(sequences.step(step)) for step in steps()])


def test_short_arrays_are_read_once(program: Program) -> None:
    """Scales and biases that were read stay in memory when their expert leaves it."""
    memory = ExpertMemory(16 * CpuBackend().least_expert_bytes(program), "direct")
    streaming = compile_cpu(program, memory)
    for _ in range(3):
        np.testing.assert_array_equal(converse(streaming), converse(compile_cpu(program, None)))
    assert streaming.expert_bytes <= memory.nbytes
    for node, counts in zip(streamable(program), streaming.expert_counts(), strict=True):
        whole = sum(matrix.nbytes for matrix in stacks(node)) // EXPERTS
        codes = sum(matrix.stored[0].nbytes for matrix in stacks(node)) // EXPERTS
        reads = counts.misses + counts.unused
        assert reads > EXPERTS
        if codes < whole:
            assert counts.bytes_read <= reads * codes + EXPERTS * (whole - codes) < reads * whole


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("access", get_args(Access))
@pytest.mark.parametrize("slots", [1, 2, 3, 7, 20, EXPERTS * 4])
def test_results_are_those_of_the_resident_form_to_the_bit(
    program: Program, slots: int, access: Access, precision: Precision
) -> None:
    memory = ExpertMemory(slots * CpuBackend().least_expert_bytes(program), access)
    streaming = compile_cpu(program, memory, precision)
    got = converse(streaming)
    np.testing.assert_array_equal(got, converse(compile_cpu(program, None, precision)))
    assert 0 < streaming.expert_bytes <= memory.nbytes
    counts = streaming.expert_counts()
    layers = list(streamable(program))
    assert len(counts) == len(layers)
    one = [sum(matrix.nbytes for matrix in stacks(node)) // EXPERTS for node in layers]
    codes = [sum(matrix.stored[0].nbytes for matrix in stacks(node)) // EXPERTS for node in layers]
    for each, nbytes, least in zip(counts, one, codes if access == "direct" else one, strict=True):
        assert each.misses * least <= each.bytes_read <= (each.misses + each.unused) * nbytes
    if slots == EXPERTS * 4:  # all of a layer were read at most once
        assert all(each.misses <= EXPERTS < each.hits for each in counts)


def test_a_prompt_reads_each_expert_once_however_few_fit(program: Program) -> None:
    executor = compile_cpu(program, ExpertMemory(6 * CpuBackend().least_expert_bytes(program)))
    tokens = np.random.default_rng(1).integers(0, VOCAB_SIZE, 256)
    executor.run(Sequences(CACHE, count=1).step({0: tokens}))
    assert all(EXPERTS // 2 < each.misses <= EXPERTS for each in executor.expert_counts())


def test_sequences_of_a_step_share_reads(program: Program) -> None:
    def misses(count: int) -> int:
        executor = compile_cpu(program, ExpertMemory(CpuBackend().least_expert_bytes(program) * EXPERTS * 4))
        sequences = Sequences(CACHE, count=4)
        executor.run(sequences.step({number: [7, 3, 9] for number in range(count)}))
        return sum(each.misses for each in executor.expert_counts())

    assert misses(4) == misses(1)


def test_what_a_layer_will_probably_ask_for_is_read_before_it_asks(program: Program) -> None:
    """Some of it in vain; what is read is one or the other, to the byte, and a layer's misses are what they were."""
    memory = ExpertMemory(CpuBackend().least_expert_bytes(program) * EXPERTS)
    executor, sequences = compile_cpu(program, memory), Sequences(CACHE, count=1)
    for token in np.random.default_rng(2).integers(0, VOCAB_SIZE, 200):
        executor.run(sequences.step({0: [int(token)]}))
    counts = executor.expert_counts()
    assert sum(each.ahead for each in counts) > 0
    for each, node in zip(counts, streamable(program), strict=True):
        one = sum(matrix.nbytes for matrix in stacks(node)) // EXPERTS
        assert each.hits + each.misses == 200 * node.spec.top_k
        assert each.ahead <= each.misses
        assert each.misses * one <= each.bytes_read <= (each.misses + each.unused) * one


def test_a_layer_is_guessed_while_the_one_before_is_read(program: Program) -> None:
    """From the sum that the layer before has yet to add to."""
    recorded: list[tuple[str, dict[str, Any]]] = []

    class Native:
        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *_, **named: recorded.append((name, named))

    moes = list(streamable(program))
    files = {place.file: 0 for moe in moes for matrix in stacks(moe) for place in matrix.stored}
    record(program, cast(Any, Native()), files)
    sums = {node.delta: node.x.index for node in program.nodes if isinstance(node, AddNorm)}
    found = {named["layer"]: named["before"] for name, named in recorded if name == "read_ahead"}
    after_dense = [layer for layer, before in found.items() if before is None]  # or after the embedding
    assert after_dense == ([0] if program.gated_deltas else [0, 1])
    for layer, moe in enumerate(moes[:-1], 1):
        assert found[layer] in (None, sums[moe.out])


def test_a_prompt_does_not_read_ahead_for_rows_that_are_not_wanted(program: Program) -> None:
    """The last layer computes the selected row alone."""
    executor = compile_cpu(program, ExpertMemory(CpuBackend().least_expert_bytes(program) * EXPERTS * 4))
    prompt = np.random.default_rng(5).integers(0, VOCAB_SIZE, 200).tolist()
    executor.run(Sequences(CACHE, count=1).step({0: prompt}, logit_rows=[199]))
    *others, last = zip(executor.expert_counts(), streamable(program), strict=True)
    assert all(counts.misses == EXPERTS for counts, _ in others)
    assert (last[0].misses, last[0].unused) == (last[1].spec.top_k, 0)


def slot_pages() -> dict[str, int]:
    """KB of the maps that huge pages were asked for, and what of them is in memory."""
    total, fields = {"Size": 0, "Rss": 0}, dict[str, str]()
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        fields[name] = value
        if name == "VmFlags" and "hg" in value.split():  # the last line of each map
            total = {key: known + int(fields[key].split()[0]) for key, known in total.items()}
    return total


@pytest.mark.skipif(sys.platform != "linux", reason="memory is asked for ahead on Linux alone")
def test_memory_for_slots_is_there_before_they_are_used_and_what_they_hold_stays(program: Program) -> None:
    executor = compile_cpu(program, ExpertMemory(CpuBackend().least_expert_bytes(program) * EXPERTS * 4))
    first = executor.run(Sequences(CACHE, count=1).step({0: [1]}))
    deadline = time.monotonic() + 20
    while (slots := slot_pages())["Rss"] < slots["Size"]:
        assert time.monotonic() < deadline, f"not all slots are in memory: {slots}"
        time.sleep(0.05)
    assert 1024 * slots["Size"] >= executor.expert_bytes
    misses = [each.misses for each in executor.expert_counts()]
    np.testing.assert_array_equal(executor.run(Sequences(CACHE, count=1).step({0: [1]})), first)
    assert [each.misses for each in executor.expert_counts()] == misses


@pytest.mark.skipif(sys.platform != "linux", reason="a map can be filled on demand on Linux alone")
def test_mapped_experts_take_no_memory_of_their_own(program: Program) -> None:
    before = slot_pages()["Size"]
    memory = ExpertMemory(CpuBackend().least_expert_bytes(program) * EXPERTS * 4, "mapped")
    executor = compile_cpu(program, memory)
    executor.run(Sequences(CACHE, count=1).step({0: [1]}))
    assert slot_pages()["Size"] == before
    assert 0 < executor.expert_bytes <= memory.nbytes


def test_less_memory_than_one_expert_is_refused_with_the_numbers(program: Program) -> None:
    least = CpuBackend().least_expert_bytes(program)
    with pytest.raises(BackendError, match=rf"{least - 1} bytes.*{least}"):
        compile_cpu(program, ExpertMemory(least - 1))


def test_slots_stay_within_the_memory_given(program: Program) -> None:
    for extra in range(0, 600_000, 77_777):
        host = CpuBackend().least_expert_bytes(program) + extra
        executor = compile_cpu(program, ExpertMemory(host))
        assert executor.expert_bytes <= host
        assert executor.expert_slots >= 1


def test_the_resident_form_counts_nothing(program: Program) -> None:
    executor = compile_cpu(program, None)
    assert (executor.expert_counts(), executor.expert_bytes, executor.expert_slots) == ([], 0, 0)
    assert expert_bytes(program) == sum(matrix.nbytes for node in streamable(program) for matrix in stacks(node)) > 0


def elsewhere(program: Program, place: Callable[[StoredArray], StoredArray]) -> Program:
    """The program, with experts that claim to lie elsewhere."""

    def moved(matrix: Matrix) -> Matrix:
        return replace(matrix, stored=tuple(map(place, matrix.stored)))

    def changed(node: Moe) -> Moe:
        experts = MlpSpec(*(moved(matrix) for matrix in stacks(node)))
        return replace(node, spec=replace(node.spec, experts=experts))

    nodes = tuple(changed(node) if isinstance(node, Moe) else node for node in program.nodes)
    return replace(program, nodes=nodes)


@pytest.mark.parametrize("access", get_args(Access))
def test_a_file_that_is_truncated_late_ends_the_step_and_nothing_else(tmp_path: Path, access: Access) -> None:
    path = write_checkpoint(tmp_path / "model", "qwen3_moe", config={"num_experts": EXPERTS, "num_experts_per_tok": 2})
    whole = load(path).program
    file = tmp_path / "model-copy.safetensors"  # the dense part stays: it is mapped
    shutil.copy(path / "model.safetensors", file)
    program = elsewhere(whole, lambda place: replace(place, file=file))
    memory = ExpertMemory(CpuBackend().least_expert_bytes(program) * EXPERTS * 4, access)
    executor, sequences = compile_cpu(program, memory), Sequences(CACHE, count=2)
    before = executor.run(sequences.step({0: [5, 6]}))
    data, prompt = file.read_bytes(), np.arange(200) % VOCAB_SIZE
    with file.open("r+b") as writing:
        writing.truncate(next(place.offset for node in streamable(program) for place in stacks(node)[0].stored))
    message = r"model-copy\.safetensors: ends at byte \d+, before byte \d+ .*download it again"
    for _ in range(2):
        with pytest.raises(WeightsError, match=message):
            executor.run(sequences.step({1: prompt}))
        sequences.restart(1)
    sequences.restart(0)
    if access != "mapped":  # what is in memory still works
        np.testing.assert_array_equal(executor.run(sequences.step({0: [5, 6]})), before)
    else:  # what was mapped is gone: an error, not a fault
        with pytest.raises(WeightsError, match=message):
            executor.run(sequences.step({0: [5, 6]}))
    file.write_bytes(data)
    sequences.restart(0)
    np.testing.assert_array_equal(executor.run(sequences.step({0: [5, 6]})), before)
    got = executor.run(sequences.step({1: prompt}))
    np.testing.assert_array_equal(got, compile_cpu(whole, None).run(Sequences(CACHE, count=1).step({0: prompt})))


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file whose reads fail: /proc/self/mem")
def test_an_error_of_the_disk_is_told_with_file_place_and_reason(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", "qwen3_moe", config={"num_experts": EXPERTS, "num_experts_per_tok": 2})
    program = elsewhere(load(path).program, lambda place: replace(place, file=Path("/proc/self/mem"), offset=4096))
    executor = compile_cpu(program, ExpertMemory(CpuBackend().least_expert_bytes(program)))
    for _ in range(3):  # nothing is mapped there; and again: nothing hangs, nothing is kept
        with pytest.raises(WeightsError, match=r"mem: cannot be read at byte \d+: Input/output error; check the disk"):
            executor.run(Sequences(CACHE, count=1).step({0: [1, 2, 3]}))


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", "qwen3_moe")
    program = elsewhere(load(path).program, lambda place: replace(place, file=tmp_path / "gone.safetensors"))
    with pytest.raises(BackendError, match=r"gone\.safetensors: cannot be opened: No such file"):
        compile_cpu(program, ExpertMemory(CpuBackend().least_expert_bytes(program)))
