"""The real server with a tiny random model: client, socket, engine and all."""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.server.conftest import CONTEXT
from tests.server.running import RunningServer, until
from tests.server.support import error_of, events

CHAT, TEXT, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 24}


def post(server: RunningServer, path: str, **body: Any) -> httpx.Response:
    with server.client() as client:
        return client.post(path, json=body)


def ask(server: RunningServer, **body: Any) -> Any:
    response = post(server, CHAT, **{**ASK, **body})
    assert response.status_code == 200, response.text
    return response.json()


def text_of(server: RunningServer, **body: Any) -> str:
    return str(ask(server, **body)["choices"][0]["message"]["content"])


def stream(server: RunningServer, **body: Any) -> list[Any]:
    response = post(server, CHAT, **{**ASK, **body, "stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done = events(response.text)
    assert done == "[DONE]"
    return chunks


def streamed_text(chunks: list[Any]) -> str:
    return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])


def idle(server: RunningServer) -> bool:
    """Whether the worker does nothing: no more work means no more CPU time."""
    worker = server.worker()
    return bool(worker.cpu_percent(0.3) < 10)


def test_stream_equals_whole(tiny_server: RunningServer) -> None:
    whole = ask(tiny_server)
    chunks = stream(tiny_server, stream_options={"include_usage": True})
    assert streamed_text(chunks) == whole["choices"][0]["message"]["content"]
    assert len(streamed_text(chunks)) > 0
    assert chunks[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    for key in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert chunks[-1]["usage"][key] == whole["usage"][key]


def test_answers_are_of_the_sdks_types(tiny_server: RunningServer) -> None:
    options: dict[str, Any] = {"logprobs": True, "top_logprobs": 3, "n": 2, "temperature": 1, "seed": 1}
    ChatCompletion.model_validate(ask(tiny_server, **options), strict=True)
    for chunk in stream(tiny_server, **options, stream_options={"include_usage": True}):
        ChatCompletionChunk.model_validate(chunk, strict=True)


def test_usage_is_exact(tiny_server: RunningServer) -> None:
    short = post(tiny_server, TEXT, prompt=[5, 6, 7], max_tokens=9, ignore_eos=True).json()
    assert short["usage"]["prompt_tokens"] == 3
    long = post(tiny_server, TEXT, prompt=[5, 6, 7] * 10, max_tokens=9, ignore_eos=True).json()
    assert long["usage"]["prompt_tokens"] - short["usage"]["prompt_tokens"] == 27
    assert short["usage"]["completion_tokens"] == 9
    assert short["usage"]["total_tokens"] == short["usage"]["prompt_tokens"] + 9
    assert short["choices"][0]["finish_reason"] == "length"


def test_a_seed_gives_the_same_text_whatever_else_runs(tiny_server: RunningServer) -> None:
    options = {"temperature": 1.5, "seed": 11, "max_tokens": 40, "ignore_eos": True}
    alone = text_of(tiny_server, **options)
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(text_of, tiny_server, temperature=1, seed=seed, max_tokens=60) for seed in range(3)]
        among_others = pool.submit(text_of, tiny_server, **options).result()
        for other in others:
            other.result()
    assert among_others == alone
    assert text_of(tiny_server, **{**options, "seed": 12}) != alone


def test_n_choices_differ_and_repeat_with_their_seed(tiny_server: RunningServer) -> None:
    options = {"n": 3, "temperature": 1.5, "seed": 3, "max_tokens": 20, "ignore_eos": True}
    first = [choice["message"]["content"] for choice in ask(tiny_server, **options)["choices"]]
    assert len(set(first)) == 3
    assert [choice["message"]["content"] for choice in ask(tiny_server, **options)["choices"]] == first
    streamed: dict[int, str] = {}
    for chunk in stream(tiny_server, **options):
        choice = chunk["choices"][0]
        streamed[choice["index"]] = streamed.get(choice["index"], "") + choice["delta"].get("content", "")
    assert [streamed[index] for index in range(3)] == first


