"""What only the MLX backends have: lazy import, reasons, activation dtypes, the sorted step."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

from mixbit.kernels.executor import ExecutorOptions
from mixbit.kernels.memory import OwnMemory
from mixbit.kernels.mlx import weights as weights_module
from mixbit.kernels.mlx.backend import MlxBackend, MlxCudaBackend
from mixbit.kernels.mlx.executor import activation_dtype
from mixbit.kernels.mlx.step import Step
from mixbit.kernels.mlx.weights import Weights
from mixbit.kernels.ops import ProgramBuilder
from mixbit.kernels.spec import BatchMatvecSpec
from tests.kernels.builders import CACHE, DTYPES, Sequences, Tensors, all_rows, assert_close, program_of


@pytest.mark.parametrize("name", ["metal", "mlx-cuda", "mlx-cpu"])
def test_without_mlx(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(sys, "platform", "darwin" if name == "metal" else "linux")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr("mixbit.kernels.mlx.backend.missing_driver", lambda: None)
    assert MlxBackend(name).unavailable() == "mlx is not installed"  # type: ignore[arg-type]


def test_other_platforms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    assert MlxBackend("metal").unavailable() == "this is not macOS"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert MlxBackend("mlx-cuda").unavailable() == "macOS has no CUDA"


def test_mlx_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    reason = MlxBackend("mlx-cpu").unavailable()
    assert reason is not None
    assert reason.startswith("mlx cannot be imported: ")


def test_without_a_driver_mlx_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("mixbit.kernels.mlx.backend.missing_driver", lambda: "no driver")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: pytest.fail("looked for mlx"))
    assert MlxCudaBackend().unavailable() == "no driver"


def test_a_gpu_of_mlx_counts_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What MLX keeps for its next arrays is free too."""
    monkeypatch.setattr(mx, "device_info", lambda device: {"free_memory": 1000} if device.type == mx.gpu else {})
    monkeypatch.setattr(mx, "get_cache_memory", lambda: 50)
    assert isinstance(MlxCudaBackend(), OwnMemory)
    assert MlxCudaBackend().free_memory() == 1050
    assert [MlxCudaBackend().value_bytes(dtype) for dtype in (None, "float32", "bfloat16")] == [4, 4, 2]
    assert not isinstance(MlxBackend("metal"), OwnMemory)


def test_devices_that_mlx_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixbit.kernels.mlx.backend.missing_driver", lambda: None)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: False)
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert MlxBackend("mlx-cuda").unavailable() == "mlx has no CUDA device"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert MlxBackend("metal").unavailable() == "mlx has no Metal device"
    assert MlxBackend("mlx-cpu").unavailable() is None


def test_mlx_is_imported_only_when_asked_for() -> None:
    code = "import sys; import mixbit.kernels.mlx.backend; sys.exit('mlx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_take_the_dtype_of_most_matrices(dtype: str) -> None:
    tensors, builder = Tensors(), ProgramBuilder()
    x = builder.embed(tensors.quantized(8, 64, bits=8, dtype=dtype))
    main, odd = tensors.quantized(8, 64, bits=4, dtype=dtype), tensors.dense(8, 64, dtype="float16")
    out, _ = builder.batch_matvec(x, BatchMatvecSpec(main), BatchMatvecSpec(odd))
    program = builder.build(builder.select_rows(out))
    assert activation_dtype(program, mx.gpu) == dtype
    assert activation_dtype(program, mx.cpu) == "float32"


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 5e-3), ("bfloat16", 5e-2)])
def test_activations_in_the_dtype_asked_for(dtype: str, tolerance: float) -> None:
    tensors = Tensors()
    x = tensors.values(3, 64)
    matrix = tensors.dense(16, 64)
    program = program_of(x, lambda b, value: b.batch_matvec(value, BatchMatvecSpec(matrix))[0])
    executor = MlxBackend("mlx-cpu").compile(program, CACHE, ExecutorOptions(max_tokens=8, dtype=dtype))  # type: ignore[arg-type]
    error = np.abs(executor.run(all_rows(range(3))) - x @ matrix.data.T).max()
    assert error < tolerance
    if dtype != "float32":
        assert error > 1e-5  # it did compute in the narrow dtype


@pytest.mark.parametrize("bits", [None, 1, 4])
def test_detours_that_cuda_needs_change_no_value(monkeypatch: pytest.MonkeyPatch, bits: int | None) -> None:
    """1-bit codes widened, many float32 rows with groups of 128, dense experts: as without the detours."""
    tensors = Tensors()
    single = tensors.matrix(16, 128, bits=bits, group_size=128)
    stack = tensors.matrix(4, 16, 128, bits=bits, group_size=128)
    results = []
    with mx.stream(mx.cpu):  # the detours avoid what CUDA does not do, so only another device can say what is right
        x = mx.array(tensors.values(40, 128))
        experts = mx.sort(mx.array(tensors.rng.integers(0, 4, 40)))
        for cuda in (False, True):
            monkeypatch.setattr(weights_module, "_CUDA", cuda)
            weights = Weights(mx.float32)
            one, many = weights.matrix(single), weights.matrix(stack)
            parts = (one.apply(x), one.rows(mx.array([3, 1])), many.gather(x[:, None], experts, ordered=True))
            results.append([np.array(part) for part in parts])
    for plain, detour in zip(*results, strict=True):
        assert_close(detour, plain)


def test_an_array_is_placed_once() -> None:
    table = Tensors().quantized(8, 64, bits=8, dtype="bfloat16")
    weights = Weights(mx.float32)
    first, second = weights.matrix(table), weights.matrix(table)
    assert vars(first).keys() == vars(second).keys()
    assert all(vars(first)[part] is vars(second)[part] for part in ("codes", "scales", "biases"))


def test_an_array_may_be_placed_in_several_dtypes() -> None:
    tensor = Tensors().dense(8)
    weights = Weights(mx.bfloat16)
    assert weights.vector(tensor).dtype == mx.bfloat16
    assert weights.vector(tensor, mx.float32).dtype == mx.float32


def test_step_puts_sequences_of_one_shape_together() -> None:
    sequences = Sequences(CACHE, count=4)
    sequences.step({0: range(5), 1: range(5)})
    batch = sequences.step({2: [1, 2, 3], 0: [4], 3: [5, 6, 7], 1: [8]}, logit_rows=[0, 3, 6, 7])
    step = Step.prepare(batch, CACHE.block_size)
    assert np.array(step.tokens).tolist() == [4, 8, 1, 2, 3, 5, 6, 7]
    assert np.array(step.positions).tolist() == [5, 5, 0, 1, 2, 0, 1, 2]
    assert np.array(step.logit_rows).tolist() == [2, 0, 7, 1]
    assert [(group.rows, group.new, len(group.slots)) for group in step.groups] == [
        (slice(0, 2), 1, 2),
        (slice(2, 8), 3, 2),
    ]
