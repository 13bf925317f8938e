"""Settings of the engine."""

from __future__ import annotations

import msgspec
import pytest

from mixbit.engine.config import ConfigError, EngineConfig


def test_a_config_survives_the_way_to_the_worker() -> None:
    config = EngineConfig(model="/a/model", threads=3, cache_bytes=10**12, dtype="bfloat16", profile=True)
    assert msgspec.json.decode(msgspec.json.encode(config), type=EngineConfig) == config
    assert config.check() is config


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"threads": -1}, "threads is -1"),
        ({"max_running": 0}, "max_running is 0"),
        ({"max_queue": -1}, "max_queue is -1"),
        ({"context_length": 0}, "context_length is 0"),
        ({"cache_bytes": 0}, "cache_bytes is 0"),
        ({"block_size": 0}, "block_size is 0"),
        ({"top_k_experts": 0}, "top_k_experts is 0"),
        ({"step_tokens": 8, "max_running": 9}, "step_tokens is 8, below max_running 9"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
    ],
)
def test_values_out_of_range_are_named(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        EngineConfig(model="m", **settings).check()  # type: ignore[arg-type]