def test_stop_strings_are_found_across_tokens(tiny_server: RunningServer) -> None:
    entries = ask(tiny_server, ignore_eos=True, logprobs=True)["choices"][0]["logprobs"]["content"]
    tokens = [bytes(entry["bytes"]).decode("utf-8", "replace") for entry in entries]
    # The end of one token and the beginning of the next, away from characters that are split.
    place = next(
        at
        for at in range(3, len(tokens) - 1)
        if tokens[at] and tokens[at + 1] and "\ufffd" not in tokens[at] + tokens[at + 1]
    )
    stop = tokens[place][-1] + tokens[place + 1][0]
    full = text_of(tiny_server, ignore_eos=True)
    expected = full[: full.index(stop)]
    for options in ({"stop": stop}, {"stop": ["never said", stop]}):
        answer = ask(tiny_server, ignore_eos=True, **options)["choices"][0]
        assert answer["message"]["content"] == expected
        assert answer["finish_reason"] == "stop"
        assert streamed_text(stream(tiny_server, ignore_eos=True, **options)) == expected


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_text_is_whole_characters(tiny_server: RunningServer, temperature: float) -> None:
    options = {"temperature": temperature, "seed": 5, "max_tokens": 200, "ignore_eos": True, "logprobs": True}
    chunks = stream(tiny_server, **options)
    joined = b"".join(
        bytes(entry["bytes"])
        for chunk in chunks
        if chunk["choices"][0]["logprobs"]
        for entry in chunk["choices"][0]["logprobs"]["content"]
    )
    assert streamed_text(chunks) == joined.decode("utf-8", "replace")
    assert text_of(tiny_server, **options) == streamed_text(chunks)


def test_logprobs_are_of_the_tokens_of_the_text(tiny_server: RunningServer) -> None:
    content = ask(tiny_server, logprobs=True, top_logprobs=4, ignore_eos=True)["choices"][0]["logprobs"]["content"]
    assert len(content) == 24
    for entry in content:
        values = [top["logprob"] for top in entry["top_logprobs"]]
        assert len(values) == 4
        assert values == sorted(values, reverse=True)
        assert entry["logprob"] == values[0] <= 0  # greedy


