"""The life of the worker process: deaths and restarts, its end with the client or the server, unloading when idle."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mixbit.engine.client import (
    EngineClient,
    EngineFailed,
    EngineState,
    RequestFailed,
    RequestRefused,
    RestartPolicy,
)
from mixbit.engine.config import EngineConfig
from mixbit.engine.process import WorkerProcess, describe_exit
from mixbit.engine.protocol import Progress
from tests.engine.running import alive, complete, engine, message, until


async def test_a_killed_worker_fails_its_streams_at_once_and_is_started_again(models: dict[str, Path]) -> None:
    async with engine(models["qwen3_next"]) as client:
        first = client.pid
        assert first is not None
        async with await client.generate(message(max_tokens=400)) as completion:
            await anext(aiter(completion))
            os.kill(first, signal.SIGKILL)
            start = time.monotonic()
            with pytest.raises(RequestFailed) as raised:
                async for _ in completion:
                    pass
        assert raised.value.code == "worker_died"
        assert time.monotonic() - start < 5
        assert client.state is EngineState.RESTARTING
        with pytest.raises(RequestRefused) as refused:
            await client.generate(message("early"))
        assert refused.value.code == "not_ready"
        await client.wait_ready()
        assert client.pid != first
        assert (await complete(client, message()))[1].usage.completion_tokens == 10


async def test_a_request_that_was_not_yet_accepted_is_refused_when_the_worker_dies(models: dict[str, Path]) -> None:
    async with engine(models["llama"]) as client:
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        with pytest.raises(RequestRefused) as raised:
            await client.generate(message())
        assert raised.value.code in {"worker_died", "not_ready"}


async def test_a_worker_that_keeps_dying_is_given_up(models: dict[str, Path]) -> None:
    async with engine(models["llama"], restart=RestartPolicy(first=0.01, attempts=1)) as client:
        for _ in range(2):
            await client.wait_ready()
            assert client.pid is not None
            os.kill(client.pid, signal.SIGKILL)
            await until(lambda: client.state is not EngineState.READY)
        await until(lambda: client.state is EngineState.FAILED)
        with pytest.raises(EngineFailed, match=r"killed by SIGKILL.*2 times in a row"):
            await client.wait_ready()


def test_the_wait_before_a_restart_doubles_up_to_a_limit() -> None:
    policy = RestartPolicy(first=0.5, longest=3.0)
    assert [policy.delay(deaths) for deaths in (1, 2, 3, 4, 50)] == [0.5, 1.0, 2.0, 3.0, 3.0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": "/no/such/model"}, "/no/such/model"),
        ({"device": "abacus"}, "unknown device 'abacus'"),
        ({"context_length": 100_000}, "context_length is 100000"),
        ({"cache_bytes": 1000}, "the cache may take"),
        ({"step_tokens": 3}, "step_tokens is 3"),
        ({"dtype": "int4"}, "dtype is 'int4'"),
    ],
)
async def test_a_model_that_cannot_be_loaded_says_why_and_is_not_tried_again(
    models: dict[str, Path], settings: dict[str, Any], words: str
) -> None:
    values: dict[str, Any] = {"model": str(models["llama"]), "device": "cpu", **settings}
    async with EngineClient(EngineConfig(**values)) as client:
        with pytest.raises(EngineFailed, match=words):
            await client.wait_ready()
        assert client.state is EngineState.FAILED
        await until(lambda: client.pid is None)
        with pytest.raises(RequestRefused, match=words):
            await client.generate(message())


async def test_closing_ends_streams_and_the_process(models: dict[str, Path]) -> None:
    async with engine(models["llama"]) as client:
        pid = client.pid
        assert alive(pid)
        completion = await client.generate(message(max_tokens=400))
        await client.close()
        assert client.state is EngineState.CLOSED
        assert not alive(pid)
        with pytest.raises(RequestFailed, match="closed"):
            async for _ in completion:
                pass
        with pytest.raises(EngineFailed, match="closed"):
            await client.wait_ready()


async def test_closing_while_loading_ends_the_process(models: dict[str, Path]) -> None:
    client = EngineClient(EngineConfig(model=str(models["llama"]), device="cpu"))
    await client.start()
    await until(lambda: client.pid is not None)
    pid = client.pid
    assert alive(pid)
    await client.close()
    assert not alive(pid)


async def test_the_worker_leaves_ctrl_c_to_the_server(models: dict[str, Path]) -> None:
    async with engine(models["llama"]) as client:
        assert client.pid is not None
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(client.pid, number)
        assert (await complete(client, message()))[1].usage.completion_tokens == 10


async def test_the_worker_ends_when_its_socket_closes(models: dict[str, Path]) -> None:
    worker = await WorkerProcess.start(EngineConfig(model=str(models["llama"]), device="cpu"))
    while isinstance(await worker.read(), Progress):
        pass
    worker._writer.close()
    await worker._writer.wait_closed()
    assert await asyncio.wait_for(worker.process.wait(), 20) == 0


_SERVER = """
import asyncio, sys
from mixbit.engine.client import EngineClient
from mixbit.engine.config import EngineConfig

