"""`POST /v1/completions` over a fake engine."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from openai.types import Completion

from mixbit.engine.protocol import Generate, TokenLogprob, TokenLogprobs
from mixbit.server.presets import FillInMiddle
from mixbit.server.schema.completions import CreateCompletionResponse
from tests.fakes import FakeEngine, Reply, failure
from tests.server.support import connect, error_of, events, served_model

PATH = "/v1/completions"
NAMES = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


async def ask(engine: FakeEngine, **body: Any) -> Any:
    async with connect(engine) as client:
        response = await client.post(PATH, json=body)
    assert response.status_code == 200, response.text
    return events(response.text) if body.get("stream") else response.json()


def _echoing(request: Generate) -> Reply:
    prompt = request.prompt if isinstance(request.prompt, str) else "".join(map(chr, request.prompt))
    return Reply([f"[{prompt}]"])


async def test_whole_answer_is_what_the_sdk_expects() -> None:
    engine = FakeEngine(Reply(["Hel", "lo"]))
    parsed = Completion.model_validate(await ask(engine, prompt="abc"), strict=True)
    assert parsed.id.startswith("cmpl-")
    assert parsed.object == "text_completion"
    assert parsed.choices[0].text == "Hello"
    assert parsed.usage is not None
    assert (parsed.usage.prompt_tokens, parsed.usage.completion_tokens) == (3, 2)
    assert engine.requests[0].add_special_tokens
    assert engine.requests[0].max_tokens == 16


async def test_stream_joins_to_the_whole() -> None:
    *chunks, usage, done = await ask(
        FakeEngine(Reply(["Hel", "lo"])), prompt="abc", stream=True, stream_options={"include_usage": True}
    )
    assert done == "[DONE]"
    for chunk in (*chunks, usage):
        CreateCompletionResponse.model_validate(chunk, strict=True)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "Hello"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "stop"]
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == 5


@pytest.mark.parametrize("prompt", [["ab", "c"], [[97, 98], [99]]])
async def test_a_list_of_prompts_gives_choices_in_order(prompt: Any) -> None:
    answer = await ask(FakeEngine(_echoing), prompt=prompt, n=2)
    assert [choice["text"] for choice in answer["choices"]] == ["[ab]", "[ab]", "[c]", "[c]"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == 3
    assert answer["usage"]["completion_tokens"] == 4


async def test_tokens_are_one_prompt() -> None:
    engine = FakeEngine(_echoing)
    assert (await ask(engine, prompt=[97, 98]))["choices"][0]["text"] == "[ab]"
    assert engine.requests[0].prompt == [97, 98]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["ab", [97, 98]])
async def test_echo_begins_with_the_prompt(prompt: Any, stream: bool) -> None:
    answer = await ask(FakeEngine(Reply(["c", "d"])), prompt=prompt, echo=True, stream=stream)
    if stream:
        assert "".join(chunk["choices"][0]["text"] for chunk in answer[:-1]) == "abcd"
    else:
        assert answer["choices"][0]["text"] == "abcd"


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_are_parallel_lists(stream: bool) -> None:
    def token(text: str, value: float) -> TokenLogprob:
        return TokenLogprob(token_id=1, text=text.encode(), logprob=value)

    tokens = [
        TokenLogprobs(token("ab", -0.5), [token("ab", -0.5), token("x", -1.0)]),
        TokenLogprobs(token("c", -2.0), [token("y", -0.2)]),
    ]
    answer = await ask(FakeEngine(Reply(["ab", "c"], logprobs=tokens)), prompt="p", logprobs=1, stream=stream)
    parts = [chunk["choices"][0]["logprobs"] for chunk in answer[:-1]] if stream else [answer["choices"][0]["logprobs"]]
    joined = {
        name: [v for part in parts if part for v in part[name]] for name in ("tokens", "text_offset", "top_logprobs")
    }
    assert joined["tokens"] == ["ab", "c"]
    assert joined["text_offset"] == [0, 2]
    assert joined["top_logprobs"] == [{"ab": -0.5, "x": -1.0}, {"y": -0.2, "c": -2.0}]


@pytest.mark.parametrize("pieces", [[2, 1, 1], [4], [1, 3], [3, 1]])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_echoed_prompt_has_logprobs_too(stream: bool, bos: bool, pieces: list[int]) -> None:
    """pieces: how many entries come at once, of the prompt "ab", "c" and the answer "d", "e"."""

    def token(text: str, value: float) -> TokenLogprobs:
        own = TokenLogprob(token_id=1, text=text.encode(), logprob=value)
        return TokenLogprobs(own, [own, TokenLogprob(token_id=2, text=b"x", logprob=-9.0)])

    entries = [token("ab", 0.0 if not bos else -0.1), token("c", -0.2), token("d", -0.3), token("e", -0.4)]
    entries = [token("<s>", 0.0), *entries] if bos else entries
    sizes = [pieces[0] + bos, *pieces[1:]]
    ends = list(itertools.accumulate(sizes))
    groups = [entries[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    written = ["".join(each.chosen.text.decode() for each in group if each in entries[-2:]) for group in groups]
    reply = Reply(written, logprobs=groups, prompt_tokens=2 + bos)
    engine = FakeEngine(reply)
    answer = await ask(engine, prompt="abc", echo=True, logprobs=1, stream=stream)
    assert engine.requests[0].prompt_logprobs
    chunks = answer[:-1] if stream else [answer]
    for chunk in chunks:
        CreateCompletionResponse.model_validate(chunk, strict=True)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == "abcde"
    joined = {name: [v for choice in choices if choice["logprobs"] for v in choice["logprobs"][name]] for name in NAMES}
    assert joined["tokens"] == ["ab", "c", "d", "e"]
    assert joined["token_logprobs"] == [-0.1 if bos else None, -0.2, -0.3, -0.4]
    assert joined["text_offset"] == [0, 2, 3, 4]
    assert (joined["top_logprobs"][0] is None) is not bos
    assert joined["top_logprobs"][1] == {"c": -0.2, "x": -9.0}


async def test_suffix_is_filled_in_with_the_models_tokens() -> None:
    engine = FakeEngine()
    fim = FillInMiddle(prefix="<P>", suffix="<S>", middle="<M>")
    async with connect(engine, served_model(fim=fim)) as client:
        response = await client.post(PATH, json={"prompt": "def f(", "suffix": "): pass"})
    assert response.status_code == 200
    assert engine.requests[0].prompt == "<P>def f(<S>): pass<M>"


def marks(*names: str) -> list[str]:
    return [f"<|{name}|>" for name in names]


QWEN = marks("endoftext", "fim_prefix", "fim_middle", "fim_suffix", "fim_pad")
CONTINUE = {  # of its autocompletion, with the template for Qwen's tokens
    "model": "tiny",
    "max_tokens": 4096,
    "temperature": 0.01,
    "stream": True,
    "stop": QWEN + marks("repo_name", "file_sep", "im_start", "im_end") + ["\n\n", "\r\n\r\n", "/src/", "```"],
}
ZED = {  # of its edit prediction, `"prompt_format": "qwen"`
    "model": "tiny",
    "max_tokens": 64,
    "temperature": None,
    "stop": QWEN + marks("file_separator") + ["<fim_prefix>", "<fim_suffix>", "<PRE>", "<MID>", "[PREFIX]"],
    "environment": None,
}


@pytest.mark.parametrize("form", [CONTINUE, ZED], ids=["Continue", "Zed"])
async def test_what_editors_send_to_complete_at_the_cursor(form: dict[str, Any]) -> None:
    engine = FakeEngine(Reply(["x: int", ") -> None"]))
    prompt = "<|fim_prefix|>def f(<|fim_suffix|>: pass<|fim_middle|>"
    answer = await ask(engine, prompt=prompt, **form)
    chunks = answer[:-1] if form.get("stream") else [answer]
    assert "".join(each["choices"][0]["text"] for each in chunks) == "x: int) -> None"
    (request,) = engine.requests
    assert request.prompt == prompt
    assert request.stop == form["stop"]
    assert request.max_tokens == form["max_tokens"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": ["a", 5]}, "prompt[1]"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [2**40]}, "prompt[0]"),
        ({"prompt": ["x"] * 1000}, "prompt"),
        ({"prompt": ["x"] * 20, "n": 20}, "n"),
        ({"prompt": "x", "best_of": 2}, "best_of"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "logprobs": 1000}, "logprobs"),
        ({"prompt": "x", "stream_options": {}}, "stream_options"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    engine = FakeEngine()
    async with connect(engine) as client:
        response = await client.post(PATH, json=body)
    assert response.status_code == 400, response.text
    assert error_of(response)["param"] == param
    assert not engine.requests


async def test_one_failing_prompt_ends_the_stream_and_aborts_the_others() -> None:
    engine = FakeEngine(lambda request: failure("internal_error") if request.prompt == "bad" else Reply(hang=True))
    async with connect(engine) as client:
        response = await client.post(PATH, json={"prompt": ["good", "bad"], "stream": True})
    *_, error, done = events(response.text)
    assert error["error"]["code"] == "internal_error"
    assert done == "[DONE]"
    assert not engine.running
