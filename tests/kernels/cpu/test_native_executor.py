"""What the native executor promises beyond its answers: see tests/kernels for those."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mixbit.kernels.cpu import _cpu
from mixbit.kernels.cpu.backend import CpuBackend, CpuExecutor
from mixbit.kernels.executor import BackendError, Batch, CacheConfig, ExecutorOptions
from mixbit.kernels.ops import AttentionSpec, Columns, Program, Rope
from mixbit.kernels.spec import BatchMatvecSpec, QuantizedTensor
from tests.kernels.builders import CACHE, Sequences, Tensors, all_rows, assert_close, feed, program_of
from tests.kernels.test_executor import PROGRAM, VOCAB, last_rows

FloatArray = npt.NDArray[np.float32]

LONG = CacheConfig(blocks=200, block_size=16, state_slots=1)
PROMPT = [int(token) for token in np.random.default_rng(3).integers(0, VOCAB, 40)]
WIDE = CacheConfig(blocks=60, block_size=4, state_slots=6)


def compile_cpu(program: Program, cache: CacheConfig = WIDE, threads: int = 2, max_tokens: int = 256) -> CpuExecutor:
    return CpuBackend().compile(program, cache, ExecutorOptions(max_tokens=max_tokens, threads=threads))


def attention_only(tokens: int, heads: int = 6, kv_heads: int = 2, dim: int = 16) -> Program:
    """Attention straight from the embedding, so that nothing else can make results differ."""
    t = Tensors(5)
    rope = Rope((100.0 ** -np.linspace(0, 1, dim // 2)).astype(np.float32))
    spec = AttentionSpec(heads, kv_heads, dim, dim**-0.5, rope, t.norm(dim), t.norm(dim))
    width = heads + 2 * kv_heads
    return program_of(
        t.values(tokens, width * dim),
        lambda b, x: b.attention(
            Columns(x, 0, dim), Columns(x, heads * dim, dim), Columns(x, (heads + kv_heads) * dim, dim), spec
        ),
    )


def converse(executor: CpuExecutor) -> list[FloatArray]:
    """Prefill, mixed and decode steps of three sequences."""
    sequences = Sequences(WIDE, count=3)
    steps: tuple[dict[int, list[int]], ...] = (
        {0: PROMPT},
        {1: PROMPT[5:9], 0: [8]},
        {0: [10], 2: PROMPT[:17], 1: [14]},
        {2: [3], 1: [2], 0: [1]},
    )
    return [executor.run(last_rows(sequences, step)) for step in steps]


@pytest.mark.parametrize("threads", [2, 5])
def test_results_do_not_depend_on_threads(threads: int) -> None:
    executor = compile_cpu(PROGRAM, threads=threads)
    assert executor.threads == threads
    for _ in range(5):  # claims fall differently each time
        for alone, shared in zip(converse(compile_cpu(PROGRAM, threads=1)), converse(executor), strict=True):
            np.testing.assert_array_equal(shared, alone)


def test_all_usable_cores_by_default() -> None:
    threads = compile_cpu(PROGRAM, threads=0).threads
    assert threads >= 1
    assert f", {threads} thread" in CpuBackend().describe()


def test_attention_is_the_same_to_the_bit_in_any_company() -> None:
    """Alone a long context is split among threads, in a crowd each query has one; runs of keys end at fixed places."""
    program = attention_only(VOCAB)
    history = [int(token) for token in np.random.default_rng(0).integers(0, VOCAB, 900)]
    alone, together = compile_cpu(program, LONG, 3, 1024), compile_cpu(program, LONG, 3, 1024)
    few, many = Sequences(LONG, count=1, seed=1), Sequences(replace(LONG, blocks=190), count=1, seed=2)
    alone.run(few.step({0: history}))
    together.run(many.step({0: history}))
    want = alone.run(few.step({0: [7]}))

    extra = Batch(
        tokens=np.arange(9, dtype=np.int32),
        query_starts=np.arange(10, dtype=np.int32),
        context_lengths=np.zeros(9, np.int32),
        block_tables=np.arange(190, 199, dtype=np.int32)[:, None],
        state_slots=np.zeros(9, np.int32),
        logit_rows=np.zeros(0, np.int32),
    )
    own = many.step({0: [7]})
    tables = np.full((10, own.block_tables.shape[1]), -1, np.int32)
    tables[:1], tables[1:, :1] = own.block_tables, extra.block_tables
    batch = Batch(
        tokens=np.concatenate([own.tokens, extra.tokens]),
        query_starts=np.arange(11, dtype=np.int32),
        context_lengths=np.concatenate([own.context_lengths, extra.context_lengths]),
        block_tables=tables,
        state_slots=np.zeros(10, np.int32),
        logit_rows=np.array([0], np.int32),
    )
    np.testing.assert_array_equal(together.run(batch), want)


def test_attention_of_chunks_and_of_one_prefill_are_equal_to_the_bit() -> None:
    program = attention_only(VOCAB)
    history = np.random.default_rng(0).integers(0, VOCAB, 700)
    whole = compile_cpu(program, LONG, 2, 1024).run(Sequences(LONG, count=1).step({0: history}))
    executor, sequences = compile_cpu(program, LONG, 2, 1024), Sequences(LONG, count=1)
    chunks = [executor.run(sequences.step({0: chunk})) for chunk in np.split(history, [1, 70, 71, 300, 689])]
    np.testing.assert_array_equal(np.concatenate(chunks), whole)


def test_the_company_of_a_sequence_changes_nothing_but_rounding() -> None:
    alone, together = compile_cpu(PROGRAM), compile_cpu(PROGRAM)
    one, three = Sequences(WIDE, count=1), Sequences(WIDE, count=3)
    for step in (PROMPT, [1], [2, 3], [4]):
        want = alone.run(last_rows(one, {0: step}))[-1]
        got = together.run(last_rows(three, {2: PROMPT[:7], 0: step, 1: [5]}))[1]
        assert_close(got, want, 1e-5)


def test_blocks_in_any_order() -> None:
    wants = None
    for seed in range(3):
        executor, sequences = compile_cpu(PROGRAM), Sequences(WIDE, count=2, seed=seed)
        got = [executor.run(sequences.step({1: PROMPT})), executor.run(sequences.step({1: [3]}))]
        wants = got if wants is None else wants
        for a, b in zip(got, wants, strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_slot_is_zero_again_for_a_new_sequence() -> None:
    executor = compile_cpu(PROGRAM)
    sequences = Sequences(WIDE, count=1)
    first = executor.run(sequences.step({0: PROMPT}))
    executor.run(sequences.step({0: [1, 2, 3]}))
    sequences.restart(0)
    np.testing.assert_array_equal(executor.run(sequences.step({0: PROMPT})), first)


def test_two_executors_at_once() -> None:
    """Each runs without the interpreter's lock, on its own threads and memory."""
    want = converse(compile_cpu(PROGRAM))
    got: dict[int, list[FloatArray]] = {}

    def work(i: int) -> None:
        executor = compile_cpu(PROGRAM)
        for _ in range(3):
            got[i] = converse(executor)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for results in got.values():
        for a, b in zip(results, want, strict=True):
            np.testing.assert_array_equal(a, b)
    assert len(got) == 3


