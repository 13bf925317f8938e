"""Prefixes that come from the disk beside the steps, on a device whose answers depend on all that its cache holds."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt
import pytest

from mixbit.engine import disk_tier
from mixbit.engine.admission import Admission, Limits
from mixbit.engine.core import EngineCore
from mixbit.engine.disk_store import DiskStore, entries
from mixbit.engine.disk_tier import DiskTier
from mixbit.engine.protocol import Failed, Finished, FromWorker
from mixbit.engine.runner import Runner
from mixbit.engine.scheduler import Scheduler
from mixbit.kernels.executor import Batch, Bytes
from tests.engine.test_core import TOKENIZER, message, text_of

SIZE, BLOCKS, SLOTS, CONTEXT = 4, 64, 24, 100


class Device:
    """Keys and values are the tokens themselves; a state is a sum over all tokens. The next token follows from both."""

    def __init__(self, recurrent: bool) -> None:
        self.recurrent = recurrent
        self.blocks = np.zeros((BLOCKS, SIZE), np.int64)
        self.states = np.zeros((SLOTS, 1), np.int64)
        self.cache_bytes = 1

    def run(self, batch: Batch) -> npt.NDArray[np.float32]:
        rows = []
        for number, start in enumerate(batch.context_lengths):
            first, last = batch.query_starts[number : number + 2]
            table, slot = batch.block_tables[number], batch.state_slots[number]
            state = self.states[slot, 0] if start and self.recurrent else 0
            for position, token in enumerate(batch.tokens[first:last], start):
                self.blocks[table[position // SIZE], position % SIZE] = token
                state = (31 * state + int(token)) % 1_000_003 if self.recurrent else 0
            self.states[slot] = state
            seen = self.blocks[table[: (start + last - first - 1) // SIZE + 1]].ravel()[: start + last - first]
            if last - 1 in batch.logit_rows:
                row = np.zeros(TOKENIZER.vocab_size, np.float32)
                row[5 + int(seen @ np.arange(1, len(seen) + 1) + state) % (TOKENIZER.vocab_size - 5)] = 1
                rows.append(row)
        return np.array(rows, np.float32).reshape(-1, TOKENIZER.vocab_size)

    def copy_block(self, source: int, target: int) -> None:
        self.blocks[target] = self.blocks[source]

    def copy_state(self, source: int, target: int) -> None:
        self.states[target] = self.states[source]

    def export_block(self, block: int) -> Bytes:
        return np.array(self.blocks[block].view(np.uint8))

    def import_block(self, block: int, data: Bytes) -> None:
        self.blocks[block] = data.view(np.int64)

    def export_state(self, slot: int) -> Bytes:
        return np.array(self.states[slot].view(np.uint8))

    def import_state(self, slot: int, data: Bytes) -> None:
        self.states[slot] = data.view(np.int64)


class SlowStore(DiskStore):
    """Reads when it is let."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, "m", about="a model", limit=1 << 30)
        self.permits = threading.Semaphore(1 << 20)
        self.reads: Counter[str] = Counter()

    def read(self, name: str) -> memoryview | None:
        self.reads[name] += 1
        assert self.permits.acquire(timeout=20)
        return super().read(name)


def engine(root: Path | None, *, recurrent: bool, blocks: int = BLOCKS) -> tuple[EngineCore, SlowStore | None]:
    scheduler = Scheduler(
        blocks=blocks, block_size=SIZE, max_running=4, step_tokens=16, spare_states=SLOTS - 4 if recurrent else None
    )
    runner = Runner(Device(recurrent))  # type: ignore[arg-type]  # it has no phases to time
    store = None if root is None else SlowStore(root)
    tier = None if store is None else DiskTier(store, scheduler, runner, "00" * 20)
    limits = Limits(CONTEXT, scheduler.capacity, TOKENIZER.vocab_size, 16)
    return EngineCore(runner.run, scheduler, Admission(TOKENIZER, limits), tier), store


def run(core: EngineCore) -> list[FromWorker]:
    said: list[FromWorker] = []
    while not core.idle:
        said += core.step()
    core.scheduler.check_idle()
    return said


def ask(core: EngineCore, *prompts: list[int], names: str = "abcdefgh") -> list[FromWorker]:
    for name, prompt in zip(names, prompts, strict=False):
        core.add(core.admission.admit(message(name, prompt, ignore_eos=True)))
    return run(core)


def usage(said: list[FromWorker], name: str = "a") -> int:
    (finished,) = [each for each in said if isinstance(each, Finished) and each.request_id == name]
    return finished.usage.cached_tokens


