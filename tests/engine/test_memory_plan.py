"""What stays in memory and what is streamed, and that what was promised is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixbit.engine.build import build
from mixbit.engine.config import EngineConfig
from mixbit.engine.convert.widths import Width
from mixbit.engine.loader import LoadedModel, load
from mixbit.engine.memory_plan import MemoryPlan, plan_memory
from mixbit.engine.protocol import Generate, Sampling
from mixbit.engine.sizing import CacheError
from mixbit.engine.synth import SynthOptions, synthesize
from mixbit.kernels.cpu.backend import CpuBackend
from mixbit.kernels.executor import ExecutorOptions
from mixbit.kernels.experts import Access, ExpertMemory, expert_bytes
from mixbit.kernels.registry import choose
from tests.checkpoints import write_checkpoint, write_json

GB = 10**9
OWN = 150_000_000  # of the process, in these tests


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    directory = tmp_path_factory.mktemp("models") / "hybrid"
    return load(write_checkpoint(directory, "qwen3_next", config={"num_experts": 64}))


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("sizing", "memory_plan"):
        monkeypatch.setattr(f"mixbit.engine.{module}.available_memory", lambda: 16 * GB)
    monkeypatch.setattr("mixbit.engine.memory_plan._own_memory", lambda: OWN)


def plan(model: LoadedModel, *, weights: int | None = None, backend: str = "cpu", **settings: Any) -> MemoryPlan:
    config = EngineConfig(model="", max_running=2, **settings)
    options = ExecutorOptions(max_tokens=1)
    found = model.weight_bytes if weights is None else weights
    return plan_memory(model.program, found, config, 4096, choose(backend).backend, options)


def test_weights_that_fit_stay_where_they_are_mapped(model: LoadedModel) -> None:
    found = plan(model)
    assert (found.experts, found.step_tokens) == (None, 512)
    assert found.explanation == f"weights of {model.weight_bytes / 1e6:.1f} MB stay where they are mapped"


def test_weights_that_do_not_fit_have_their_experts_streamed(model: LoadedModel) -> None:
    """All but two megabytes of what they would need; experts get what the rest leaves."""
    weights, experts = 10 * GB, expert_bytes(model.program)
    settings: dict[str, Any] = {"step_tokens": 8, "cache_bytes": 3_000_000}
    assert plan(model, weights=weights, memory_bytes=weights + OWN + 4_000_000, **settings).experts is None
    found = plan(model, weights=weights, memory_bytes=weights + OWN + 2_000_000, **settings)
    assert found.experts is not None
    assert experts - 2_000_000 < found.experts.nbytes < experts
    assert found.step_tokens == 8
    for part in ("are streamed from disk through", "do not fit in 10.2 GB", "10.0 GB of weights stay in memory"):
        assert part in found.explanation


def test_steps_are_long_where_experts_are_streamed(model: LoadedModel) -> None:
    """As long as the context: a prompt then reads each expert once."""
    assert plan(model, expert_bytes=1_000_000).step_tokens == 4096


@pytest.mark.parametrize(
    ("experts", "slots", "access"),
    [(12, 1, "mapped"), (20, 1, "cached"), (20, 9, "direct")],
)
def test_the_page_cache_is_used_where_it_holds_all_experts_or_more_than_the_slots(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, experts: int, slots: int, access: Access
) -> None:
    """16 GB of memory are free."""
    monkeypatch.setattr("mixbit.engine.memory_plan.expert_bytes", lambda program: experts * GB)
    found = plan(model, weights=(experts + 1) * GB, expert_bytes=slots * GB)
    assert found.experts == ExpertMemory(slots * GB, access)
    way = {"mapped": "mapped from", "cached": "by way of", "direct": "past"}[access]
    assert f"through {slots}.0 GB of memory, {way} the page cache" in found.explanation


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"expert_bytes": 100}, r"leave .* for experts, of .* that were asked for or one of each size takes"),
        ({"expert_bytes": 20 * GB}, r"of 15\.0 GB of memory.*of 20\.0 GB that were asked for"),
        ({"expert_bytes": 10**6, "backend": "reference"}, "the device cannot stream them"),
    ],
)
def test_what_cannot_be_had_is_refused_with_the_numbers(
    model: LoadedModel, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(CacheError, match=message):
        plan(model, **settings)


class Card(CpuBackend):
    """A device that streams, with memory of its own."""

    def free_memory(self) -> int:
        return 8 * GB

    def value_bytes(self, dtype: str | None) -> int:
        return 2


def test_a_device_plans_with_its_own_memory(model: LoadedModel) -> None:
    """16 GB of main memory are free, 8 GB of the device, where this process has taken nothing but a margin."""

    def on_card(weights: int, **settings: Any) -> MemoryPlan:
        config = EngineConfig(model="", max_running=2, step_tokens=8, cache_bytes=3_000_000, **settings)
        return plan_memory(model.program, weights, config, 4096, Card(), ExecutorOptions(max_tokens=1))

    assert on_card(7 * GB).explanation == "weights of 7.0 GB stay on the device"
    found = on_card(7 * GB, memory_bytes=7 * GB + (256 << 20) + 2_000_000)
    assert found.experts is not None
    assert found.experts.access == "cached", "main memory is the second tier"
    assert "(the weights do not fit in 7.3 GB)" in found.explanation
    with pytest.raises(CacheError, match=r"of 7\.5 GB of memory, 9\.0 GB of weights"):
        on_card(9 * GB)


def test_a_model_without_experts_has_none_to_stream(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="the model has no experts in files"):
        plan(load(write_checkpoint(tmp_path / "dense", "llama")), expert_bytes=10**6)


def private_memory() -> int:
    """Private and locked bytes of this process."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return 1024 * sum(int(fields[name].split()[0]) for name in ("RssAnon", "VmLck"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_private_and_locked_memory_grows_by_what_was_given_whatever_the_prompt(tmp_path: Path) -> None:
    """80 MB of experts through 8 MB; prompts that need all of them, then tokens."""
    config = {
        "model_type": "qwen3_moe",
        "hidden_size": 256,
        "num_hidden_layers": 3,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "max_position_embeddings": 4096,
        "vocab_size": 384,
        "tie_word_embeddings": False,
        "num_experts": 128,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 256,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    write_json(tmp_path / "config.json", config)
    path = tmp_path / "model"
    size = synthesize(
        str(tmp_path / "config.json"), path, SynthOptions(width=Width(8, 64)), progress=lambda stage, done, total: None
    )
    assert size > 75_000_000
    given = {"expert_bytes": 8_000_000, "cache_bytes": 10_000_000}
    before = private_memory()
    built = build(
        EngineConfig(model=str(path), device="cpu", max_running=2, disk_cache=None, **given),  # type: ignore[arg-type]
        lambda stage, done, total: None,
    )
    options = ExecutorOptions(max_tokens=built.core.scheduler.step_tokens, precision="fast")
    promised = sum(given.values()) + CpuBackend().step_bytes(load(path).program, options)
    dense = built.ready.weight_bytes - expert_bytes(load(path).program)
    core, most = built.core, 0
    for number, length in enumerate((1500, 3, 1500)):
        prompt = np.random.default_rng(number).integers(6, 384, length).tolist()
        request = Generate(
            request_id=f"r{number}",
            prompt=prompt,
            add_special_tokens=False,
            sampling=Sampling(temperature=0),
            max_tokens=20,
            ignore_eos=True,
        )
        core.add(core.admission.admit(request))
        while not core.idle:
            core.step()
            most = max(most, private_memory() - before)
    assert built.core.stats().experts.misses > 1000
    assert most < promised + dense + 12_000_000  # of Python, for the engine's own objects
