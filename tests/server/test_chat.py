"""`POST /v1/chat/completions` over a fake engine: formats, fields, defaults."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from mixbit.engine.protocol import Generate, TokenLogprob, TokenLogprobs
from mixbit.server.presets import SamplingDefaults
from mixbit.server.schema.chat import CreateChatCompletionResponse, CreateChatCompletionStreamResponse
from tests.fakes import FakeEngine, Reply, failure, refusal
from tests.server.support import HELLO, connect, error_of, events, served_model

PATH = "/v1/chat/completions"


async def ask(engine: FakeEngine, **body: Any) -> Any:
    async with connect(engine) as client:
        response = await client.post(PATH, json={"messages": HELLO, **body})
    assert response.status_code == 200, response.text
    return events(response.text) if body.get("stream") else response.json()


async def test_whole_answer_is_what_the_sdk_expects() -> None:
    answer = await ask(FakeEngine(Reply(["Hel", "lo"], prompt_tokens=7, cached_tokens=3)))
    CreateChatCompletionResponse.model_validate(answer, strict=True)
    parsed = ChatCompletion.model_validate(answer, strict=True)
    assert parsed.id.startswith("chatcmpl-")
    assert parsed.model == "org/tiny"
    assert parsed.choices[0].message.content == "Hello"
    assert parsed.choices[0].message.role == "assistant"
    assert parsed.choices[0].finish_reason == "stop"
    assert answer["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 2,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


async def test_stream_has_role_once_one_reason_and_done() -> None:
    *chunks, done = await ask(FakeEngine(Reply(["Hel", "", "lo"])), stream=True)
    assert done == "[DONE]"
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
        CreateChatCompletionStreamResponse.model_validate(chunk, strict=True)
        assert "usage" not in chunk
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert [delta.get("role") for delta in deltas] == ["assistant", None, None, None]
    assert "".join(delta.get("content", "") for delta in deltas) == "Hello"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]


async def test_include_usage_adds_a_last_chunk_and_null_before() -> None:
    reply = Reply(["a"], prompt_tokens=5, cached_tokens=2)
    *chunks, last, done = await ask(FakeEngine(reply), stream=True, stream_options={"include_usage": True})
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 6
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in chunks)


async def test_length_is_told() -> None:
    engine = FakeEngine(Reply(["a", "b", "c"]))
    assert (await ask(engine, max_tokens=2))["choices"][0]["finish_reason"] == "length"
    assert (await ask(engine, max_completion_tokens=1, max_tokens=2))["choices"][0]["message"]["content"] == "a"
    assert (await ask(engine, max_tokens=None))["choices"][0]["finish_reason"] == "stop"


async def test_n_choices_have_their_own_seeds_and_one_prompt_count() -> None:
    engine = FakeEngine(lambda request: Reply([f"<{request.sampling.seed}>"], prompt_tokens=4))
    answer = await ask(engine, n=3, seed=-5)
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert answer["usage"]["prompt_tokens"] == 4
    assert answer["usage"]["completion_tokens"] == 3
    again = await ask(engine, n=3, seed=-5)
    assert [choice["message"]["content"] for choice in again["choices"]] == texts
    assert all(0 <= request.sampling.seed < 2**63 for request in engine.requests if request.sampling.seed is not None)


async def test_streamed_choices_are_complete_each() -> None:
    engine = FakeEngine(lambda request: Reply(list(f"text {request.request_id[-1]}"), delay=0.001))
    chunks = (await ask(engine, n=3, stream=True))[:-1]
    for index in range(3):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant"
        assert "".join(choice["delta"].get("content", "") for choice in mine) == f"text {index}"
        assert [choice["finish_reason"] for choice in mine if choice["finish_reason"]] == ["stop"]


def _token(text: bytes, logprob: float) -> TokenLogprob:
    return TokenLogprob(token_id=1, text=text, logprob=logprob)


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_join_to_the_text(stream: bool) -> None:
    euro = "€".encode()
    tokens = [
        TokenLogprobs(_token(b"x", -0.5), [_token(b"x", -0.5), _token(b"y", -1.0)]),
        TokenLogprobs(_token(euro[:1], -0.1), [_token(euro[:1], -0.1)]),
        TokenLogprobs(_token(euro[1:], float("-inf")), []),
    ]
    engine = FakeEngine(Reply(["x", "", "€"], logprobs=tokens))
    answer = await ask(engine, stream=stream, logprobs=True, top_logprobs=2)
    if stream:
        chunks = [ChatCompletionChunk.model_validate(chunk, strict=True) for chunk in answer[:-1]]
        content = [entry for c in chunks if c.choices[0].logprobs for entry in c.choices[0].logprobs.content or ()]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    else:
        choice = ChatCompletion.model_validate(answer, strict=True).choices[0]
        assert choice.logprobs is not None
        content, text = choice.logprobs.content or [], choice.message.content or ""
    assert b"".join(bytes(entry.bytes or ()) for entry in content).decode() == text == "x€"
    assert [top.token for top in content[0].top_logprobs] == ["x", "y"]
    assert content[2].logprob == -9999.0
    assert engine.requests[0].logprobs == 2


async def test_logprobs_are_off_by_default() -> None:
    engine = FakeEngine()
    assert (await ask(engine))["choices"][0]["logprobs"] is None
    assert engine.requests[0].logprobs is None
    await ask(engine, logprobs=True)
    assert engine.requests[1].logprobs == 0


async def test_values_come_from_request_then_model_then_neutral() -> None:
    engine = FakeEngine()
    defaults = SamplingDefaults(temperature=0.3, top_k=20)
    async with connect(engine, served_model(defaults=defaults)) as client:
        await client.post(PATH, json={"messages": HELLO, "temperature": None, "top_p": 0.5, "top_k": -1})
        await client.post(PATH, json={"messages": HELLO, "temperature": 0})
    first, second = (request.sampling for request in engine.requests)
    assert (first.temperature, first.top_p, first.top_k, first.min_p) == (0.3, 0.5, 0, 0.0)
    assert (second.temperature, second.top_p, second.top_k) == (0.0, 1.0, 20)
    assert engine.requests[0].max_tokens is None


async def test_every_field_reaches_the_engine() -> None:
    engine = FakeEngine()
    await ask(
        engine,
        stop=["a", "b", "a"],
        seed=7,
        temperature=0.1,
        top_p=0.2,
        top_k=3,
        min_p=0.4,
        repetition_penalty=1.5,
        presence_penalty=0.6,
        frequency_penalty=-0.7,
        logit_bias={"42": -100, "7": 1.5},
        ignore_eos=True,
        max_completion_tokens=9,
        user="someone",
        an_unknown_field={"x": 1},
    )
    request = engine.requests[0]
    assert request.stop == ["a", "b"]
    assert request.max_tokens == 9
    assert request.ignore_eos
    assert not request.add_special_tokens
    sampling = request.sampling
    assert (sampling.seed, sampling.temperature, sampling.top_p, sampling.top_k) == (7, 0.1, 0.2, 3)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.4, 1.5)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.6, -0.7)
    assert sampling.logit_bias == {42: -100.0, 7: 1.5}


async def test_null_means_default_for_every_optional_field() -> None:
    names = [
        "model",
        "stream",
        "stream_options",
        "n",
        "stop",
        "seed",
        "temperature",
        "top_p",
        "max_tokens",
        "max_completion_tokens",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "user",
        "top_k",
        "min_p",
        "repetition_penalty",
        "ignore_eos",
        "logprobs",
        "top_logprobs",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "response_format",
        "reasoning_effort",
        "chat_template_kwargs",
        "functions",
        "modalities",
    ]
    engine = FakeEngine()
    plain = await ask(engine)
    nulls = await ask(engine, **dict.fromkeys(names))
    assert nulls["choices"] == plain["choices"]
    first, second = (_without_id(request) for request in engine.requests)
    assert first == second


def _without_id(request: Generate) -> tuple[Any, ...]:
    return tuple(getattr(request, name) for name in request.__struct_fields__ if name != "request_id")


@pytest.mark.parametrize("name", ["org/tiny", "tiny", None])
async def test_served_name_and_alias_are_accepted(name: str | None) -> None:
    assert (await ask(FakeEngine(), model=name))["model"] == "org/tiny"


async def test_other_models_are_not_found() -> None:
    engine = FakeEngine()
    async with connect(engine) as client:
        response = await client.post(PATH, json={"messages": HELLO, "model": "../../etc"})
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "org/tiny" in error["message"]
    assert not engine.requests


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}] * 2}, "tools[1].function.name"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f"}}],
                "tool_choice": {"type": "function", "function": {"name": "g"}},
            },
            "tool_choice",
        ),
        ({"grammar": "start: x", "response_format": {"type": "json_object"}}, "grammar"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": "auto"}, "function_call"),
        ({"audio": {}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities[1]"),
        ({"grammar": {"syntax": "gbnf", "definition": "root ::= x"}}, "grammar.syntax"),
        ({"guided_json": {}}, "guided_json"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
async def test_what_cannot_be_honoured_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    engine = FakeEngine()
    async with connect(engine) as client:
        response = await client.post(PATH, json={"messages": HELLO, **body})
    assert response.status_code == 400
    assert error_of(response)["param"] == param
    assert not engine.requests


async def test_what_asks_for_the_default_is_accepted() -> None:
    await ask(FakeEngine(), response_format={"type": "text"}, tool_choice="auto", modalities=["text"], tools=[])


@pytest.mark.parametrize("stream", [False, True])
async def test_overflow_is_a_real_400(stream: bool) -> None:
    engine = FakeEngine(refusal("context_length_exceeded", "too long", "prompt"))
    async with connect(engine) as client:
        response = await client.post(PATH, json={"messages": HELLO, "stream": stream})
    assert response.status_code == 400
    error = error_of(response)
    assert (error["code"], error["param"], error["message"]) == ("context_length_exceeded", "messages", "too long")


async def test_full_queue_is_429_and_releases_the_other_choices() -> None:
    engine = FakeEngine(
        lambda request: refusal("queue_full") if request.request_id.endswith("-1") else Reply(hang=True)
    )
    async with connect(engine) as client:
        response = await client.post(PATH, json={"messages": HELLO, "n": 3})
    assert (response.status_code, error_of(response)["type"]) == (429, "rate_limit_error")
    assert response.headers["retry-after"] == "1"
    assert not engine.running


async def test_failure_without_a_stream_is_an_error_answer() -> None:
    async with connect(FakeEngine(failure("internal_error", "broken"))) as client:
        response = await client.post(PATH, json={"messages": HELLO})
    assert (response.status_code, error_of(response)["message"]) == (500, "broken")


async def test_failure_within_a_stream_is_an_error_event_then_done() -> None:
    *_, text, error, done = await ask(FakeEngine(failure("worker_died", "gone")), stream=True)
    assert text["choices"][0]["delta"] == {"content": "Hel"}
    assert list(error) == ["error"]
    assert error["error"] == {"message": "gone", "type": "service_unavailable", "param": None, "code": "worker_died"}
    assert done == "[DONE]"
