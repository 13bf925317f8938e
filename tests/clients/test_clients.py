"""What each client does for its users, against the demo model: ask, stream, call tools, answer in shape, fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs, not ours

EMBEDDING_SIZE = 576  # of the demo
QUESTION = "What is the capital of France?"
MESSAGES: Any = [{"role": "user", "content": QUESTION}]


class City(BaseModel):
    """A city and where it is."""

    name: str = Field(max_length=20)
    country: str = Field(max_length=20)


PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL: Any = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather.", "parameters": PARAMETERS, "strict": True},
}


def check_call(name: str, arguments: Any) -> None:
    """The one tool, called as its schema has it."""
    assert name == "weather"
    assert set(arguments) == {"city", "days"}
    assert 1 <= arguments["days"] <= 9


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
        city = client.chat.completions.parse(model=model, messages=MESSAGES, response_format=City, max_tokens=80)
        assert isinstance(city.choices[0].message.parsed, City)
        with client.chat.completions.stream(
            model=model, messages=MESSAGES, tools=[TOOL], tool_choice="required", parallel_tool_calls=False
        ) as stream:
            done: Any = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        (call,) = done
        check_call(call.name, json.loads(call.arguments))
        scored: Any = client.completions.create(model=model, prompt="One two", echo=True, logprobs=1, max_tokens=1)
        assert scored.choices[0].logprobs.token_logprobs[0] is None
        vectors = client.embeddings.create(model=model, input=["One", "two"]).data
        assert [len(each.embedding) for each in vectors] == [EMBEDDING_SIZE] * 2
        with pytest.raises(openai.BadRequestError):
            client.embeddings.create(model=model, input="x", dimensions=5)


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
        tool: Any = {"name": "weather", "description": "The weather.", "input_schema": PARAMETERS, "strict": True}
        forced: Any = {"tools": [tool], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}
        with client.messages.stream(model=model, messages=MESSAGES, max_tokens=80, **forced) as stream:
            message: Any = stream.get_final_message()
        assert message.stop_reason == "tool_use"
        check_call(message.content[-1].name, message.content[-1].input)
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
def test_litellm(url: str, model: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # no network
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
    forced = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    for stream in (False, True):
        answer = litellm.completion(**{**ask, "max_tokens": 80}, messages=MESSAGES, stream=stream, **forced)
        answer = litellm.stream_chunk_builder(list(answer)) if stream else answer
        (call,) = answer.choices[0].message.tool_calls
        check_call(call.function.name, json.loads(call.function.arguments))


def test_litellm_embeds(url: str, model: str) -> None:
    import litellm

    answer = litellm.embedding(model=f"openai/{model}", input=["One", "two"], api_base=f"{url}/v1", api_key="none")
    assert [len(each["embedding"]) for each in answer.data] == [EMBEDDING_SIZE] * 2


def test_langchain(url: str, model: str) -> None:
    from langchain_openai import ChatOpenAI, OpenAIEmbeddings

    own: Any = {"check_embedding_ctx_length": False}  # else it sends the tokens of another model
    embeddings = OpenAIEmbeddings(base_url=f"{url}/v1", api_key="none", model=model, **own)
    vectors = embeddings.embed_documents(["One", "two"])
    assert [len(each) for each in vectors] == [EMBEDDING_SIZE] * 2
    assert embeddings.embed_query("One") == pytest.approx(vectors[0], abs=1e-4)
    chat = ChatOpenAI(base_url=f"{url}/v1", api_key="none", model=model, temperature=0, max_tokens=40)
    whole = chat.invoke(QUESTION)
    assert "Paris" in whole.content
    assert whole.usage_metadata["total_tokens"] > 0
    assert "".join(part.content for part in chat.stream(QUESTION)) == whole.content
    longer = chat.model_copy(update={"max_tokens": 80})
    assert isinstance(longer.with_structured_output(City).invoke(QUESTION), City)
    (call,) = longer.bind_tools([TOOL], tool_choice="required", parallel_tool_calls=False).invoke(QUESTION).tool_calls
    check_call(call["name"], call["args"])


def test_pydantic_ai(url: str, model: str) -> None:
    from pydantic_ai import Agent, NativeOutput
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    served = OpenAIChatModel(model, provider=OpenAIProvider(base_url=f"{url}/v1", api_key="none"))
    result = Agent(served, model_settings={"temperature": 0, "max_tokens": 40}).run_sync(QUESTION)
    assert "Paris" in result.output
    assert result.usage.output_tokens > 0
    settings: Any = {"temperature": 0, "max_tokens": 80, "parallel_tool_calls": False}
    assert isinstance(Agent(served, output_type=City, model_settings=settings).run_sync(QUESTION).output, City)
    assert isinstance(
        Agent(served, output_type=NativeOutput(City), model_settings=settings).run_sync(QUESTION).output, City
    )


def test_instructor(url: str, model: str) -> None:
    import instructor
    import openai

    for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS_STRICT):
        client = instructor.from_openai(openai.OpenAI(base_url=f"{url}/v1", api_key="none"), mode=mode)
        city = client.chat.completions.create(
            model=model, messages=MESSAGES, response_model=City, temperature=0, max_tokens=80, max_retries=0
        )
        assert isinstance(city, City)
        assert city.name


def test_llm(url: str, model: str, tmp_path: Path) -> None:
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: mixbit\n  model_name: {model}\n  api_base: {url}/v1\n"
        "  api_key_name: none\n  supports_schema: true\n"
    )
    (tmp_path / "keys.json").write_text('{"none": "none"}')
    command = [str(Path(sys.executable).parent / "llm"), "-m", "mixbit", "-o", "temperature", "0", QUESTION]
    env = {**os.environ, "LLM_USER_PATH": str(tmp_path)}
    for extra in ([], ["--no-stream"]):
        done = subprocess.run([*command, *extra], env=env, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert "Paris" in done.stdout
    schema = ["--schema", json.dumps(City.model_json_schema())]
    done = subprocess.run([*command, *schema], env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert City.model_validate_json(done.stdout)