def test_an_echoed_prompt_has_logprobs_and_changes_none_of_the_answers(tiny_server: RunningServer) -> None:
    body: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "logprobs": 2}
    tokens = [token % 200 for token in range(7, 7 + 150)]  # more than are scored at once
    written = post(tiny_server, TEXT, prompt=tokens, max_tokens=40, **body).json()["choices"][0]
    generated = written["logprobs"]["token_logprobs"]
    with tiny_server.client() as client:
        text = client.post("/detokenize", json={"tokens": tokens}).json()["content"]
    for prompt in (tokens, tokens[:1]):
        echoed = post(tiny_server, TEXT, prompt=prompt, echo=True, max_tokens=40, **body).json()
        values = echoed["choices"][0]["logprobs"]["token_logprobs"]
        assert len(values) == len(prompt) + 40
        assert values[0] is None
        assert echoed["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        if prompt is tokens:
            assert echoed["choices"][0]["text"].startswith(text)
            assert values[len(prompt) :] == pytest.approx(generated, abs=1e-3)


def test_logit_bias_decides(tiny_server: RunningServer) -> None:
    body: dict[str, Any] = {"prompt": "x", "temperature": 0, "max_tokens": 5, "ignore_eos": True}
    plain = post(tiny_server, TEXT, **body, logprobs=0).json()["choices"][0]["logprobs"]["tokens"]
    token = next(number for number in range(65, 90) if chr(number) not in plain)
    biased = post(tiny_server, TEXT, **body, logit_bias={str(token): 100}, logprobs=0).json()["choices"][0]
    assert len(set(biased["logprobs"]["tokens"])) == 1
    assert biased["logprobs"]["tokens"] != plain
    response = post(tiny_server, TEXT, **body, logit_bias={"99999": 1})
    assert (response.status_code, error_of(response)["param"]) == (400, "logit_bias")


def test_prompts_of_every_kind(tiny_server: RunningServer) -> None:
    body: dict[str, Any] = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
    one = post(tiny_server, TEXT, prompt="first", **body).json()["choices"][0]["text"]
    two = post(tiny_server, TEXT, prompt="second", **body).json()["choices"][0]["text"]
    both = post(tiny_server, TEXT, prompt=["first", "second"], **body).json()
    assert [choice["text"] for choice in both["choices"]] == [one, two]
    echoed = post(tiny_server, TEXT, prompt="first", echo=True, **body).json()["choices"][0]["text"]
    assert echoed == "first" + one
    response = post(tiny_server, TEXT, prompt=[10**6], **body)
    assert (response.status_code, error_of(response)["param"]) == (400, "prompt")


def test_special_tokens_in_a_raw_prompt_are_tokens(tiny_server: RunningServer) -> None:
    raw = "<|im_start|>user\n<|im_end|>"
    with tiny_server.client() as client:
        pieces = client.post("/tokenize", json={"content": raw, "with_pieces": True}).json()["tokens"]
        snow = client.post("/tokenize", json={"content": "☃", "with_pieces": True}).json()["tokens"]
    assert (pieces[0], pieces[-1]) == ({"id": 1, "piece": "<|im_start|>"}, {"id": 2, "piece": "<|im_end|>"})
    assert bytes(byte for each in snow for byte in each["piece"]) == "☃".encode()
    answer = post(tiny_server, TEXT, prompt=raw, max_tokens=6, temperature=0, ignore_eos=True, echo=True).json()
    assert answer["usage"]["prompt_tokens"] == len(pieces)
    same = post(tiny_server, TEXT, prompt=[each["id"] for each in pieces], max_tokens=6, temperature=0, ignore_eos=True)
    assert answer["choices"][0]["text"] == raw + same.json()["choices"][0]["text"]


@pytest.mark.parametrize("streamed", [False, True])
def test_overflow_says_what_clients_look_for(tiny_server: RunningServer, streamed: bool) -> None:
    messages = [{"role": "user", "content": "x y z " * CONTEXT}]
    response = post(tiny_server, CHAT, messages=messages, stream=streamed)
    assert response.status_code == 400
    error = error_of(response)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert f"maximum context length is {CONTEXT} tokens" in error["message"]
    assert "exceeds the available context size" in error["message"]


def test_hanging_up_frees_the_worker(tiny_server: RunningServer) -> None:
    for streamed in (True, False):
        body: dict[str, Any] = {**ASK, "max_tokens": CONTEXT - 100, "ignore_eos": True, "stream": streamed, "n": 4}
        with tiny_server.client() as client:
            if streamed:
                with client.stream("POST", CHAT, json=body) as response:
                    next(response.iter_lines())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post(CHAT, json=body, timeout=0.5)
        until(lambda: idle(tiny_server), 5)


def test_many_clients_at_once(tiny_server: RunningServer) -> None:
    seeds = list(range(12))
    options = {"temperature": 1.2, "max_tokens": 16}
    alone = [text_of(tiny_server, seed=seed, **options) for seed in seeds]
    start = threading.Barrier(len(seeds))

    def one(seed: int) -> str:
        start.wait()
        return streamed_text(stream(tiny_server, seed=seed, **options))

    with ThreadPoolExecutor(len(seeds)) as pool:
        assert list(pool.map(one, seeds)) == alone


def test_one_bad_request_disturbs_nobody(tiny_server: RunningServer) -> None:
    with ThreadPoolExecutor(2) as pool:
        good = pool.submit(text_of, tiny_server, max_tokens=100, ignore_eos=True)
        refused = [{"role": "user", "content": "refuse me"}]
        bad: list[dict[str, Any]] = [{}, {"messages": []}, {"messages": refused}, {**ASK, "n": -1}]
        for body in bad:
            assert post(tiny_server, CHAT, **body).status_code == 400
        assert good.result()


def test_models_and_names(tiny_server: RunningServer) -> None:
    with tiny_server.client() as client:
        assert [each["id"] for each in client.get("/v1/models").json()["data"]] == ["tiny-llama", "org/alias"]
        model = client.get("/v1/models/org%2Falias").json()
        assert (model["id"], model["context_length"]) == ("org/alias", CONTEXT)
    assert ask(tiny_server, model="org/alias")["model"] == "tiny-llama"
    assert post(tiny_server, CHAT, **ASK, model="other").status_code == 404


def test_a_client_may_look_whether_someone_is_there(tiny_server: RunningServer) -> None:
    with tiny_server.client() as client:
        for path in ("/", "/health", "/v1/models"):
            found = client.head(path)
            assert (found.status_code, found.content) == (200, b""), path
            assert client.get(path).headers["content-length"] == found.headers["content-length"]


def test_embeddings_of_texts_and_of_their_tokens_whatever_else_runs(tiny_server: RunningServer) -> None:
    texts = ["hello", "hello, hello " * 60, "something else", "hello"]

    def vectors(given: Any) -> Any:
        answer = post(tiny_server, EMBED, input=given).json()
        assert answer["usage"]["total_tokens"] == counted
        return [each["embedding"] for each in answer["data"]]

    with tiny_server.client() as client:
        asked = [{"content": text, "add_special": True} for text in texts]
        tokens = [client.post("/tokenize", json=each).json()["tokens"] for each in asked]
    counted = sum(map(len, tokens))
    alone = vectors(texts)
    assert all(sum(value * value for value in vector) == pytest.approx(1, abs=1e-5) for vector in alone)
    assert alone[0] == pytest.approx(alone[3], abs=1e-5)
    assert alone[0] != pytest.approx(alone[2], abs=1e-2)
    expected = text_of(tiny_server, max_tokens=100, ignore_eos=True)
    with ThreadPoolExecutor(4) as pool:
        text = pool.submit(text_of, tiny_server, max_tokens=100, ignore_eos=True)
        for found in pool.map(vectors, (texts, tokens, texts)):
            for one, other in zip(found, alone, strict=True):
                assert one == pytest.approx(other, abs=1e-4)
        assert text.result() == expected


def test_hanging_up_ends_the_embedding(tiny_server: RunningServer) -> None:
    with tiny_server.client() as client, pytest.raises(httpx.ReadTimeout):
        client.post(EMBED, json={"input": ["x y z " * 200] * 500}, timeout=0.5)
    until(lambda: idle(tiny_server), 5)


def test_a_text_too_long_to_embed(tiny_server: RunningServer) -> None:
    response = post(tiny_server, EMBED, input=["fine", "x y z " * CONTEXT])
    assert response.status_code == 400
    assert (error_of(response)["code"], error_of(response)["param"]) == ("context_length_exceeded", "input")


# --- the openai SDK ---


def test_sdk(tiny_server: RunningServer) -> None:
    with openai.OpenAI(base_url=f"{tiny_server.url}/v1", api_key="any", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny-llama", "org/alias"]
        assert client.models.retrieve("org/alias").id == "org/alias"
        whole = client.chat.completions.create(
            model="tiny-llama", messages=[{"role": "user", "content": "hello"}], temperature=0, max_tokens=24
        )
        assert whole.choices[0].message.content == text_of(tiny_server)
        assert whole.usage is not None
        assert whole.usage.prompt_tokens_details is not None
        assert whole.usage.prompt_tokens_details.cached_tokens is not None
        text = client.completions.create(model="tiny-llama", prompt="x", max_tokens=3, stream=True)
        assert [part.choices[0].finish_reason for part in text][-1] in {"stop", "length"}
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="nope", messages=[{"role": "user", "content": "x"}])
        assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.BadRequestError) as wrong:
            client.chat.completions.create(model="tiny-llama", messages=[])
        assert wrong.value.param == "messages"
        with pytest.raises(openai.BadRequestError) as overflow:
            client.completions.create(model="tiny-llama", prompt=[5] * CONTEXT, stream=True)
        assert overflow.value.code == "context_length_exceeded"


