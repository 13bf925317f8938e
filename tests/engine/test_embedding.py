"""Embeddings: the mean of a text's hidden states, scaled to length 1, whatever else the engine does meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixbit.engine.admission import Admission, Limits, RefusedError
from mixbit.engine.core import EngineCore
from mixbit.engine.loader import load
from mixbit.engine.protocol import Embed, Failed, Finished
from mixbit.engine.request import Chunk, Move
from mixbit.engine.scheduler import Scheduler
from mixbit.kernels.registry import choose
from tests.checkpoints import write_checkpoint
from tests.engine.cores import exact_core, greedy, run
from tests.engine.tokenizers_for_tests import byte_level
from tests.sequence import Sequence as OneSequence

FloatArray = npt.NDArray[np.float32]
TOKENIZER = byte_level()
DIM = 8


def embed(request_id: str, prompt: list[int] | str) -> Embed:
    return Embed(request_id=request_id, prompt=prompt, add_special_tokens=False)


def vector(end: Finished | Failed) -> FloatArray:
    assert isinstance(end, Finished), end
    assert end.embedding is not None
    return np.frombuffer(end.embedding, "<f4")


def mean(states: npt.ArrayLike) -> FloatArray:
    total = np.sum(np.asarray(states, np.float64), axis=0)
    return np.asarray(total / np.linalg.norm(total), np.float32)


def text(seed: int, count: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(6, 250, count)]


@pytest.fixture(scope="module", params=["llama-cpu", "qwen3_next-cpu", "qwen3_next-reference", "qwen3_moe-mlx-cpu"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[EngineCore, OneSequence]:
    """An engine with small steps, and its model for one sequence."""
    model_type, device = request.param.split("-", 1)
    directory = write_checkpoint(tmp_path_factory.mktemp("models") / model_type, model_type)
    core = exact_core(directory, device, step_tokens=24, max_running=4)
    return core, OneSequence(choose(device).backend, load(directory).program, 128)


def test_the_embedding_is_the_mean_of_the_hidden_states_alone_and_among_others(
    model: tuple[EngineCore, OneSequence],
) -> None:
    core, sequence = model
    texts = {"short": text(1, 1), "chunk": text(2, 24), "long": text(3, 101), "again": text(3, 101)}
    expected = {}
    for name, tokens in texts.items():
        sequence.reset()
        expected[name] = mean(sequence.hidden_states(tokens))
    written = run(core, greedy("free", text(3, 101), 12)).tokens("free")  # and its prompt is in the cache
    cached = core.scheduler.blocks_cached
    for name, tokens in texts.items():
        np.testing.assert_allclose(vector(run(core, embed(name, tokens)).ends[name]), expected[name], atol=2e-5)
    assert core.scheduler.blocks_cached == cached, "an embedded text was kept"
    said = run(core, greedy("free", text(3, 101), 12), *(embed(*each) for each in texts.items()))
    assert said.tokens("free") == written
    for name, tokens in texts.items():
        end = said.ends[name]
        np.testing.assert_allclose(vector(end), expected[name], atol=2e-5)
        assert np.linalg.norm(vector(end)) == pytest.approx(1.0, abs=1e-6)
        assert isinstance(end, Finished)
        usage = end.usage
        assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (len(tokens), 0, 0)


def test_an_aborted_text_frees_what_it_held(model: tuple[EngineCore, OneSequence]) -> None:
    core, _ = model
    core.add(core.admission.admit(embed("a", text(4, 100))))
    core.step()
    assert core.scheduler.blocks_used > 0
    core.abort("a")
    assert core.idle
    assert core.scheduler.blocks_used == 0
    core.scheduler.check_idle()


# --- over a scripted model, whose hidden states are known ---


def state(tokens: Sequence[int], place: int) -> FloatArray:
    """Of the token at a place: made from it, and from where it stands."""
    return np.random.default_rng([tokens[place], place]).standard_normal(DIM).astype(np.float32)


@dataclass
class ScriptedModel:
    """`fault` may raise; states of requests called "bad" are not finite."""

    fault: Callable[[int, Sequence[Chunk]], None] = lambda step, chunks: None
    steps: int = 0

    def step(self, chunks: Sequence[Chunk], moves: list[Move]) -> list[FloatArray]:
        self.steps += 1
        moves.clear()
        self.fault(self.steps, chunks)
        rows = []
        for chunk in chunks:
            for place in chunk.rows:
                if chunk.request.embeds:
                    bad = np.float32(np.nan if chunk.request.request_id == "bad" else 1)
                    rows.append(state(chunk.request.tokens, place) * bad)
                else:
                    rows.append(np.zeros(TOKENIZER.vocab_size, np.float32))
        return rows


def engine(model: ScriptedModel, *, blocks: int = 64, max_running: int = 4, size: int | None = DIM) -> EngineCore:
    scheduler = Scheduler(blocks=blocks, block_size=4, max_running=max_running, step_tokens=16)
    limits = Limits(100, scheduler.capacity, TOKENIZER.vocab_size, 16, size)
    return EngineCore(model.step, scheduler, Admission(TOKENIZER, limits))


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=8),
    st.integers(18, 40),
    st.integers(0, 30),
)
def test_embeddings_do_not_depend_on_company_memory_or_faults(
    shapes: list[tuple[bool, int, int]], blocks: int, failing_step: int
) -> None:
    prompts = {str(number): text(number, prompt) for number, (_, prompt, _) in enumerate(shapes)}
    messages = [
        embed(name, prompts[name]) if embeds else greedy(name, prompts[name], output)
        for name, (embeds, _, output) in zip(prompts, shapes, strict=True)
    ]

    def fault(step: int, chunks: Sequence[Chunk]) -> None:
        if step == failing_step and len(chunks) > 1:
            raise MemoryError("once")

    said = run(engine(ScriptedModel(fault), blocks=blocks, max_running=3), *messages)
    for message in messages:
        name = message.request_id
        if isinstance(message, Embed):
            states = [state(prompts[name], place) for place in range(len(prompts[name]))]
            np.testing.assert_allclose(vector(said.ends[name]), mean(states), atol=1e-6)
        else:
            assert len(said.tokens(name)) == message.max_tokens


def test_a_text_that_must_begin_again_is_not_counted_twice() -> None:
    core = engine(ScriptedModel())
    prompt = text(1, 40)
    core.add(core.admission.admit(embed("a", prompt)))
    core.step()
    core.scheduler.isolate([])
    said = run(core)
    np.testing.assert_allclose(vector(said.ends["a"]), mean([state(prompt, place) for place in range(40)]), atol=1e-6)


def test_states_that_are_not_finite_end_that_request_alone() -> None:
    said = run(engine(ScriptedModel()), embed("bad", text(1, 20)), embed("good", text(2, 20)))
    failed = said.ends["bad"]
    assert isinstance(failed, Failed)
    assert "not finite" in failed.message
    assert vector(said.ends["good"]).shape == (DIM,)


@pytest.mark.parametrize(
    ("prompt", "size", "code", "param"),
    [
        ("", DIM, "invalid_value", "prompt"),
        ([1] * 100, DIM, "context_length_exceeded", "prompt"),
        ([1, 1 << 20], DIM, "invalid_value", "prompt"),
        ([1, -1], DIM, "invalid_value", "prompt"),
        ("the cat", None, "invalid_value", "model"),
    ],
)
def test_refusals_name_the_field(prompt: str | list[int], size: int | None, code: str, param: str) -> None:
    core = engine(ScriptedModel(), size=size)
    with pytest.raises(RefusedError) as refused:
        core.admission.admit(embed("a", prompt))
    assert (refused.value.code, refused.value.param) == (code, param)
    assert core.idle