def ints(*values: int) -> npt.NDArray[np.int32]:
    return np.array(values, np.int32)


MALFORMED: list[tuple[str, Callable[[Batch], Batch], str]] = [
    ("token too large", lambda b: replace(b, tokens=ints(1, 2, VOCAB)), f"token {VOCAB} at row 2 .* vocabulary"),
    ("token negative", lambda b: replace(b, tokens=ints(1, -1, 0)), "token -1 at row 1"),
    ("no tokens", lambda b: replace(b, tokens=ints(), query_starts=ints(0), context_lengths=ints()), "no tokens"),
    ("starts too short", lambda b: replace(b, query_starts=ints(0, 3)), "query_starts has 2 entries, expected 3"),
    ("starts from 1", lambda b: replace(b, query_starts=ints(1, 2, 3)), "run from 1 to 3"),
    ("starts beyond", lambda b: replace(b, query_starts=ints(0, 2, 9)), "run from 0 to 9, expected 0 to 3"),
    ("empty sequence", lambda b: replace(b, query_starts=ints(0, 3, 3)), "sequence 1 has no new token"),
    ("starts fall", lambda b: replace(b, query_starts=ints(0, 4, 3)), "sequence 1 has no new token"),
    ("context negative", lambda b: replace(b, context_lengths=ints(0, -1)), "sequence 1 has context length -1"),
    ("context enormous", lambda b: replace(b, context_lengths=ints(0, 2**31 - 1)), "sequence 1 has 2147483648 tokens"),
    ("context too long", lambda b: replace(b, context_lengths=ints(0, 40)), "needs 11 blocks for 41 tokens"),
    ("block missing", lambda b: replace(b, block_tables=ints(3, -1)[:, None]), "block -1 at entry 0 of sequence 1"),
    ("block too large", lambda b: replace(b, block_tables=ints(60, 0)[:, None]), "block 60 .* not one of 60"),
    ("tables missing", lambda b: replace(b, block_tables=np.zeros((1, 1), np.int32)), "block_tables has 1 entries"),
    ("slot too large", lambda b: replace(b, state_slots=ints(0, 6)), "state slot 6 of sequence 1 is not one of 6"),
    ("slot negative", lambda b: replace(b, state_slots=ints(-1, 0)), "state slot -1"),
    ("slot twice", lambda b: replace(b, state_slots=ints(2, 2)), "state slot 2 is used by two sequences"),
    ("slot missing", lambda b: replace(b, state_slots=ints(2)), "state_slots has 1 entries for 2 sequences"),
    ("logits beyond", lambda b: replace(b, logit_rows=ints(0, 3)), "logit row 3 of 3 rows"),
    ("logits before", lambda b: replace(b, logit_rows=ints(-1)), "logit row -1"),
    ("logits too many", lambda b: replace(b, logit_rows=np.zeros(17, np.int32)), "17 logit_rows, at most 16"),
    (
        "too many rows",
        lambda b: replace(b, tokens=np.zeros(17, np.int32), query_starts=ints(0, 2, 17)),
        "17 tokens, .* at most 16",
    ),
]


