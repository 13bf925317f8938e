"""Whole engines whose experts are streamed: equal texts in batches, from caches, beside aborts and faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixbit.engine.build import BuiltEngine, build
from mixbit.engine.config import EngineConfig
from mixbit.engine.convert.requantize import ConvertOptions, convert_checkpoint
from mixbit.engine.convert.widths import parse_override
from mixbit.engine.loader import load
from mixbit.engine.protocol import Delta, ExpertStats, Failed, Finished, FromWorker, Generate, Sampling
from mixbit.kernels.executor import Batch
from mixbit.kernels.experts import StreamingBackend, WeightsError
from mixbit.kernels.mlx.backend import MlxBackend, Name
from mixbit.kernels.registry import choose
from tests.checkpoints import VOCAB_SIZE, write_checkpoint

GREEDY = Sampling(temperature=0)
EXPERTS = 16


@pytest.fixture(scope="module", params=["qwen3_moe", "qwen3_next"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {"num_experts": EXPERTS, "num_experts_per_tok": 3}
    return write_checkpoint(tmp_path_factory.mktemp("models") / request.param, request.param, shards=2, config=config)


def engine(model: Path, slots: int | None, **settings: Any) -> BuiltEngine:
    """slots: experts that fit; None for the resident form."""
    device = str(settings.pop("device", "cpu"))
    backend = choose(device).backend
    assert isinstance(backend, StreamingBackend)
    least = backend.least_expert_bytes(load(model).program)
    config = EngineConfig(
        model=str(model),
        device=device,
        threads=2,
        max_running=4,
        precision="exact",
        cache_bytes=20_000_000,
        expert_bytes=None if slots is None else slots * least,
        **{"step_tokens": 64, **settings},
    )
    return build(config, lambda stage, done, total: None)


def prompt(seed: int, count: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(6, VOCAB_SIZE, count)]


def message(request_id: str, tokens: list[int], count: int = 12) -> Generate:
    return Generate(
        request_id=request_id,
        prompt=tokens,
        add_special_tokens=False,
        sampling=GREEDY,
        max_tokens=count,
        ignore_eos=True,
    )


def run(built: BuiltEngine, *messages: Generate) -> list[FromWorker]:
    core = built.core
    for each in messages:
        core.add(core.admission.admit(each))
    said: list[FromWorker] = []
    while not core.idle:
        said += core.step()
    core.scheduler.check_idle()
    return said


def texts(said: list[FromWorker]) -> dict[str, str]:
    found: dict[str, str] = {}
    for each in said:
        if isinstance(each, Delta):
            found[each.request_id] = found.get(each.request_id, "") + each.text
    return found


PROMPTS = {f"p{number}": prompt(number, length) for number, length in enumerate((150, 3, 40, 90))}


@pytest.mark.parametrize("slots", [1, 2, 5, 17, 4 * EXPERTS])
def test_texts_equal_those_of_the_resident_form(model: Path, slots: int) -> None:
    """Alone, all together, and from the prefix cache."""
    resident, streaming = engine(model, None), engine(model, slots)
    for _ in range(2):  # the second time from the prefix cache
        for name, tokens in PROMPTS.items():
            assert texts(run(streaming, message(name, tokens))) == texts(run(resident, message(name, tokens)))
    batch = [message(name, [*tokens[:7], *prompt(9, 20)]) for name, tokens in PROMPTS.items()]
    said = run(streaming, *batch)
    assert texts(said) == texts(run(resident, *batch))
    assert all(isinstance(each, Delta | Finished) for each in said)
    stats = streaming.core.stats()
    assert stats.experts.misses > 0
    assert slots < 5 or stats.experts.hits > 0
    assert streaming.ready.expert_bytes == streaming.executor.expert_bytes > 0  # type: ignore[attr-defined]
    assert (stats.fault, stats.leaks) == (None, 0)
    assert (resident.core.stats().experts, resident.ready.expert_bytes) == (ExpertStats(), 0)


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("device", ["mlx-cpu", "mlx-cuda", "metal"])
def test_texts_on_mlx_equal_those_of_the_resident_form(model: Path, device: Name, slots: int) -> None:
    """slots: twice so many in each layer."""
    reason = MlxBackend(device).unavailable()
    if reason is not None:
        pytest.skip(reason)
    resident, streaming = (engine(model, count, device=device) for count in (None, slots))
    for name, tokens in PROMPTS.items():
        assert texts(run(streaming, message(name, tokens))) == texts(run(resident, message(name, tokens)))
    stats = streaming.core.stats()
    assert stats.experts.misses > 0
    assert streaming.ready.expert_bytes > 0
    assert (stats.fault, stats.leaks) == (None, 0)


def test_an_aborted_request_changes_nothing_for_others(model: Path) -> None:
    resident, streaming = engine(model, None), engine(model, 4)
    core = streaming.core
    for name in ("p0", "p2"):
        core.add(core.admission.admit(message(name, PROMPTS[name])))
    said = [*core.step(), *core.step()]
    core.abort("p0")
    while not core.idle:
        said += core.step()
    core.scheduler.check_idle()
    assert texts(said)["p2"] == texts(run(resident, message("p2", PROMPTS["p2"])))["p2"]


def test_experts_of_two_bits_beside_routers_of_eight(tmp_path: Path, model: Path) -> None:
    """As `mixbit convert --override '*.switch_mlp.*=2'` makes them."""
    out = tmp_path / "two-bits"
    options = ConvertOptions(overrides=(parse_override("*.switch_mlp.*=2", 64),))
    convert_checkpoint(model, out, options, progress=lambda stage, done, total: None)
    widths = {path.rsplit(".", 1)[-1]: binding.scheme for path, binding in load(out).bindings.items()}
    assert [scheme.bits for name in ("gate", "down_proj") if (scheme := widths[name]) is not None] == [8, 2]
    said = texts(run(engine(out, 5), message("a", PROMPTS["p0"])))
    assert said == texts(run(engine(out, None), message("a", PROMPTS["p0"])))


class Failing:
    """An executor that cannot read the weights of sequences with a certain token."""

    def __init__(self, executor: Any, token: int) -> None:
        self._executor, self._token = executor, token

    def run(self, batch: Batch) -> Any:
        if (batch.tokens == self._token).any():
            raise WeightsError("model.safetensors: cannot be read at byte 7: Input/output error; check the disk")
        return self._executor.run(batch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)


def test_unreadable_weights_end_the_requests_that_need_them(model: Path) -> None:
    """However often: the worker goes on, tells why, and the others lose nothing."""
    built = engine(model, 8)
    runner = built.core._step.__self__  # type: ignore[attr-defined]
    runner.executor = Failing(runner.executor, token=5)
    bad = [message(f"bad{number}", [*prompt(number, 20), 5]) for number in range(5)]
    good = message("good", PROMPTS["p2"])
    said = run(built, bad[0], good, *bad[1:3])
    said += run(built, *bad[3:])
    failed = {each.request_id: each for each in said if isinstance(each, Failed)}
    assert set(failed) == {each.request_id for each in bad}
    reason = "weights cannot be read: model.safetensors: cannot be read at byte 7"
    assert all(reason in each.message for each in failed.values())
    assert texts(said)["good"] == texts(run(engine(model, None), good))["good"]
    fault = built.core.stats().fault
    assert fault is not None
    assert "byte 7" in fault
