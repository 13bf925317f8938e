"""The model through mlx-lm, through MLX's own operations and through our MLX kernels, on one device."""

from __future__ import annotations

import importlib.metadata
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx

from bench.gpu_report import Report
from bench.gpu_shapes import batch, config, program
from bench.gpu_weights import RandomWeights, mlx_lm_model
from mixbit.kernels.executor import CacheConfig, ExecutorOptions
from mixbit.kernels.mlx.custom.launch import Launcher
from mixbit.kernels.mlx.custom.table import custom_table
from mixbit.kernels.mlx.executor import MlxExecutor
from mixbit.kernels.mlx.operation import Table
from mixbit.kernels.mlx.stock import STOCK

CONTEXT = 64
CACHE = CacheConfig(blocks=2048, block_size=32, state_slots=16)


def measure(report: Report, part: str, layers: int) -> dict[str, str]:
    """A part of bench.gpu on MLX's GPU; returns what it ran on. Raises RuntimeError if MLX has none."""
    launcher = Launcher.of_this_machine()
    if launcher is None:
        raise RuntimeError("MLX has no GPU here")
    facts = {"device": str(mx.device_info().get("device_name")), "mlx": importlib.metadata.version("mlx")}
    if part == "operations":
        from bench import gpu_operations

        gpu_operations.measure(report, launcher)
    elif part == "mlx-lm":
        facts["mlx-lm"] = importlib.metadata.version("mlx-lm")
        peer(report, config(layers), mx.bfloat16)
    else:
        table = STOCK if part == "stock" else custom_table(launcher)
        ours(report, "stock MLX" if part == "stock" else "our MLX kernels", config(layers), table, mx.gpu)
    return facts


def seconds(run: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


Runs = tuple[tuple[int, ...], tuple[int, ...], int]
FULL: Runs = ((1, 4, 16), (512, 2048), 16)
"""Sequences decoded together, lengths of prompts, steps."""


Times = Callable[[int], list[float]]


def _record(report: Report, side: str, runs: Runs, decode: Times, prefill: Times) -> None:
    """Measure all of runs, and show each figure at once: whoever cuts a part short keeps what it has said."""
    counts, prompts, _ = runs
    for count in counts:
        name = "decode, 1" if count == 1 else f"decode, {count} in all"
        report.add(side, name, count / statistics.median(decode(count)))
    for new in prompts:
        report.add(side, f"prefill {new}", new / statistics.median(prefill(new)))


def _first(what: str, run: Callable[[], Any]) -> None:
    """Do something once that takes long the first time, since kernels are compiled, and say how long."""
    print(f"{what}: {seconds(run):.1f} s", flush=True)


def peer(report: Report, sizes: Mapping[str, Any], dtype: mx.Dtype, runs: Runs = FULL) -> None:
    """mlx-lm's model, its logits of the last token evaluated each step."""
    from mlx_lm.models.cache import make_prompt_cache

    start = time.perf_counter()
    model, vocab = mlx_lm_model(sizes, dtype), int(sizes["vocab_size"])
    print(f"mlx-lm: weights made in {time.perf_counter() - start:.1f} s", flush=True)

    def step(cache: Any, count: int, new: int) -> float:
        tokens = mx.random.randint(0, vocab, (count, new))
        mx.eval(tokens)
        return seconds(lambda: mx.eval(model(tokens, cache=cache)[:, -1]))

    def decode(count: int) -> list[float]:
        cache = make_prompt_cache(model)
        _first(f"mlx-lm: {count} x {CONTEXT} tokens", lambda: step(cache, count, CONTEXT))
        step(cache, count, 1)
        return [step(cache, count, 1) for _ in range(runs[2])]

    def prefill(new: int) -> list[float]:
        _first(f"mlx-lm: first prompt of {new}", lambda: step(make_prompt_cache(model), 1, new))
        return [step(make_prompt_cache(model), 1, new) for _ in range(3)]

    _record(report, "mlx-lm", runs, decode, prefill)


def executor(
    sizes: Mapping[str, Any], table: Table, device: mx.DeviceType, dtype: Any, cache: CacheConfig
) -> MlxExecutor:
    """Our executor with random weights made on the device."""
    options = ExecutorOptions(max_tokens=2048, dtype=dtype)
    return MlxExecutor(program(sizes), cache, options, device, table, RandomWeights)  # type: ignore[arg-type]


def ours(
    report: Report,
    side: str,
    sizes: Mapping[str, Any],
    table: Table,
    device: mx.DeviceType,
    runs: Runs = FULL,
    cache: CacheConfig = CACHE,
) -> None:
    """Tokens a second through Executor.run, logits on the host and Python included."""
    made, vocab = executor(sizes, table, device, "bfloat16", cache), int(sizes["vocab_size"])

    def step(count: int, context: int, new: int) -> float:
        given = batch(count, context, new, cache, vocab)
        return seconds(lambda: made.run(given))

    def decode(count: int) -> list[float]:
        _first(f"{side}: first step of {count}", lambda: step(count, CONTEXT, 1))
        step(count, CONTEXT, 1)  # pools are touched
        return [step(count, CONTEXT + 1 + i, 1) for i in range(runs[2])]

    def prefill(new: int) -> list[float]:
        _first(f"{side}: first prompt of {new}", lambda: step(1, 0, new))
        return [step(1, 0, new) for _ in range(3)]

    _record(report, side, runs, decode, prefill)