@pytest.mark.parametrize(("spoil", "says"), [case[1:] for case in MALFORMED], ids=[case[0] for case in MALFORMED])
def test_malformed_batches_are_refused_and_change_nothing(spoil: Callable[[Batch], Batch], says: str) -> None:
    executor, other = (compile_cpu(PROGRAM, max_tokens=16) for _ in range(2))
    sequences = Sequences(WIDE, count=3)
    before = sequences.step({0: [1, 2, 3]})
    np.testing.assert_array_equal(executor.run(before), other.run(before))
    good = Batch(ints(1, 2, 3), ints(0, 2, 3), ints(0, 0), ints(0, 1)[:, None], ints(0, 1), ints(2))
    with pytest.raises(ValueError, match=says):
        executor.run(spoil(good))
    after = sequences.step({0: [4]})
    np.testing.assert_array_equal(executor.run(after), other.run(after))


def test_batches_of_wrong_types_are_refused() -> None:
    executor = compile_cpu(PROGRAM)
    good = Sequences(WIDE, count=1).step({0: [1]})
    with pytest.raises(TypeError):
        executor.run(replace(good, tokens=np.array(["a"])))
    with pytest.raises(TypeError):
        executor.run(replace(good, tokens=np.zeros((1, 1), np.int32)))


def test_unknown_or_unsupported_instruction_sets_name_the_supported() -> None:
    for isa in {"sse9", "avx2", "avx512", "amx", "neon"} - set(_cpu.supported_isas()):
        with pytest.raises(BackendError, match=f"'{isa}' cannot run here; this machine and build run: portable"):
            CpuBackend().compile(PROGRAM, CACHE, ExecutorOptions(max_tokens=1, isa=isa))


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(BackendError, match="computes in float32, not bfloat16"):
        CpuBackend().compile(PROGRAM, CACHE, ExecutorOptions(max_tokens=1, dtype="bfloat16"))


