"""What each client does for its users, against the demo model: ask, stream, and see an error as one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs, not ours

QUESTION = "What is the capital of France?"
MESSAGES: Any = [{"role": "user", "content": QUESTION}]


def test_openai(url: str, model: str) -> None:
    import openai

    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        ask: dict[str, Any] = {"model": model, "messages": MESSAGES, "temperature": 0, "max_tokens": 40}
        whole = client.chat.completions.create(**ask).choices[0].message.content
        parts = client.chat.completions.create(**ask, stream=True)
        assert "".join(part.choices[0].delta.content or "" for part in parts) == whole
        assert "Paris" in (whole or "")
        answer = client.responses.create(model=model, input=QUESTION, temperature=0, max_output_tokens=40)
        assert answer.output_text == whole
        with client.responses.stream(model=model, input=QUESTION, temperature=0, max_output_tokens=40) as stream:
            deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
            assert "".join(deltas) == whole == stream.get_final_response().output_text
        with pytest.raises(openai.BadRequestError):
            client.embeddings.create(model=model, input="x")


async def test_openai_async(url: str, model: str) -> None:
    import openai

    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        answer = await client.chat.completions.create(model=model, messages=MESSAGES, temperature=0, max_tokens=40)
        assert "Paris" in (answer.choices[0].message.content or "")


def test_anthropic(url: str, model: str) -> None:
    import anthropic

    with anthropic.Anthropic(base_url=url, api_key="none") as client:
        extra: dict[str, Any] = {"extra_body": {"temperature": 0}}
        whole: Any = client.messages.create(model=model, messages=MESSAGES, max_tokens=40, **extra)
        text = whole.content[0].text
        assert "Paris" in text
        with client.messages.stream(model=model, messages=MESSAGES, max_tokens=40, **extra) as stream:
            assert "".join(stream.text_stream) == text
        counted = client.messages.count_tokens(model=model, messages=MESSAGES).input_tokens
        assert counted == whole.usage.input_tokens + whole.usage.cache_read_input_tokens
        with pytest.raises(anthropic.NotFoundError):
            client.messages.create(model="nope", messages=MESSAGES, max_tokens=40)


async def test_anthropic_async(url: str, model: str) -> None:
    import anthropic

    async with anthropic.AsyncAnthropic(base_url=url, api_key="none") as client:
        answer: Any = await client.messages.create(
            model=model, messages=MESSAGES, max_tokens=40, extra_body={"temperature": 0}
        )
        assert "Paris" in answer.content[0].text


@pytest.mark.parametrize("kind", ["openai", "anthropic", "text-completion-openai"])
def test_litellm(url: str, model: str, kind: str) -> None:
    import litellm

    base = url if kind == "anthropic" else f"{url}/v1"
    ask: dict[str, Any] = {"model": f"{kind}/{model}", "api_base": base, "api_key": "none", "max_tokens": 40}
    if kind == "text-completion-openai":
        text = litellm.text_completion(**ask, prompt="The capital of France is", temperature=0).choices[0].text
        assert "Paris" in text
        return
    whole = litellm.completion(**ask, messages=MESSAGES, temperature=0).choices[0].message.content
    assert "Paris" in whole
    parts = litellm.completion(**ask, messages=MESSAGES, temperature=0, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole


def test_langchain(url: str, model: str) -> None:
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(base_url=f"{url}/v1", api_key="none", model=model, temperature=0, max_tokens=40)
    whole = chat.invoke(QUESTION)
    assert "Paris" in whole.content
    assert whole.usage_metadata["total_tokens"] > 0
    assert "".join(part.content for part in chat.stream(QUESTION)) == whole.content


def test_pydantic_ai(url: str, model: str) -> None:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    served = OpenAIChatModel(model, provider=OpenAIProvider(base_url=f"{url}/v1", api_key="none"))
    result = Agent(served, model_settings={"temperature": 0, "max_tokens": 40}).run_sync(QUESTION)
    assert "Paris" in result.output
    assert result.usage.output_tokens > 0


def test_instructor(url: str, model: str) -> None:
    import instructor
    import openai
    from pydantic import BaseModel

    class City(BaseModel):
        name: str
        country: str

    client = instructor.from_openai(
        openai.OpenAI(base_url=f"{url}/v1", api_key="none"), mode=instructor.Mode.JSON_SCHEMA
    )
    city = client.chat.completions.create(
        model=model, messages=MESSAGES, response_model=City, temperature=0, max_tokens=80, max_retries=0
    )
    assert isinstance(city, City)
    assert city.name


def test_llm(url: str, model: str, tmp_path: Path) -> None:
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: mixbit\n  model_name: {model}\n  api_base: {url}/v1\n  api_key_name: none\n"
    )
    (tmp_path / "keys.json").write_text('{"none": "none"}')
    command = [str(Path(sys.executable).parent / "llm"), "-m", "mixbit", "-o", "temperature", "0", QUESTION]
    env = {**os.environ, "LLM_USER_PATH": str(tmp_path)}
    for extra in ([], ["--no-stream"]):
        done = subprocess.run([*command, *extra], env=env, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert "Paris" in done.stdout