async def test_async_sdk_streams_in_parallel(tiny_server: RunningServer) -> None:
    async with openai.AsyncOpenAI(base_url=f"{tiny_server.url}/v1", api_key="any", max_retries=0) as client:

        async def one(seed: int) -> str:
            stream = await client.chat.completions.create(
                model="tiny-llama",
                messages=[{"role": "user", "content": "hello"}],
                stream=True,
                seed=seed,
                max_tokens=16,
                stream_options={"include_usage": True},
            )
            parts = [part async for part in stream]
            assert parts[-1].usage is not None
            return "".join(part.choices[0].delta.content or "" for part in parts if part.choices)

        first = await asyncio.gather(*(one(seed) for seed in range(5)))
        assert await asyncio.gather(*(one(seed) for seed in range(5))) == first


def test_a_slow_reader_gets_everything(tiny_server: RunningServer) -> None:
    expected = text_of(tiny_server, max_tokens=600, ignore_eos=True)
    body: dict[str, Any] = {**ASK, "max_tokens": 600, "ignore_eos": True, "stream": True}
    with tiny_server.client() as client, client.stream("POST", CHAT, json=body) as response:
        until(lambda: idle(tiny_server))  # nothing is read until the worker is done
        lines = [line[6:] for line in response.iter_lines() if line.startswith("data: {")]
    assert streamed_text([json.loads(line) for line in lines]) == expected
