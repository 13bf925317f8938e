"""The demo model through the openai SDK: real weights, sensible text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.server.running import RunningServer, start

QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def server(demo_checkpoint: Path) -> Iterator[RunningServer]:
    # Two first words are nearly as likely to this question: which one the fast mode takes depends on the processor.
    with start("--model", str(demo_checkpoint), "--precision", "exact") as running:
        yield running


def test_the_capital_of_france(server: RunningServer) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        stream = client.chat.completions.create(
            model=client.models.list().data[0].id,
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
            max_tokens=40,
            stream=True,
            stream_options={"include_usage": True},
        )
        parts = list(stream)
        text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
        assert "Paris" in text
        whole = client.chat.completions.create(
            model=parts[0].model, messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=40
        )
        assert whole.choices[0].message.content == text
        assert parts[-1].usage is not None
        assert whole.usage is not None
        assert parts[-1].usage.total_tokens == whole.usage.total_tokens


async def test_the_async_client_hears_the_same(server: RunningServer) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        answer = await client.chat.completions.create(
            model=(await client.models.list()).data[0].id,
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
            max_tokens=40,
        )
        assert "Paris" in (answer.choices[0].message.content or "")
        assert answer.choices[0].finish_reason in {"stop", "length"}


def test_an_answer_can_be_begun(server: RunningServer) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        answer = client.chat.completions.create(
            model=client.models.list().data[0].id,
            messages=[
                {"role": "user", "content": QUESTION},
                {"role": "assistant", "content": "The capital of France is"},
            ],
            temperature=0,
            max_tokens=5,
        )
        assert "Paris" in (answer.choices[0].message.content or "")


def test_texts_of_one_meaning_lie_nearer(server: RunningServer) -> None:
    groups = [
        ["The cat sleeps on the sofa.", "A kitten is napping on the couch."],
        ["def add(a, b): return a + b", "def total(x, y): return x + y"],
        ["Interest rates rose again this year.", "The central bank has raised its rates."],
    ]
    texts = [text for pair in groups for text in pair]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        answer = client.embeddings.create(model=client.models.list().data[0].id, input=texts)
    vectors = [each.embedding for each in answer.data]
    for place, vector in enumerate(vectors):
        likeness = [sum(a * b for a, b in zip(vector, other, strict=True)) for other in vectors]
        likeness[place] = -1.0
        assert likeness.index(max(likeness)) == place ^ 1, likeness
