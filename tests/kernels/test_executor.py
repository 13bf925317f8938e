"""What every executor offers beside logits."""

from __future__ import annotations

import numpy as np
import pytest

from mixbit.kernels.executor import BackendError, Batch, CacheConfig, Executor
from mixbit.kernels.ops import AttentionSpec, BatchMatvec, Columns, GatedDeltaSpec, Program, ProgramBuilder, kind
from mixbit.kernels.reference.matrix import batch_matvec
from mixbit.kernels.spec import BatchMatvecSpec
from tests.kernels.builders import CACHE, FloatArray, Sequences, Tensors, assert_close
from tests.kernels.conftest import REFERENCE, Candidate

DIM, VOCAB = 64, 40


def model() -> Program:
    """A tiny model with every node, recurrent and attention layers, and mixed widths."""
    t, b = Tensors(20), ProgramBuilder()
    x = b.embed(t.quantized(VOCAB, DIM, bits=8))
    normed = b.rms_norm(x, t.norm(DIM))
    qkvz, ba = b.batch_matvec(
        normed, BatchMatvecSpec(t.quantized(192, DIM, bits=4)), BatchMatvecSpec(t.quantized(8, DIM, bits=8))
    )
    delta = GatedDeltaSpec(2, 4, 16, 16, t.dense(128, 4), t.dense(4), t.dense(4), t.norm(16))
    recurrent = b.gated_delta(
        Columns(qkvz, 0, 96),
        Columns(qkvz, 16, 96),
        Columns(qkvz, 32, 96),
        Columns(qkvz, 64, 96),
        Columns(ba, 0, 4),
        Columns(ba, 2, 4),
        delta,
    )
    x, normed = b.add_norm(x, recurrent, t.norm(DIM))
    x, normed = b.add_norm(x, b.moe(normed, t.moe(DIM)), t.norm(DIM))
    q, k, v = b.batch_matvec(
        normed,
        BatchMatvecSpec(t.quantized(64, DIM, bits=6)),
        BatchMatvecSpec(t.quantized(32, DIM, bits=3)),
        BatchMatvecSpec(t.dense(32, DIM)),
    )
    attended = b.attention(Columns(q, 0, 16), Columns(k, 0, 16), Columns(v, 0, 16), AttentionSpec(4, 2, 16, 0.25, None))
    x, normed = b.add_norm(x, attended, t.norm(DIM))
    x, normed = b.add_norm(x, b.mlp(normed, t.mlp(DIM, 96, bits=2)), t.norm(DIM))
    (logits,) = b.batch_matvec(b.select_rows(normed), BatchMatvecSpec(t.quantized(VOCAB, DIM, bits=8)))
    return b.build(logits)


PROGRAM = model()


def last_rows(sequences: Sequences, tokens: dict[int, list[int]]) -> Batch:
    """A step that wants the logits of the last row of each sequence."""
    ends = np.cumsum([len(new) for new in tokens.values()]) - 1
    return sequences.step(tokens, [int(end) for end in ends])


def test_whole_model_like_reference(candidate: Candidate) -> None:
    ours, reference = candidate.compile(PROGRAM), REFERENCE.compile(PROGRAM)
    sequences = Sequences(CACHE, count=3)
    for tokens in (
        {0: [1, 2, 3, 4, 5, 6, 7]},
        {1: [9], 0: [8]},
        {0: [10], 2: [11, 12, 13], 1: [14]},
        {2: [3], 1: [2], 0: [1]},
    ):
        batch = last_rows(sequences, tokens)
        assert_close(ours.run(batch), reference.run(batch), candidate.rounding * 1e-4)


