"""The client: requests to the real worker process, over tiny models."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from mixbit.engine.client import (
    EngineClient,
    EngineState,
    RequestFailed,
    RequestRefused,
)
from mixbit.engine.config import EngineConfig
from mixbit.engine.protocol import Delta, Finished, Sampling, Stats
from mixbit.engine.stream import Stream
from tests.checkpoints import VOCAB_SIZE
from tests.engine.running import GREEDY, complete, engine, message, until
from tests.repeatable import settings as repeatable


async def test_the_model_is_described_when_it_is_ready(models: dict[str, Path]) -> None:
    async with EngineClient(EngineConfig(model=str(models["llama"]), device="reference")) as client:
        states: list[str] = []
        while not states or states[-1] != "ready":
            states.append(str(client.state))
            await asyncio.sleep(0.002)
        assert list(dict.fromkeys(states)) in (["starting", "loading", "ready"], ["starting", "ready"])
        ready = await client.wait_ready()
        assert client.ready is ready
        assert client.progress is None
        assert (ready.backend, ready.context_length, ready.vocab_size) == ("reference", 512, VOCAB_SIZE)
        assert ready.weight_bytes > 0
        assert ready.cache_bytes > 0
        text, finished = await complete(client, message())
        assert text
        assert finished.usage.completion_tokens == 10


# Not hybrids in the fast mode: what else runs decides where a prompt is cut into chunks, the delta net's sums then
# differ by rounding, and a code of a rounded input may become its neighbour.
REPEATABLE = pytest.mark.parametrize(
    ("model", "precision"), [("llama", "exact"), ("qwen3_next", "exact"), ("llama", "fast")]
)


@REPEATABLE
async def test_the_text_of_a_request_does_not_depend_on_what_else_runs(
    models: dict[str, Path], model: str, precision: str
) -> None:
    requests = [
        message(
            str(number),
            prompt=[10 + number] * (1 + 37 * number % 90),
            max_tokens=5 + number,
            sampling=Sampling(temperature=0.8, top_p=0.9, seed=number) if number % 2 else GREEDY,
        )
        for number in range(12)
    ]
    async with engine(models[model], max_running=5, step_tokens=32, **repeatable(precision)) as client:
        together = await asyncio.gather(*(complete(client, request) for request in requests))
        alone = [await complete(client, request) for request in requests]
    assert [text for text, _ in together] == [text for text, _ in alone]
    for request, (_, finished) in zip(requests, alone, strict=True):
        assert 0 < finished.usage.cached_tokens < len(request.prompt) or len(request.prompt) < 33
    for request, (_, finished) in zip(requests, together, strict=True):
        assert finished.reason == "length"
        assert finished.usage.prompt_tokens == len(request.prompt)
        assert finished.usage.completion_tokens == request.max_tokens


@REPEATABLE
async def test_memory_that_runs_short_does_not_change_the_text(
    models: dict[str, Path], model: str, precision: str
) -> None:
    requests = [message(str(number), prompt=[10 + number] * 120, max_tokens=120) for number in range(4)]
    shape: dict[str, Any] = {"max_running": 4, "block_size": 16, "context_length": 250, **repeatable(precision)}

    async def texts(**settings: Any) -> tuple[list[tuple[str, Finished]], int, int]:
        async with engine(models[model], **shape, **settings) as client:
            assert client.ready is not None
            said = await asyncio.gather(*(complete(client, request) for request in requests))
            await until(lambda: client.stats is not None and client.stats.steps > 0 == client.stats.running)
            assert client.stats is not None
            return said, client.ready.cache_bytes, client.stats.preemptions

    ample, cache_bytes, none = await texts()
    # All four are admitted with their prompts, and cannot all grow to their ends.
    for _ in range(10):  # on a busy machine they may come one after another
        tight, _, some = await texts(cache_bytes=cache_bytes * 45 // 100)
        assert tight == ample
        if some:
            break
    assert none == 0 < some


async def test_the_same_seed_gives_the_same_text_and_another_does_not(models: dict[str, Path]) -> None:
    async with engine(models["llama"]) as client:
        texts = [
            (await complete(client, message(max_tokens=30, sampling=Sampling(seed=seed))))[0] for seed in (1, 1, 2)
        ]
    assert texts[0] == texts[1] != texts[2]


async def test_leaving_a_stream_frees_its_place(models: dict[str, Path]) -> None:
    async with engine(models["llama"], max_running=1, max_queue=0) as client:
        async with await client.generate(message("long", max_tokens=500)) as completion:
            async for _ in completion:
                break
            with pytest.raises(RequestRefused) as raised:
                await client.generate(message("refused"))
            assert raised.value.code == "queue_full"
        # The worker takes the abort before the next request.
        assert (await complete(client, message("next")))[1].usage.completion_tokens == 10
        assert [event async for event in completion] == []


async def test_cancelling_a_request_before_it_is_accepted_frees_its_place(models: dict[str, Path]) -> None:
    async with engine(models["llama"], max_running=1, max_queue=0) as client:
        task = asyncio.create_task(client.generate(message("long", max_tokens=500)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await complete(client, message("next")))[1].usage.completion_tokens == 10


async def test_bad_requests_are_refused_and_harm_nobody(models: dict[str, Path]) -> None:
    bad: list[tuple[dict[str, Any], str, str]] = [
        ({"prompt": [5] * 512}, "context_length_exceeded", "maximum context length is 512 tokens"),
        ({"prompt": "ab\ud800"}, "invalid_value", "surrogate"),
        ({"prompt": [2**80]}, "invalid_value", "cannot be sent"),
        ({"prompt": [VOCAB_SIZE]}, "invalid_value", f"token {VOCAB_SIZE}"),
        ({"prompt": ["a", "b"]}, "invalid_value", "prompt"),
        ({"sampling": Sampling(temperature="hot")}, "invalid_value", "temperature"),  # type: ignore[arg-type]
    ]
    async with engine(models["llama"]) as client:
        pid = client.pid
        other = asyncio.create_task(complete(client, message("other", max_tokens=200)))
        for fields, code, words in bad:
            with pytest.raises(RequestRefused, match=words) as raised:
                await client.generate(message(**fields))
            assert raised.value.code == code
        assert (await other)[1].usage.completion_tokens == 200
        assert client.pid == pid


async def test_a_prompt_larger_than_the_memory_is_refused(models: dict[str, Path]) -> None:
    settings: dict[str, Any] = {"context_length": 512, "block_size": 16, "max_running": 1}
    async with engine(models["llama"], **settings) as client:
        assert client.ready is not None
        whole = client.ready.cache_bytes
    async with engine(models["llama"], **settings, cache_bytes=whole * 6 // 10) as client:
        with pytest.raises(RequestRefused) as raised:
            await client.generate(message(prompt=[5] * 400))
        assert raised.value.code == "insufficient_memory"
        await complete(client, message())
    # Where no context was asked for, memory says what it is.
    settings.pop("context_length")
    async with engine(models["llama"], **settings, cache_bytes=whole * 6 // 10) as client:
        assert client.ready is not None
        assert 256 <= client.ready.context_length < 512
        with pytest.raises(RequestRefused) as raised:
            await client.generate(message(prompt=[5] * 400))
        assert raised.value.code == "context_length_exceeded"


async def test_tokenize_and_detokenize(models: dict[str, Path]) -> None:
    async with engine(models["llama"]) as client:
        tokens = await client.tokenize("What is the capital?", add_special_tokens=False)
        assert await client.detokenize(tokens) == "What is the capital?"
        with pytest.raises(RequestRefused) as raised:
            await client.detokenize([VOCAB_SIZE])
        assert (raised.value.code, raised.value.param) == ("invalid_value", "tokens")
        with pytest.raises(RequestRefused, match="surrogate"):
            await client.tokenize("\udfff", add_special_tokens=False)


async def test_an_id_in_use_is_an_error(models: dict[str, Path]) -> None:
    async with engine(models["llama"]) as client, await client.generate(message(max_tokens=100)):
        with pytest.raises(ValueError, match="in use"):
            await client.generate(message())


async def test_a_reader_that_lags_gets_all_the_text_in_few_deltas(models: dict[str, Path]) -> None:
    async with engine(models["llama"]) as client:
        expected, _ = await complete(client, message(max_tokens=300, logprobs=1))
        async with await client.generate(message(max_tokens=300, logprobs=1)) as completion:
            await complete(client, message("other", max_tokens=400))  # meanwhile the first has long ended
            delta, finished = [event async for event in completion]
    assert isinstance(delta, Delta)
    assert isinstance(finished, Finished)
    assert delta.text == expected
    assert delta.token_count == len(delta.logprobs) == finished.usage.completion_tokens == 300


async def test_deltas_that_nobody_reads_are_joined() -> None:
    stream = Stream("a", abort=lambda request_id: None)
    for number in range(10_000):
        stream.push(Delta(request_id="a", text=f"{number},", token_count=1))
    assert len(stream._deltas) < 100
    assert (await anext(stream)).text == "".join(f"{number}," for number in range(10_000))  # type: ignore[union-attr]


async def test_a_request_that_takes_too_long_fails_and_frees_its_place(models: dict[str, Path]) -> None:
    config = EngineConfig(model=str(models["qwen3_next"]), device="reference", max_running=1, max_queue=1)
    async with EngineClient(config, request_timeout=0.6) as client:
        await client.wait_ready()
        started = time.monotonic()
        running = await client.generate(message("running", max_tokens=500))
        waiting = await client.generate(message("waiting", max_tokens=500))
        for completion in (running, waiting):
            with pytest.raises(RequestFailed, match=r"0\.6 s") as raised:
                async for _ in completion:
                    pass
            assert raised.value.code == "timeout"
        assert time.monotonic() - started < 5
        assert (await complete(client, message("next", max_tokens=3)))[1].usage.completion_tokens == 3
        await asyncio.sleep(0.7)  # its time is over too, and nothing happens
        assert client.state is EngineState.READY


async def test_the_worker_says_what_it_holds(models: dict[str, Path]) -> None:
    async with engine(models["llama"], max_running=1) as client:
        await until(lambda: client.stats is not None)
        assert client.stats == Stats()
        async with AsyncExitStack() as streams:
            for number in range(12):  # one runs at a time: enough that some still wait when the numbers come
                request = message(f"request-{number}", max_tokens=400)
                await streams.enter_async_context(await client.generate(request))
            await until(lambda: client.stats is not None and client.stats.waiting > 0 and client.stats.blocks_used > 0)
            assert client.stats is not None
            assert client.stats.running == 1
            assert client.ready is not None
            assert client.stats.blocks_used * client.ready.block_bytes <= client.ready.cache_bytes
        await until(lambda: client.stats is not None and client.stats.running == client.stats.waiting == 0)
        assert client.stats.blocks_used == client.stats.leaks == 0
        assert client.stats.steps > 0
        assert client.restarts == 0
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        await until(lambda: client.restarts == 1)
        assert [client.stats] == [None]
        await client.wait_ready()


# --- unloading ---