@pytest.fixture(params=[False, True], ids=["attention", "recurrent"])
def recurrent(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


PROMPT = [int(token) for token in np.random.default_rng(1).integers(5, TOKENIZER.vocab_size, 43)]


@pytest.fixture
def written(tmp_path: Path, recurrent: bool) -> Path:
    """A directory with PROMPT in it."""
    core, store = engine(tmp_path / "disk", recurrent=recurrent)
    assert store is not None
    ask(core, PROMPT)
    while core.tidy() is not None:
        pass
    store.flush(10)
    return tmp_path / "disk"


def test_others_run_while_a_prefix_is_read(written: Path, recurrent: bool) -> None:
    cold = ask(engine(None, recurrent=recurrent)[0], PROMPT)
    core, store = engine(written, recurrent=recurrent)
    assert store is not None
    store.permits = threading.Semaphore(0)
    core.add(core.admission.admit(message("a", PROMPT, ignore_eos=True)))
    core.add(core.admission.admit(message("other", [7, 8], ignore_eos=True)))
    said: list[FromWorker] = []
    while not any(isinstance(each, Finished) for each in said):
        said += core.step()
    assert {each.request_id for each in said if isinstance(each, Finished)} == {"other"}
    assert (core.stats().waiting, core.stats().leaks, core.idle) == (1, 0, False)
    store.permits.release(1000)
    said += run(core)
    assert text_of(said) == text_of(cold)
    assert usage(said) >= 36


def test_a_request_that_is_given_up_while_its_prefix_is_read_leaves_nothing(written: Path, recurrent: bool) -> None:
    core, store = engine(written, recurrent=recurrent)
    assert store is not None
    store.permits = threading.Semaphore(0)
    core.add(core.admission.admit(message("a", PROMPT)))
    assert core.step() == []
    core.abort("a")
    assert core.idle
    core.scheduler.check_idle()
    store.permits.release(1000)
    assert usage(ask(core, PROMPT)) >= 36


def test_what_many_wait_for_is_read_once(written: Path, recurrent: bool) -> None:
    core, store = engine(written, recurrent=recurrent)
    assert store is not None
    said = ask(core, PROMPT, PROMPT, PROMPT)
    assert set(store.reads.values()) == {1}
    assert len({text_of(said, name) for name in "abc"}) == 1
    assert min(usage(said, name) for name in "abc") >= 36


def test_entries_that_are_gone_when_they_are_read_are_computed(written: Path, recurrent: bool) -> None:
    cold = ask(engine(None, recurrent=recurrent)[0], PROMPT)
    core, _ = engine(written, recurrent=recurrent)
    for entry in sorted(entries(written), key=lambda each: each.path.name)[::3]:
        entry.path.unlink()
    said = ask(core, PROMPT)
    assert text_of(said) == text_of(cold)
    assert usage(said) < 36


def test_what_is_on_its_way_gives_up_the_memory_that_others_need(
    written: Path, recurrent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_tier, "_READERS", 1)  # several may take the permits out of turn
    core, store = engine(written, recurrent=recurrent, blocks=16)
    assert store is not None
    store.permits = threading.Semaphore(8)  # the rest never comes
    core.add(core.admission.admit(message("other", [9] * 30, max_tokens=20, ignore_eos=True)))
    core.step()
    core.add(core.admission.admit(message("a", PROMPT, ignore_eos=True)))
    while not core.scheduler.cache.blocks.free < 3:
        core._arrive()
    said = run(core)
    store.permits.release(1000)
    cold = ask(engine(None, recurrent=recurrent)[0], PROMPT)
    assert text_of(said) == text_of(cold)
    assert text_of(said, "other")


@pytest.mark.parametrize("seed", range(12))
def test_conversations_over_restarts_say_what_they_say_without_a_cache(
    tmp_path: Path, recurrent: bool, seed: int
) -> None:
    random = Random(seed)
    talks = [[random.randrange(5, 60) for _ in range(random.randint(1, 40))] for _ in range(3)]
    core, store = engine(tmp_path, recurrent=recurrent, blocks=random.choice([26, 40, 64]))
    for number in range(12):
        if random.random() < 0.3:
            core.close(10)
            core, store = engine(tmp_path, recurrent=recurrent, blocks=random.choice([26, 40, 64]))
        asked = [random.choice(talks)[: random.randint(1, 80)] for _ in range(random.randint(1, 3))]
        for place, prompt in enumerate(asked):
            core.add(core.admission.admit(message(f"{number}.{place}", prompt, ignore_eos=True)))
        if random.random() < 0.3:
            core.abort(f"{number}.0")
            asked[0] = []
        said = run(core)
        assert not any(isinstance(each, Failed) for each in said)
        while random.random() < 0.9 and core.tidy() is not None:
            pass
        for place, prompt in enumerate(asked):
            if prompt:
                alone = ask(engine(None, recurrent=recurrent)[0], prompt)
                assert text_of(said, f"{number}.{place}") == text_of(alone)
        longer = random.choice(talks)
        longer += [random.randrange(5, 60) for _ in range(random.randint(1, 8))] if len(longer) < 70 else []
    assert store is not None
