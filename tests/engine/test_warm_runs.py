"""Logits of a run that begins in the cache, against those of a run from the start, on real executors."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from mixbit.engine.loader import load
from mixbit.engine.request import Request, prompt_stops
from mixbit.engine.runner import Runner
from mixbit.engine.scheduler import Scheduler
from mixbit.kernels.executor import CacheConfig, ExecutorOptions
from mixbit.kernels.ops import Program
from mixbit.kernels.registry import choose
from tests.checkpoints import VOCAB_SIZE, write_checkpoint

END = 5
STEP_TOKENS = 32


@pytest.fixture(scope="module", params=["llama", "qwen3_next"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Program:
    directory = tmp_path_factory.mktemp("models") / request.param
    write_checkpoint(directory, request.param)
    return load(directory).program


class Engine:
    """Scheduler and executor; picks the most likely token and records the logits."""

    def __init__(self, backend: str, program: Program, blocks: int = 64) -> None:
        cache = CacheConfig(blocks=blocks, block_size=16, state_slots=2 + 16)
        options = ExecutorOptions(max_tokens=STEP_TOKENS, threads=1)
        self.runner = Runner(choose(backend).backend.compile(program, cache, options))
        self.scheduler = Scheduler(
            blocks=blocks,
            block_size=16,
            max_running=2,
            step_tokens=STEP_TOKENS,
            spare_states=16 if program.gated_deltas else None,
        )

    def run(self, *requests: Request) -> dict[Request, list[npt.NDArray[np.float32]]]:
        """The logits of every sampled token."""
        logits: dict[Request, list[npt.NDArray[np.float32]]] = {each: [] for each in requests}
        for each in requests:
            self.scheduler.add(each)
        while not self.scheduler.idle:
            chunks = self.scheduler.plan()
            rows = iter(self.runner.run(chunks, self.scheduler.moves))
            for chunk in chunks:
                samples = chunk.samples
                self.scheduler.advance(chunk)
                if samples:
                    row = next(rows).copy()
                    logits[chunk.request].append(row)
                    if self.scheduler.append(chunk.request, int(row.argmax())):
                        self.scheduler.finish(chunk.request)
        self.scheduler.check_idle()
        return logits


def request(tokens: list[int], output: int = 4) -> Request:
    return Request(
        "r", list(tokens), prompt_tokens=len(tokens), max_length=len(tokens) + output, stops=prompt_stops(tokens, {END})
    )


def text(seed: int, count: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(6, VOCAB_SIZE, count)]


@pytest.mark.parametrize("backend", ["reference", "cpu", "mlx-cpu"])
def test_a_warm_run_has_the_logits_of_a_cold_one(program: Program, backend: str) -> None:
    """The same prompt, the next turn, another question, and a prompt that parts within a block."""
    engine = Engine(backend, program)
    system, question = [*text(1, 70), END], [*text(2, 40), END, 9]
    first = request([*system, *question])
    engine.run(first)
    prompts = {
        "same": [*system, *question],
        "next turn": [*first.tokens, END, *text(3, 20)],
        "other question": [*system, *text(4, 30)],
        "within a block": [*system, *question[:37], *text(5, 7)],
    }
    for name, tokens in prompts.items():
        warm, cold = request(tokens), request(tokens)
        ours = engine.run(warm)[warm]
        theirs = Engine(backend, program).run(cold)[cold]
        assert warm.cached_tokens > 60, name
        assert cold.cached_tokens == 0
        assert warm.tokens == cold.tokens, name
        scale = np.abs(theirs).max()
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-4 * scale, err_msg=name)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_prompts_that_arrive_together_have_the_logits_of_those_that_come_alone(program: Program, backend: str) -> None:
    system = [*text(8, 94), END, 9]  # ends with a block
    prompts = [[*system, *text(seed, 20)] for seed in (21, 22)]
    together = [request(tokens) for tokens in prompts]
    ours = Engine(backend, program).run(*together)
    assert [each.cached_tokens > 60 for each in together] == [False, True]
    for each, tokens in zip(together, prompts, strict=True):
        alone = request(tokens)
        theirs = Engine(backend, program).run(alone)[alone]
        assert each.tokens == alone.tokens
        for one, other in zip(ours[each], theirs, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_exactly_the_same_where_the_chunks_are_the_same(program: Program, backend: str) -> None:
    """The prefix ends where a chunk of the cold run ended: nothing is computed in another way."""
    tokens = text(7, 90)
    engine = Engine(backend, program)
    before, warm, cold = request([*tokens[:64], 7]), request(tokens), request(tokens)
    for each in (before, warm, cold):
        each.stops = (64,)
    engine.run(before)
    ours, theirs = engine.run(warm)[warm], Engine(backend, program).run(cold)[cold]
    assert (cold.cached_tokens, warm.cached_tokens) == (0, 64)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("backend", ["cpu"])
def test_preempted_requests_go_on_as_if_nothing_had_happened(program: Program, backend: str) -> None:
    tight, wide = Engine(backend, program, blocks=9), Engine(backend, program)
    pair = [request(text(seed, 50), 40) for seed in (11, 12)]
    again = [request(text(seed, 50), 40) for seed in (11, 12)]
    tight.run(*pair)
    wide.run(*again)
    assert tight.scheduler.preemptions > 0
    assert wide.scheduler.preemptions == 0
    assert [each.tokens for each in pair] == [each.tokens for each in again]