def unaligned(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A read-only copy that starts at an odd address, as a tensor of a memory-mapped file may."""
    raw = np.zeros(array.nbytes + 1, np.uint8)
    raw[1:] = array.reshape(-1).view(np.uint8)
    moved = np.ndarray(array.shape, array.dtype, raw, offset=1)
    moved.flags.writeable = False
    return moved


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_may_lie_at_odd_addresses(bits: int, dtype: str) -> None:
    t = Tensors(bits)
    q = t.quantized(24, 96, bits=bits, dtype=dtype)
    x = t.values(5, 96)

    def run(matrix: QuantizedTensor) -> FloatArray:
        program = program_of(x, lambda b, v: b.batch_matvec(v, BatchMatvecSpec(matrix))[0])
        return compile_cpu(program).run(all_rows(range(5)))

    moved = replace(q, weight=unaligned(q.weight), scales=unaligned(q.scales), biases=unaligned(q.biases))
    np.testing.assert_array_equal(run(moved), run(q))


def test_tokens_of_a_long_step_are_computed_in_slices_equal_to_the_bit() -> None:
    t = Tensors()
    specs = [BatchMatvecSpec(t.quantized(rows, 64, bits=bits), t.dense(rows)) for rows, bits in ((40, 4), (24, 8))]
    program = program_of(t.values(1300, 64), lambda b, v: b.batch_matvec(v, *specs)[1])
    tokens = np.arange(1300)

    def run(part: npt.NDArray[np.int64]) -> FloatArray:
        step = Sequences(LONG, count=1).step({0: [int(token) for token in part]})
        return compile_cpu(program, LONG, max_tokens=1300).run(step)

    whole = run(tokens)
    np.testing.assert_array_equal(whole, np.concatenate([run(part) for part in np.split(tokens, 13)]))
    assert len(np.unique(whole, axis=0)) == len(tokens)


def test_weights_are_not_copied() -> None:
    t = Tensors()
    q = t.quantized(32, 64, bits=4)
    executor = compile_cpu(program_of(t.values(2, 64), lambda b, v: b.batch_matvec(v, BatchMatvecSpec(q))[0]))
    assert np.abs(executor.run(all_rows([0, 1]))).max() > 0
    q.scales[:], q.biases[:] = 0, 0
    assert np.abs(executor.run(all_rows([0, 1]))).max() == 0


def test_weights_in_pieces_are_refused_by_name() -> None:
    t = Tensors()
    q = t.quantized(32, 64, bits=4)
    scattered = replace(q, name="model.gate", scales=np.asfortranarray(q.scales))
    with pytest.raises(ValueError, match=r"model\.gate: its values do not lie one after another"):
        compile_cpu(program_of(t.values(1, 64), lambda b, v: b.batch_matvec(v, BatchMatvecSpec(scattered))[0]))


def test_values_that_live_on_keep_their_memory() -> None:
    """Buffers are shared by values whose lives do not overlap: here the first lives to the end."""
    t = Tensors()
    x = t.values(4, 32)
    builder, value = feed(x)
    total, out = value, value
    for _ in range(5):
        (out,) = builder.batch_matvec(out, BatchMatvecSpec(t.dense(32, 32, scale=1.0)))
    for _ in range(3):
        total, _ = builder.add_norm(total, value, t.norm(32))
    got = compile_cpu(builder.build(builder.select_rows(total))).run(all_rows(range(4)))
    np.testing.assert_allclose(got, 4 * x, rtol=1e-6)