async def main():
    client = EngineClient(EngineConfig(model=sys.argv[1], device="cpu"))
    await client.start()
    await client.wait_ready()
    print(client.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


async def test_the_worker_dies_with_a_server_that_is_killed(models: dict[str, Path]) -> None:
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-c", _SERVER, str(models["llama"]), stdout=asyncio.subprocess.PIPE
    )
    assert server.stdout is not None
    worker = int(await asyncio.wait_for(server.stdout.readline(), 30))
    assert alive(worker)
    server.kill()
    await server.wait()
    await until(lambda: not alive(worker))


async def test_what_the_client_imports_is_light() -> None:
    code = "import sys, mixbit.engine.client; print(sorted({name.split('.')[0] for name in sys.modules}))"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-c", code, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    assert b"'mixbit'" in output
    assert not {name for name in ("numpy", "mlx", "tokenizers", "ml_dtypes") if f"'{name}'".encode() in output}


def test_exits_are_described_in_words() -> None:
    assert describe_exit(3) == "exited with status 3"
    assert describe_exit(-11) == "was killed by SIGSEGV"
    assert describe_exit(-9) == "was killed by SIGKILL (out of memory?)"
    assert describe_exit(-999) == "was killed by signal 999"


async def test_an_idle_model_is_unloaded_and_comes_back_when_asked(models: dict[str, Path]) -> None:
    config = EngineConfig(model=str(models["llama"]), device="cpu", threads=1)
    async with EngineClient(config, idle_timeout=0.2) as client:
        await client.wait_ready()
        first = client.pid
        before, _ = await complete(client, message())
        await until(lambda: client.state is EngineState.UNLOADED)
        await until(lambda: not alive(first))
        assert client.ready is not None, "what is known of the model stays known"
        answers = await asyncio.gather(*(complete(client, message(str(n))) for n in range(3)))  # all wait for one load
        assert [text for text, _ in answers] == [before] * 3
        assert client.restarts == 0
        await until(lambda: client.state is EngineState.UNLOADED)
        assert await client.tokenize("the", add_special_tokens=False)


async def test_a_model_at_work_is_not_unloaded(models: dict[str, Path]) -> None:
    config = EngineConfig(model=str(models["llama"]), device="cpu", threads=1)
    async with EngineClient(config, idle_timeout=0.001) as client:
        _, finished = await complete(client, message(max_tokens=400))  # takes much longer than that
        assert finished.usage.completion_tokens == 400
        await until(lambda: client.state is EngineState.UNLOADED)


async def test_a_request_given_up_lets_the_model_rest(models: dict[str, Path]) -> None:
    config = EngineConfig(model=str(models["llama"]), device="cpu", threads=1)
    async with EngineClient(config, idle_timeout=0.05) as client:
        await client.wait_ready()
        async with await client.generate(message(max_tokens=400)) as completion:
            await anext(aiter(completion))
        await until(lambda: client.state is EngineState.UNLOADED)
