"""The engine over a scripted model: a step gives each request the next token of its script."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixbit.engine.admission import Admission, Limits, RefusedError
from mixbit.engine.core import EngineCore
from mixbit.engine.protocol import Delta, Failed, Finished, FromWorker, Generate, Sampling
from mixbit.engine.request import Chunk, Move
from mixbit.engine.scheduler import Scheduler
from tests.engine.tokenizers_for_tests import EOS, byte_level

TOKENIZER = byte_level()
GREEDY = Sampling(temperature=0)


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def likely(token: int) -> npt.NDArray[np.float32]:
    """A row by which a prompt token, and the one after it, have log-probabilities that only they have."""
    row = np.zeros(TOKENIZER.vocab_size, np.float32)
    row[token] = 1 + token / 100
    return row


@dataclass
class ScriptedModel:
    """Continues any prompt with its script, from where the request stands. `fault` may raise or spoil a row."""

    script: list[int]
    fault: Callable[[Sequence[Chunk]], None] = lambda chunks: None
    spoiled: set[str] = field(default_factory=set)
    steps: int = 0

    def step(self, chunks: Sequence[Chunk], moves: list[Move]) -> npt.NDArray[np.float32]:
        self.steps += 1
        moves.clear()
        self.fault(chunks)
        rows = []
        for chunk in chunks:
            rows += [likely(chunk.request.tokens[place + 1]) for place in chunk.rows[: len(chunk.rows) - chunk.samples]]
            if chunk.samples:
                row = np.zeros(TOKENIZER.vocab_size, np.float32)
                row[self.script[chunk.request.output_tokens % len(self.script)]] = 10
                if chunk.request.request_id in self.spoiled:
                    row[5] = np.nan
                rows.append(row)
        return np.array(rows, np.float32).reshape(-1, TOKENIZER.vocab_size)


def engine(model: ScriptedModel, *, blocks: int = 64, max_running: int = 4, max_requests: int = 16) -> EngineCore:
    scheduler = Scheduler(blocks=blocks, block_size=4, max_running=max_running, step_tokens=16)
    limits = Limits(
        context_length=100,
        cache_capacity=scheduler.capacity,
        vocab_size=TOKENIZER.vocab_size,
        max_requests=max_requests,
    )
    return EngineCore(model.step, scheduler, Admission(TOKENIZER, limits))


def message(request_id: str = "a", prompt: str | list[int] = "the cat", **fields: object) -> Generate:
    values = {"add_special_tokens": False, "sampling": GREEDY, "max_tokens": 10, **fields}
    return Generate(request_id=request_id, prompt=prompt, **values)  # type: ignore[arg-type]


def run(core: EngineCore, *messages: Generate) -> list[FromWorker]:
    for each in messages:
        core.add(core.admission.admit(each))
    said: list[FromWorker] = []
    while not core.idle:
        said += core.step()
    core.scheduler.check_idle()
    return said


def text_of(said: list[FromWorker], request_id: str = "a") -> str:
    return "".join(each.text for each in said if isinstance(each, Delta) and each.request_id == request_id)


def ending(said: list[FromWorker], request_id: str = "a") -> Finished | Failed:
    (found,) = [each for each in said if isinstance(each, Finished | Failed) and each.request_id == request_id]
    return found


def finish(said: list[FromWorker], request_id: str = "a") -> Finished:
    found = ending(said, request_id)
    assert isinstance(found, Finished)
    return found


def test_the_end_token_stops_and_is_counted_but_not_shown() -> None:
    script = [*encode("hat"), EOS]
    said = run(engine(ScriptedModel(script)), message())
    assert text_of(said) == "hat"
    finished = finish(said)
    assert (finished.reason, finished.stop) == ("stop", None)
    assert finished.usage.completion_tokens == len(script)
    assert finished.usage.prompt_tokens == len(encode("the cat"))
    assert said[-1] is finished


LETTERS = [*encode("h"), *encode("a"), *encode("t")]


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("length", [1, 2, 15, 40, 90])
def test_the_probabilities_of_a_prompt_come_first_however_it_is_cut_and_cached(length: int, times: int) -> None:
    prompt = [token % TOKENIZER.vocab_size for token in range(5, 5 + length)]
    core = engine(ScriptedModel(LETTERS))
    run(core, message("earlier", prompt, max_tokens=2))
    names = [f"r{number}" for number in range(times)]
    said = run(
        core,
        message("free"),
        *(message(each, prompt, logprobs=2, prompt_logprobs=True, max_tokens=3) for each in names),
    )
    for name in names:
        deltas = [each for each in said if isinstance(each, Delta) and each.request_id == name]
        entries = [entry for delta in deltas for entry in delta.logprobs]
        scored = entries[:length]
        assert [entry.chosen.token_id for entry in scored] == prompt
        assert scored[0].chosen.logprob == 0
        for entry in scored[1:]:
            row = likely(entry.chosen.token_id).astype(np.float64)
            expected = row[entry.chosen.token_id] - np.log(np.exp(row).sum())
            assert entry.chosen.logprob == pytest.approx(expected, abs=1e-5)
            assert entry.top[0] == entry.chosen
            assert len(entry.top) == 2
        assert text_of(said, name) == "hat"
        assert len(entries) == length + 3
        assert [delta.token_count for delta in deltas if not delta.text] == [0] * (len(deltas) - 3)
        assert finish(said, name).usage.cached_tokens == 0
    assert text_of(said, "free") == "hathathath"


def test_a_scored_prompt_that_must_begin_again_tells_nothing_twice() -> None:
    prompt = list(range(5, 45))
    core = engine(ScriptedModel(LETTERS))
    core.add(core.admission.admit(message("a", prompt, logprobs=0, prompt_logprobs=True, max_tokens=3)))
    said = core.step()
    core.scheduler.isolate([])
    while not core.idle:
        said += core.step()
    entries = [entry for each in said if isinstance(each, Delta) for entry in each.logprobs]
    assert [entry.chosen.token_id for entry in entries] == [*prompt, *LETTERS]


def test_ignore_eos_goes_on_to_the_limit() -> None:
    said = run(engine(ScriptedModel([*encode("a"), EOS])), message(ignore_eos=True, max_tokens=6))
    assert text_of(said) == "aaa"
    assert (finish(said).reason, finish(said).usage.completion_tokens) == ("length", 6)


def test_a_stop_string_ends_the_request_and_is_named() -> None:
    said = run(engine(ScriptedModel(encode("one two"))), message(stop=["e t", "zzz"]))
    assert text_of(said) == "on"
    finished = finish(said)
    assert (finished.reason, finished.stop) == ("stop", "e t")
    assert finished.usage.completion_tokens == len(encode("one t"))


def test_without_a_limit_a_request_runs_to_the_end_of_the_context() -> None:
    said = run(engine(ScriptedModel(encode("a"))), message(max_tokens=None))
    usage = finish(said).usage
    assert usage.prompt_tokens + usage.completion_tokens == 100
    assert finish(said).reason == "length"


def test_an_unfinished_character_at_the_limit_becomes_a_replacement() -> None:
    said = run(engine(ScriptedModel([encode("☃")[0]])), message(max_tokens=1))
    assert text_of(said) == "\N{REPLACEMENT CHARACTER}"


def test_logprobs_are_sent_when_asked_for() -> None:
    said = run(engine(ScriptedModel(encode("hat"))), message(logprobs=2, max_tokens=4))
    entries = [entry for each in said if isinstance(each, Delta) for entry in each.logprobs]
    assert b"".join(entry.chosen.text for entry in entries).decode() == text_of(said)
    assert all(len(entry.top) == 2 and entry.top[0] == entry.chosen for entry in entries)


@pytest.mark.parametrize(
    ("fields", "code", "param", "words"),
    [
        ({"prompt": []}, "invalid_value", "prompt", "no tokens"),
        ({"prompt": [0, 100_000]}, "invalid_value", "prompt", "token 100000"),
        ({"prompt": [-1]}, "invalid_value", "prompt", "token -1"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens", "at least 1"),
        ({"stop": ["a", ""]}, "invalid_value", "stop", "empty string"),
        ({"logprobs": -1}, "invalid_value", "logprobs", "at least 0"),
        ({"sampling": Sampling(logit_bias={400_000: 1.0})}, "invalid_value", "logit_bias", "token 400000"),
        ({"sampling": Sampling(logit_bias={1: float("nan")})}, "invalid_value", "logit_bias", "finite"),
        ({"sampling": Sampling(temperature=-1)}, "invalid_value", "temperature", "-1"),
        ({"sampling": Sampling(temperature=float("nan"))}, "invalid_value", "temperature", "nan"),
        ({"sampling": Sampling(top_p=1.5)}, "invalid_value", "top_p", "1.5"),
        ({"sampling": Sampling(min_p=-0.5)}, "invalid_value", "min_p", "-0.5"),
        ({"sampling": Sampling(top_k=-1)}, "invalid_value", "top_k", "-1"),
        ({"sampling": Sampling(repetition_penalty=0)}, "invalid_value", "repetition_penalty", "0"),
        ({"sampling": Sampling(presence_penalty=float("inf"))}, "invalid_value", "presence_penalty", "inf"),
        ({"prompt": [5] * 100}, "context_length_exceeded", "prompt", "maximum context length is 100 tokens"),
        ({"prompt": [5] * 100}, "context_length_exceeded", "prompt", "exceeds the available context size"),
    ],
)
def test_refusals_name_the_field(fields: dict[str, object], code: str, param: str, words: str) -> None:
    core = engine(ScriptedModel([5]))
    with pytest.raises(RefusedError, match=words) as raised:
        core.admission.admit(message(**fields))  # type: ignore[arg-type]
    assert (raised.value.code, raised.value.param) == (code, param)
    run(core, message())  # a refused request leaves no trace: its id is free again


def test_a_prompt_that_the_cache_cannot_hold_is_refused_and_a_shorter_one_ends_where_memory_does() -> None:
    core = engine(ScriptedModel(encode("a")), blocks=5)  # 20 tokens
    with pytest.raises(RefusedError) as raised:
        core.admission.admit(message(prompt=[5] * 20))
    assert raised.value.code == "insufficient_memory"
    usage = finish(run(core, message(prompt=[5] * 15, max_tokens=None))).usage
    assert usage.completion_tokens == 5


def test_a_full_queue_refuses_and_an_ended_request_makes_room() -> None:
    core = engine(ScriptedModel(encode("a")), max_requests=2)
    core.add(core.admission.admit(message("a")))
    core.add(core.admission.admit(message("b")))
    with pytest.raises(RefusedError) as raised:
        core.admission.admit(message("c"))
    assert raised.value.code == "queue_full"
    core.abort("a")
    core.add(core.admission.admit(message("c")))
    assert {each.request_id for each in run(core) if isinstance(each, Finished)} == {"b", "c"}


def test_an_id_that_is_running_is_refused() -> None:
    core = engine(ScriptedModel(encode("a")))
    core.add(core.admission.admit(message("a")))
    with pytest.raises(RefusedError, match="already running"):
        core.admission.admit(message("a"))


def test_an_aborted_request_says_nothing_more_and_frees_what_it_held() -> None:
    core = engine(ScriptedModel(encode("a")), max_running=1)
    for request_id in ("a", "b"):
        core.add(core.admission.admit(message(request_id)))
    core.step()
    core.abort("a")
    core.abort("unknown")
    said = run(core)
    assert {each.request_id for each in said if isinstance(each, Delta | Finished)} == {"b"}


def test_logits_that_are_not_finite_end_that_request_alone() -> None:
    core = engine(ScriptedModel(encode("hat"), spoiled={"b"}))
    said = run(core, message("a"), message("b"), message("c"))
    failed = ending(said, "b")
    assert isinstance(failed, Failed)
    assert failed.code == "internal_error"
    assert "nan" in failed.message
    assert text_of(said, "a") == text_of(said, "c") != ""


def raise_for(request_id: str, after: int) -> Callable[[Sequence[Chunk]], None]:
    def fault(chunks: Sequence[Chunk]) -> None:
        if any(each.request.request_id == request_id and each.start + each.count > after for each in chunks):
            raise RuntimeError("a fault in the step")

    return fault


@pytest.mark.parametrize("after", [0, 3, 12])
def test_a_request_whose_step_raises_fails_alone_and_the_others_lose_nothing(after: int) -> None:
    messages = [message(name, max_tokens=12) for name in "abc"]
    undisturbed = run(engine(ScriptedModel(encode("the hat and the cat"))), *messages)
    core = engine(ScriptedModel(encode("the hat and the cat"), fault=raise_for("b", after)))
    said = run(core, *messages)
    failed = ending(said, "b")
    assert isinstance(failed, Failed)
    assert "a fault in the step" in failed.message
    for name in "ac":
        assert text_of(said, name) == text_of(undisturbed, name)
        assert finish(said, name) == finish(undisturbed, name)


def test_steps_that_keep_failing_end_the_worker() -> None:
    def fault(chunks: Sequence[Chunk]) -> None:
        raise RuntimeError("the device is lost")

    core = engine(ScriptedModel([5], fault=fault))
    with pytest.raises(RuntimeError, match="the device is lost"):
        run(core, *[message(name) for name in "abc"])


def test_a_few_bad_requests_do_not_end_the_worker_while_others_work() -> None:
    core = engine(ScriptedModel(encode("a"), fault=raise_for("bad", 0)))
    for _ in range(6):
        assert isinstance(ending(run(core, message("bad")), "bad"), Failed)
        assert finish(run(core, message("good")), "good").usage.completion_tokens == 10


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 40)), min_size=1, max_size=8),
    st.integers(18, 40),
    st.integers(0, 60),
)
def test_text_does_not_depend_on_company_memory_or_faults(
    shapes: list[tuple[int, int]], blocks: int, failing_step: int
) -> None:
    script = encode("the cat and the hat, größer ☃ and more of it")
    messages = [
        message(str(number), prompt=[5] * prompt, max_tokens=output) for number, (prompt, output) in enumerate(shapes)
    ]
    model = ScriptedModel(script)

    def fault(chunks: Sequence[Chunk]) -> None:
        if model.steps == failing_step and len(chunks) > 1:
            raise MemoryError("once")

    model.fault = fault
    said = run(engine(model, blocks=blocks, max_running=3), *messages)
    for each in messages:
        alone = run(engine(ScriptedModel(script)), each)
        assert text_of(said, each.request_id) == text_of(alone, each.request_id)
        together, by_itself = finish(said, each.request_id), finish(alone, each.request_id)
        assert (together.reason, together.stop) == (by_itself.reason, by_itself.stop)
        assert together.usage.completion_tokens == by_itself.usage.completion_tokens
        assert by_itself.usage.cached_tokens == 0
        assert together.usage.cached_tokens < together.usage.prompt_tokens
