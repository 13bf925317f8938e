"""Prompts that have something in common, over HTTP: what is counted as cached, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.repeatable import arguments
from tests.server.running import RunningServer, start

TEXT = "/v1/completions"
TOKENS = [6 + 7 * place % 241 for place in range(400)]


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path) -> Iterator[RunningServer]:
    """One whose cache holds about five of the prompts here."""
    options = ("--threads", "1", "--context-length", "1024", "--cache-memory", "1M", "--no-disk-cache")
    with start("--model", str(tiny_checkpoint), *arguments(), *options) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def complete(client: httpx.Client, prompt: list[int], **body: Any) -> tuple[str, int]:
    """The text that follows, and how much of the prompt was cached."""
    fields = {"prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True, **body}
    response = client.post(TEXT, json=fields)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    return answer["choices"][0]["text"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def computed(client: httpx.Client, prompt: list[int]) -> str:
    """The text that follows where the whole prompt is computed: all its log-probabilities are asked for."""
    told, cached = complete(client, prompt, echo=True, logprobs=0)
    assert cached == 0
    shown = client.post("/detokenize", json={"tokens": prompt}).json()["content"]
    assert told.startswith(shown)
    return told.removeprefix(shown)


def test_the_same_an_extended_and_a_diverging_prompt(client: httpx.Client) -> None:
    first, cached = complete(client, TOKENS[:200])
    assert cached == 0
    assert complete(client, TOKENS[:200]) == (first, 199)  # the last is always computed
    extended, cached = complete(client, TOKENS[:250])
    assert cached == 200
    diverging, cached = complete(client, [*TOKENS[:117], 5, 9, 11])
    assert cached == 117
    assert extended == computed(client, TOKENS[:250])
    assert diverging == computed(client, [*TOKENS[:117], 5, 9, 11])


def test_every_api_tells_of_it(client: httpx.Client) -> None:
    turns = [{"role": "user", "content": "a question of some length, " * 8}]
    question = client.post("/v1/chat/completions", json={"messages": turns, "max_tokens": 4, "temperature": 0}).json()
    prompt = question["usage"]["prompt_tokens"]
    whole = prompt - 1
    chat = client.post("/v1/chat/completions", json={"messages": turns, "max_tokens": 4}).json()["usage"]
    assert chat["prompt_tokens_details"]["cached_tokens"] == whole
    usage = client.post("/v1/messages", json={"messages": turns, "max_tokens": 4}).json()["usage"]
    assert (usage["cache_read_input_tokens"], usage["input_tokens"]) == (whole, 1)
    usage = client.post("/v1/responses", json={"input": turns, "max_output_tokens": 4}).json()["usage"]
    assert (usage["input_tokens"], usage["input_tokens_details"]["cached_tokens"]) == (prompt, whole)


def test_an_exact_hit_disturbs_neither_lists_nor_choices(client: httpx.Client) -> None:
    body = {"prompt": [TOKENS[:64]] * 3, "n": 2, "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    once, again = (client.post(TEXT, json=body).json() for _ in range(2))
    assert [choice["text"] for choice in again["choices"]] == [choice["text"] for choice in once["choices"]]
    assert len({choice["text"] for choice in again["choices"]}) == 1
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 3 * 63


def test_churn_changes_no_text_and_leaks_nothing(server: RunningServer, client: httpx.Client) -> None:
    prompts = [[5 + number, *TOKENS[number : number + 300]] for number in range(24)]
    alone = [complete(client, prompt)[0] for prompt in prompts]
    # Backwards: each finds a cache that others have filled.
    again = [complete(client, prompt) for prompt in reversed(prompts)]
    assert [text for text, _ in again] == alone[::-1]
    assert again[0][1] == 300
    assert again[-1][1] == 0, "the cache holds more than it was given, and nothing was driven out"
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda prompt: complete(client, prompt)[0], prompts))
    assert together == alone
    assert server.settled()["mixbit_kv_bytes" + '{state="cached"}'] > 0
