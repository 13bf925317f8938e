"""The choice of a backend, and its explanation."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

from mixbit.kernels import registry
from mixbit.kernels.executor import CacheConfig, Executor, ExecutorOptions
from mixbit.kernels.ops import Program
from mixbit.kernels.registry import BackendError, availability, choose


@dataclass(frozen=True)
class Fake:
    name: str
    reason: str | None

    def unavailable(self) -> str | None:
        return self.reason

    def describe(self) -> str:
        return f"fake {self.name}"

    def compile(self, program: Program, cache: CacheConfig, options: ExecutorOptions) -> Executor:
        raise NotImplementedError


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    backends = (Fake("metal", "this is not macOS"), Fake("cuda", "mlx is not installed"), Fake("cpu", None))
    monkeypatch.setattr(registry, "_BACKENDS", backends)
    monkeypatch.setattr(registry, "_ONLY_BY_NAME", (Fake("slow", None),))


@pytest.mark.usefixtures("fakes")
def test_auto_takes_the_first_that_runs_and_says_why() -> None:
    choice = choose()
    assert choice.backend.name == "cpu"
    assert str(choice) == "metal: this is not macOS; cuda: mlx is not installed; using cpu: fake cpu"


@pytest.mark.usefixtures("fakes")
def test_by_name() -> None:
    assert str(choose("slow")) == "using slow: fake slow"
    assert choose("cpu").rejected == ()


@pytest.mark.usefixtures("fakes")
def test_device_that_cannot_run_here() -> None:
    with pytest.raises(BackendError, match="'cuda' cannot be used here: mlx is not installed"):
        choose("cuda")


@pytest.mark.usefixtures("fakes")
def test_unknown_device_lists_the_known() -> None:
    with pytest.raises(BackendError, match=r"unknown device 'tpu'; choose one of: auto, metal, cuda, mlx-cuda, cpu"):
        choose("tpu")


def test_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_BACKENDS", (Fake("metal", "no mac"), Fake("cpu", "no cores")))
    with pytest.raises(BackendError, match="no backend can run here: metal: no mac; cpu: no cores"):
        choose()


@pytest.mark.usefixtures("fakes")
def test_availability_covers_what_auto_considers() -> None:
    assert availability() == (("metal", "this is not macOS"), ("cuda", "mlx is not installed"), ("cpu", None))


@pytest.mark.parametrize("device", registry.DEVICES)
def test_real_backends_explain_themselves(device: str) -> None:
    """Every device that can be named either runs here or says why not."""
    reasons = {backend.name: backend.unavailable() for backend in (*registry._BACKENDS, *registry._ONLY_BY_NAME)}
    reason = reasons.get(device)
    if reason is None:
        choice = choose(device)
        assert choice.backend.describe()
        assert device in ("auto", choice.backend.name)
    else:
        with pytest.raises(BackendError, match=re.escape(f"device {device!r} cannot be used here: {reason}")):
            choose(device)


def test_cpu_always_runs() -> None:
    assert choose("cpu").backend.unavailable() is None


@pytest.mark.usefixtures("fakes")
def test_stock_kernels_replace_ours_on_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_STOCK", {"cuda": Fake("mlx-cuda", None)})
    assert choose().backend.name == "cpu"
    assert choose(kernels="stock").backend.name == "mlx-cuda"
    assert choose("cpu", "stock").backend.name == "cpu"
    assert choose("cuda", "stock").backend.name == "mlx-cuda"
    with pytest.raises(BackendError, match="unknown device 'mlx-cuda'"):
        choose("mlx-cuda", "stock")


def test_backends_that_keep_values_in_other_orders_have_names_of_their_own() -> None:
    """A disk cache is named after its backend: what one has written is never read by another."""
    mine, stock = {backend.name: type(backend) for backend in registry._BACKENDS}, registry._STOCK
    assert len({*registry.DEVICES}) == len(registry.DEVICES)
    for device, backend in stock.items():
        assert (backend.name == device) == (type(backend) is mine[device])
