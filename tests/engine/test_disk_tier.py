"""Prefixes that survive the worker: real processes, ended and killed."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from mixbit.engine.client import EngineClient
from mixbit.engine.config import EngineConfig
from mixbit.engine.disk_store import entries
from mixbit.engine.disk_tier import fingerprint
from tests.checkpoints import VOCAB_SIZE, write_checkpoint
from tests.engine.running import complete, message

PROMPT = [int(token) for token in np.random.default_rng(3).integers(6, VOCAB_SIZE, 150)]


@pytest.fixture(scope="module", params=["llama", "qwen3_next"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / request.param, request.param)


@asynccontextmanager
async def engine(model: Path, disk: Path, **settings: Any) -> AsyncIterator[EngineClient]:
    values: dict[str, Any] = {"device": "cpu", "threads": 1, "step_tokens": 64, "max_running": 4, **settings}
    # Hybrids repeat their texts to the token in the exact mode alone.
    precision: Literal["exact", "fast"] = "exact" if model.name == "qwen3_next" else "fast"
    config = EngineConfig(model=str(model), precision=precision, disk_cache=str(disk), **values)
    async with EngineClient(config) as client:
        await client.wait_ready()
        yield client


async def written(disk: Path, model: Path) -> None:
    """Wait until the disk has a prefix to go on from: four blocks and, for a hybrid, a state, which follows them."""
    for _ in range(2000):
        kinds = Counter(entry.path.name[0] for entry in entries(disk))
        if kinds["b"] >= 4 and (kinds["s"] or model.name == "llama"):
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{kinds} is all that was written")


async def test_the_prefix_is_there_after_a_restart_and_gives_the_same_text(model: Path, tmp_path: Path) -> None:
    async with engine(model, tmp_path / "disk") as client:
        cold, first = await complete(client, message(prompt=PROMPT))
    async with engine(model, tmp_path / "disk") as client:
        warm, second = await complete(client, message(prompt=PROMPT))
        again, third = await complete(client, message(prompt=PROMPT))
    assert first.usage.cached_tokens == 0
    assert 128 <= second.usage.cached_tokens < 150
    assert third.usage.cached_tokens == 149
    assert cold == warm == again


async def test_a_killed_worker_leaves_what_it_had_written(model: Path, tmp_path: Path) -> None:
    async with engine(model, tmp_path / "disk") as client:
        cold, _ = await complete(client, message(prompt=PROMPT))
        await written(tmp_path / "disk", model)
        for _ in range(3):
            assert client.pid is not None
            os.kill(client.pid, signal.SIGKILL)
            while client.ready is not None:
                await asyncio.sleep(0.01)
            await client.wait_ready()
            warm, finished = await complete(client, message(prompt=PROMPT))
            assert warm == cold
        assert finished.usage.cached_tokens >= 64


async def test_broken_entries_are_computed_anew(model: Path, tmp_path: Path) -> None:
    async with engine(model, tmp_path / "disk") as client:
        cold, _ = await complete(client, message(prompt=PROMPT))
    for entry in entries(tmp_path / "disk"):
        data = bytearray(entry.path.read_bytes())
        data[len(data) // 2] ^= 1
        entry.path.write_bytes(data)
    async with engine(model, tmp_path / "disk") as client:
        warm, finished = await complete(client, message(prompt=PROMPT))
    assert (warm, finished.usage.cached_tokens) == (cold, 0)


async def test_nothing_is_shared_with_another_model(model: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", "llama", seed=5)
    async with engine(model, tmp_path / "disk") as client:
        await complete(client, message(prompt=PROMPT))
    async with engine(other, tmp_path / "disk") as client:
        _, finished = await complete(client, message(prompt=PROMPT))
    assert finished.usage.cached_tokens == 0


def test_what_values_depend_on_is_in_the_key(model: Path, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(model, directory)
    (directory / "chat_template.jinja").write_text("{{ messages }}")

    def key(backend: str = "cpu", **settings: Any) -> str:
        return fingerprint(EngineConfig(model=str(directory), **settings), backend, 100)

    keys = [
        key(),
        key("cuda"),
        key("mlx-cuda"),
        key(block_size=16),
        key(precision="exact"),
        key(top_k_experts=1),
        key(isa="avx2"),
    ]
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        file = directory / name
        file.write_text(file.read_text() + " ")
        keys.append(key())
    weights = next(directory.glob("*.safetensors"))
    os.utime(weights, (1, 1))
    keys.append(key())
    assert len(set(keys)) == len(keys)
    assert key(threads=3, max_running=2, cache_bytes=1 << 20) == key() == keys[-1]


async def test_an_unusable_directory_only_turns_the_tier_off(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    async with engine(model, tmp_path / "file") as client:
        text, finished = await complete(client, message(prompt=PROMPT))
        assert text
        _, again = await complete(client, message(prompt=PROMPT))
    assert (finished.usage.cached_tokens, again.usage.cached_tokens) == (0, 149)
