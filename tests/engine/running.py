"""Engines of real worker processes for tests, and requests to them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil

from mixbit.engine.client import EngineClient, RestartPolicy
from mixbit.engine.config import EngineConfig
from mixbit.engine.protocol import Delta, Finished, Generate, Sampling

GREEDY = Sampling(temperature=0)
QUICK = RestartPolicy(first=0.01)


@asynccontextmanager
async def engine(model: Path, *, restart: RestartPolicy = QUICK, **settings: Any) -> AsyncIterator[EngineClient]:
    values: dict[str, Any] = {"device": "cpu", "threads": 1, **settings}
    async with EngineClient(EngineConfig(model=str(model), **values), restart=restart) as client:
        await client.wait_ready()
        yield client


def message(request_id: str = "a", prompt: str | list[int] = "the capital", **fields: Any) -> Generate:
    values: dict[str, Any] = {
        "add_special_tokens": False,
        "sampling": GREEDY,
        "max_tokens": 10,
        "ignore_eos": True,
        **fields,
    }
    return Generate(request_id=request_id, prompt=prompt, **values)


async def complete(client: EngineClient, request: Generate) -> tuple[str, Finished]:
    async with await client.generate(request) as completion:
        events = [event async for event in completion]
    *deltas, finished = events
    assert isinstance(finished, Finished)
    return "".join(delta.text for delta in deltas if isinstance(delta, Delta)), finished


def alive(pid: int | None) -> bool:
    assert pid is not None
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)  # type: ignore[no-untyped-call]
    except psutil.NoSuchProcess:
        return False


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        await asyncio.sleep(0.01)
