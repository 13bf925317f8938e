"""All model files on every device here, by stock and by our kernels, in float32 and bfloat16, beside the reference.

Mixed-precision checkpoints through the real loader; a prompt in chunks, then steps. On a machine without a GPU the
CUDA and Metal columns are skipped, with the reason, and our Metal kernels run on the host. On a GPU machine
`make test-cuda` or `make test-metal` runs this file.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from mixbit.engine.loader import load
from mixbit.kernels.cuda.backend import CudaBackend
from mixbit.kernels.executor import Backend, Dtype
from mixbit.kernels.mlx.backend import MlxBackend, MlxCudaBackend
from mixbit.kernels.ops import Program
from mixbit.kernels.reference.backend import ReferenceBackend
from tests.checkpoints import CONFIGS, ROUTERS_AT_8_BITS, VOCAB_SIZE, Width, write_checkpoint
from tests.sequence import Sequence

FloatArray = npt.NDArray[np.float32]


def _metal_on_host() -> Backend:
    from tests.metal.backend import HostMetalBackend

    return HostMetalBackend()


BACKENDS: dict[str, Callable[[], Backend]] = {
    "mlx-cpu stock": lambda: MlxBackend("mlx-cpu"),
    "metal text on host": _metal_on_host,
    "metal stock": lambda: MlxBackend("metal"),
    "metal own": lambda: MlxBackend("metal", own_kernels=True),
    "mlx-cuda stock": MlxCudaBackend,
    "mlx-cuda own": lambda: MlxCudaBackend(own_kernels=True),
    "cuda": CudaBackend,
}
# Widest difference of a logit over the logits' standard deviation. CUDA's tensor cores truncate in float32.
EXACT = {"cuda": 4e-4, "metal stock": 4e-4, "metal own": 4e-4, "mlx-cuda stock": 4e-4, "mlx-cuda own": 4e-4}
# bfloat16 beside float32 arithmetic on the same weights: the median over rows of a row's root mean square, over that
# deviation. A row whose experts change by rounding is another row; one wrong width makes all of them differ by 1.
# MLX's CPU products accumulate in bfloat16: a few per cent each.
ROUNDED = {"mlx-cpu stock": 0.5, "metal text on host": 0.5}

# Every width and group size that these sizes allow, and unquantized matrices.
MIXED: dict[str, Width | None] = {
    **ROUTERS_AT_8_BITS,
    "model.embed_tokens": (8, 32),
    "lm_head": (6, 128),
    "model.layers.0.*.q_proj": (2, 32),
    "model.layers.0.*.in_proj_qkv*": (6, 32),
    "model.layers.0.mlp.up_proj": (5, 128),
    "model.layers.0.mlp.switch_mlp.up_proj": (5, 128),
    "model.layers.1.mlp.down_proj": (3, 64),
    "model.layers.1.mlp.switch_mlp.down_proj": (3, 32),
    "model.layers.1.*.v_proj": (6, 64),
    "model.layers.2.*.o_proj": None,
    "model.layers.2.mlp.gate": None,
}
ON_HOST = {("qwen3_next", "bfloat16"), ("qwen3_moe", "float32")}
TOKENS = [int(token) for token in np.random.default_rng(7).integers(0, VOCAB_SIZE, 90)]
PIECES = (2, 70, 1, 14, 1, 1, 1)  # less than the convolution's window, across a chunk of 64, single


def run(backend: Backend, program: Program, dtype: Dtype | None) -> FloatArray:
    sequence, outs, start = Sequence(backend, program, len(TOKENS), dtype=dtype), [], 0
    for size in PIECES:
        outs.append(sequence.run(TOKENS[start : start + size]))
        start += size
    assert start == len(TOKENS)
    return np.concatenate(outs)


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Program, FloatArray]]:
    """Program and the reference's logits, by model type and dtype of the checkpoint."""
    made: dict[tuple[str, str], tuple[Program, FloatArray]] = {}

    def get(model_type: str, dtype: str) -> tuple[Program, FloatArray]:
        key = model_type, dtype
        if key not in made:
            directory: Path = tmp_path_factory.mktemp(model_type)
            program = load(write_checkpoint(directory, model_type, overrides=MIXED, dtype=dtype)).program
            made[key] = program, run(ReferenceBackend(), program, None)
        return made[key]

    return get


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("model_type", CONFIGS)
def test_like_reference(
    case: Callable[[str, str], tuple[Program, FloatArray]], model_type: str, name: str, dtype: Dtype
) -> None:
    if name == "metal text on host":
        if sys.platform != "linux" or importlib.util.find_spec("ziglang") is None:
            pytest.skip("the compiler that runs Metal's text is installed on Linux, by the tests' extra")
        if (model_type, dtype) not in ON_HOST:
            pytest.skip("compiled kernel by kernel here: two models that have all of them, on the host")
    backend = BACKENDS[name]()
    reason = backend.unavailable()
    if reason is not None:
        pytest.skip(reason)
    program, expected = case(model_type, dtype)
    apart = (run(backend, program, dtype) - expected) / expected.std()
    if dtype == "float32":
        assert np.abs(apart).max() < EXACT.get(name, 1e-4)
    else:
        assert np.median(np.sqrt(np.mean(apart**2, axis=1))) < ROUNDED.get(name, 0.1)