def test_hidden_states_like_reference_and_the_head_makes_the_logits_of_them(any_candidate: Candidate) -> None:
    ours, reference, of_logits = any_candidate.compile(PROGRAM), REFERENCE.compile(PROGRAM), REFERENCE.compile(PROGRAM)
    if ours.hidden_dim is None:
        with pytest.raises(BackendError, match="logits only"):
            ours.hidden_states(last_rows(Sequences(CACHE, count=1), {0: [1]}))
        return
    assert ours.hidden_dim == DIM
    sequences = Sequences(CACHE, count=3)
    head = PROGRAM.nodes[-1]
    assert isinstance(head, BatchMatvec)
    for tokens, rows in (({0: [1, 2, 3, 4, 5]}, [0, 1, 2, 3, 4]), ({1: [9, 7], 0: [8]}, [2, 0]), ({2: [3]}, [])):
        batch = sequences.step(tokens, rows)
        states = ours.hidden_states(batch)
        assert states.shape == (len(rows), DIM)
        assert_close(states, reference.hidden_states(batch), 1e-4)
        (logits,) = batch_matvec(head.specs, states)
        assert_close(logits, of_logits.run(batch), 1e-4)
    batch = last_rows(sequences, {0: [1], 1: [2], 2: [4]})  # the caches went on as in any step
    assert_close(ours.run(batch), reference.run(batch), 1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_random_schedules_like_reference(candidate: Candidate, seed: int) -> None:
    """Sequences start, pause, run in chunks and end, in any company and any order within the batch."""
    ours, reference = candidate.compile(PROGRAM), REFERENCE.compile(PROGRAM)
    rng = np.random.default_rng(seed)
    sequences = Sequences(CACHE, count=4, seed=seed)
    for _ in range(16):
        tokens: dict[int, list[int]] = {}
        for s in rng.permutation(4)[: rng.integers(1, 5)].tolist():
            count = int(rng.choice([1, 1, 1, 2, 5]))
            if sequences.lengths.get(s, 0) + count > 24 or rng.random() < 0.1:
                sequences.restart(s)
            tokens[s] = rng.integers(0, VOCAB, count).tolist()
        batch = last_rows(sequences, tokens)
        assert_close(ours.run(batch), reference.run(batch), candidate.rounding * 1e-4)


def test_steps_without_logits_still_fill_the_caches(any_candidate: Candidate) -> None:
    executor = any_candidate.compile(PROGRAM)
    sequences = Sequences(CACHE, count=1)
    nothing = executor.run(sequences.step({0: [1, 2, 3]}, []))
    assert nothing.shape == (0, VOCAB)
    got = executor.run(sequences.step({0: [4, 5]}, [1]))
    whole = REFERENCE.compile(PROGRAM).run(Sequences(CACHE, count=1).step({0: [1, 2, 3, 4, 5]}, [4]))
    assert_close(got, whole, 1e-4)


def test_two_executors_share_nothing_but_weights(any_candidate: Candidate) -> None:
    one, two = any_candidate.compile(PROGRAM), any_candidate.compile(PROGRAM)
    first = Sequences(CACHE, count=1)
    one.run(first.step({0: [1, 2, 3]}))
    two.run(Sequences(CACHE, count=1).step({0: [7, 8, 9]}))
    whole = REFERENCE.compile(PROGRAM).run(Sequences(CACHE, count=1).step({0: [1, 2, 3, 4]}, [3]))
    assert_close(one.run(first.step({0: [4]})), whole, 1e-4)


def test_logits_stay_valid_after_the_next_step(any_candidate: Candidate) -> None:
    executor = any_candidate.compile(PROGRAM)
    sequences = Sequences(CACHE, count=1)
    first = executor.run(sequences.step({0: [1]}))
    kept = first.copy()
    executor.run(sequences.step({0: [2]}))
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("profile", [True, False])
def test_phases_are_timed_by_kind_of_node(any_candidate: Candidate, profile: bool) -> None:
    executor = any_candidate.compile(PROGRAM, profile=profile)
    assert not executor.phase_seconds()
    sequences = Sequences(CACHE, count=1)
    logits = executor.run(sequences.step({0: [1, 2]}))
    assert_close(logits, REFERENCE.compile(PROGRAM).run(Sequences(CACHE, count=1).step({0: [1, 2]})), 1e-4)
    phases = dict(executor.phase_seconds())
    if not profile:
        assert phases == {}
        return
    assert set(phases) == {kind(node) for node in PROGRAM.nodes}
    assert all(seconds > 0 for seconds in phases.values())
    executor.run(sequences.step({0: [3]}))
    later = executor.phase_seconds()
    assert all(later[phase] > seconds for phase, seconds in phases.items())


def test_cache_bytes_grow_with_the_pools(any_candidate: Candidate) -> None:
    """KV of one layer: 2 x 2 heads x 16 values a token; a state: 4 x 16 x 16 and 3 x 128 values; 4 bytes each.

    A backend may pad, so these are the least.
    """
    small = any_candidate.compile(PROGRAM, CacheConfig(blocks=3, block_size=16, state_slots=2))
    large = any_candidate.compile(PROGRAM, CacheConfig(blocks=6, block_size=16, state_slots=2))
    more_states = any_candidate.compile(PROGRAM, CacheConfig(blocks=3, block_size=16, state_slots=5))
    assert large.cache_bytes - small.cache_bytes == 3 * 16 * 2 * 2 * 16 * 4
    assert more_states.cache_bytes - small.cache_bytes == 3 * (4 * 16 * 16 + 3 * 128) * 4


def test_a_sequence_goes_on_from_copied_and_from_imported_blocks_and_state(any_candidate: Candidate) -> None:
    """Another sequence continues the first in blocks and a slot of its own; the first is not changed by it."""
    size = CACHE.block_size
    prefix, one, two = [1 + token % 9 for token in range(size + 2)], [3, 4], [9, 8]

    def expected(tail: list[int]) -> FloatArray:
        whole = Sequences(CACHE, count=1).step({0: prefix + tail}, [len(prefix) + len(tail) - 1])
        return REFERENCE.compile(PROGRAM).run(whole)

    def continued(executor: Executor, blocks: list[int], slot: int, tail: list[int]) -> FloatArray:
        batch = Batch(
            tokens=np.array(tail, np.int32),
            query_starts=np.array([0, len(tail)], np.int32),
            context_lengths=np.array([len(prefix)], np.int32),
            block_tables=np.array([blocks], np.int32),
            state_slots=np.array([slot], np.int32),
            logit_rows=np.array([len(tail) - 1], np.int32),
        )
        return executor.run(batch)

    executor = any_candidate.compile(PROGRAM)
    batch = Sequences(CACHE, count=1).step({0: prefix})
    executor.run(batch)
    first, second, slot = *(int(block) for block in batch.block_tables[0][:2]), int(batch.state_slots[0])
    spare, other = [block for block in range(4) if block not in (first, second)][:2]
    copied = (slot + 1) % CACHE.state_slots
    executor.copy_block(second, spare)
    executor.copy_state(slot, copied)
    kept = executor.export_block(second), executor.export_state(slot)
    assert_close(continued(executor, [first, spare], copied, two), expected(two), 1e-4)
    assert_close(continued(executor, [first, second], slot, one), expected(one), 1e-4)
    executor.import_block(other, kept[0])
    executor.import_state(copied, kept[1])
    assert_close(continued(executor, [first, other], copied, two), expected(two), 1e-4)

    restarted = any_candidate.compile(PROGRAM)
    restarted.import_block(5, executor.export_block(first))
    restarted.import_block(6, kept[0])
    restarted.import_state(0, kept[1])
    assert_close(continued(restarted, [5, 6], 0, two), expected(two), 1e-4)
    for wrong in (kept[0][:-1], np.zeros(len(kept[0]) + 4, np.uint8)):
        with pytest.raises(ValueError, match=f"{len(wrong)} bytes, expected {len(kept[0])}"):
            restarted.import_block(5, wrong)
