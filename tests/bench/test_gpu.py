"""The GPU bench without a GPU: the table, the merged results, each side at tiny sizes, CUDA on a device that counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from bench import gpu_cuda, gpu_mlx
from bench.gpu_report import COPY, EXPERTS, MATVEC, Report
from bench.gpu_shapes import batch, config
from bench.gpu_weights import mlx_lm_model
from mixbit.kernels.executor import CacheConfig
from mixbit.kernels.mlx.custom.launch import Launcher
from mixbit.kernels.mlx.stock import STOCK
from tests.kernels.cuda.fakes import FakeDevice

TINY = {
    **config(4),
    "hidden_size": 128,
    "num_attention_heads": 4,
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "vocab_size": 256,
}
CACHE = CacheConfig(blocks=64, block_size=16, state_slots=4)


@pytest.fixture(autouse=True)
def _on_cpu() -> None:
    mx.set_default_device(mx.cpu)


def test_mlx_lm_has_our_random_weights() -> None:
    """The same names give the same values, so the logits of both are those of one model."""
    given = batch(1, 0, 9, CACHE, TINY["vocab_size"])
    ours = gpu_mlx.executor(TINY, STOCK, mx.cpu, "float32", CACHE).run(given)
    theirs = np.array(mlx_lm_model(TINY, mx.float32)(mx.array(given.tokens[None])))[0, -1]
    assert ours.std() > 0.01
    assert np.abs(ours[0] - theirs).max() < 1e-4 * theirs.std()


def test_both_sides_fill_the_same_rows() -> None:
    report, runs = Report(), ((1, 2), (8,), 2)
    gpu_mlx.peer(report, TINY, mx.float32, runs)
    gpu_mlx.ours(report, "stock MLX", TINY, STOCK, mx.cpu, runs, CACHE)
    assert report.results.keys() == {"decode, 1", "decode, 2 in all", "prefill 8"}
    for sides in report.results.values():
        assert sides.keys() == {"mlx-lm", "stock MLX"}
        assert min(sides.values()) > 0


class _Names:
    def compile(self, sources: Any, progress: Any = None) -> list[bytes]:
        return [source.file.encode() for source in sources]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    from mixbit.kernels.cuda import plan, prefill_attention, prefill_delta, prefill_linear, prefill_moe, prefill_rows

    class Graph(tuple[Any, ...]):
        __slots__ = ()

        @property
        def launches(self) -> tuple[Any, ...]:
            return self

    class Device(FakeDevice):
        def capture(self, launches: Any) -> Any:
            return Graph(super().capture(launches))

    for module in (plan, prefill_attention, prefill_delta, prefill_linear, prefill_moe, prefill_rows):
        monkeypatch.setattr(module, "Launch", lambda *arguments, early=False: arguments)
    monkeypatch.setattr(gpu_cuda, "_PIECE", 1 << 16)
    monkeypatch.setattr(gpu_cuda, "PROMPTS", (64, 128))
    return Device()


def test_cuda_part_on_a_device_that_counts(device: Any) -> None:
    """All but the kernels themselves: a millisecond for all that is asked of the device."""
    report, compiler = Report(), _Names()
    gpu_cuda.plain_product(report, device, compiler, ((64, 128, 4, 1),))  # type: ignore[arg-type]
    gpu_cuda.model(report, device, compiler, TINY, bandwidth=1000.0, steps=2)  # type: ignore[arg-type]
    report.add("CUDA backend", COPY, gpu_cuda.copy_bandwidth(device, 1 << 12))
    assert report.results.keys() == {
        *("decode, 1", "decode, 4 in all", "decode, 16 in all", "prefill 64", "prefill 128", MATVEC, EXPERTS, COPY)
    }
    step = report.steps["decode, 1"]
    assert step["launches"] == sum(row["launches"] for row in step["kernels"])
    floors = {row["kernel"]: row["floor_us"] for row in step["kernels"]}
    hidden, project = floors["experts_hidden of moe"], floors["experts_project of moe"]
    assert hidden == pytest.approx(2 * project)
    assert hidden == pytest.approx((4 + 1) * 2 * 64 * 128 * 4.5 / 8 / 1000 / 1e3)
    assert floors["delta of gated_delta"] == pytest.approx(2 * 4 * 4 * 32 * 32 / 1000 / 1e3)


def test_parts_are_merged_in_one_file(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    for side, work, value in (
        ("mlx-lm", "decode, 1", 28.0),
        ("CUDA backend", "decode, 1", 457.0),
        ("stock MLX", "decode, 1", 31.0),
        ("CUDA backend", "prefill 2048", 37068.0),
        ("CUDA backend", EXPERTS, 13.2),
        ("CUDA backend", MATVEC, 1690.0),
        ("CUDA backend", COPY, 4300.0),
    ):
        report = Report(parts={side: {"device": "a GPU"}})
        report.add(side, work, value)
        report.save(file)
    lines = list(Report.load(file).lines())
    assert "| decode, 1 | tok/s | 28.0 | 31.0 |  | 457.0 | 285 | 650 | met |" in lines
    assert "| prefill 2048 | tok/s |  |  |  | 37,068.0 | 6,200 | 20,000 | aim met |" in lines
    assert f"| {EXPERTS} | us |  |  |  | 13.2 | 25 | 8 | met |" in lines
    assert f"| {MATVEC} | GB/s |  |  |  | 1,690.0 | 1,800 | 3,440 | missed |" in lines
    assert "CUDA backend: device a GPU" in lines


def test_without_a_gpu_the_parts_fail_by_name() -> None:
    if Launcher.of_this_machine() is not None:
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match="MLX has no GPU here"):
        gpu_mlx.measure(Report(), "stock", 1)
