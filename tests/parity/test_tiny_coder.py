"""The model that ships with Mixbit: its real weights against mlx-lm in float32, and every kernel table on it.

A random checkpoint of the same form stands beside it, so that these tests run where the weights are not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model
from tokenizers import Tokenizer

from mixbit.engine.inspection import inspect_model
from mixbit.engine.loader import load
from mixbit.engine.routing import expert_load
from mixbit.engine.shipped import CODER, shipped_model
from mixbit.kernels.registry import DEVICES, BackendError, choose
from tests.checkpoints import ROUTERS_AT_8_BITS, write_checkpoint
from tests.sequence import Sequence

TOLERANCE = 1e-4  # of the logits' standard deviation, in float32
NARROW = 0.1  # where activations are bfloat16
TEXT = Path(__file__).read_text()
MEGABYTES = 32

weights_there = pytest.mark.skipif(shipped_model(CODER) is None, reason=f"models/{CODER} is not in this checkout")


@pytest.fixture(scope="module", params=["random", pytest.param("shipped", marks=weights_there)])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "shipped":
        path = shipped_model(CODER)
        assert path is not None
        return path
    config = {"tie_word_embeddings": True, "norm_topk_prob": True, "full_attention_interval": 4}
    directory = tmp_path_factory.mktemp("random") / CODER
    return write_checkpoint(directory, "qwen3_next", config=config, overrides=ROUTERS_AT_8_BITS)


@pytest.fixture(scope="module")
def tokens(checkpoint: Path) -> list[int]:
    return list(Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(TEXT[:300]).ids)[:64]


@pytest.fixture(scope="module")
def expected(checkpoint: Path, tokens: list[int]) -> Any:
    with mx.stream(mx.cpu):
        model, _ = load_model(checkpoint)
        model.set_dtype(mx.float32)
        return np.array(model(mx.array([tokens]))[0])


@pytest.mark.parametrize("backend", [name for name in DEVICES if name != "auto"])
def test_every_kernel_table_agrees_with_mlx_lm(
    checkpoint: Path, tokens: list[int], expected: Any, backend: str
) -> None:
    try:
        table = choose(backend).backend
    except BackendError as error:
        pytest.skip(str(error))
    actual = Sequence(table, load(checkpoint).program, len(tokens)).run(tokens)
    exact = backend in {"reference", "cpu", "mlx-cpu"}
    assert np.abs(actual - expected).max() / expected.std() < (TOLERANCE if exact else NARROW)


@weights_there
def test_what_ships_is_as_said() -> None:
    path = shipped_model(CODER)
    assert path is not None
    assert sum(file.stat().st_size for file in path.iterdir()) <= MEGABYTES * 1_000_000
    report = inspect_model(path)
    bits = {each.role: each.bits for each in report.classes if each.bits is not None}
    assert {bits["router"], bits["shared gate"]} == {8}
    assert {width for role, width in bits.items() if "gate" not in role and role != "router"} == {4}
    assert report.context_length == 2048
    for name in ("generation_config.json", "tokenizer.json", "README.md", "loss.png"):
        assert (path / name).is_file(), name


@weights_there
def test_no_expert_is_dead() -> None:
    path = shipped_model(CODER)
    assert path is not None
    sources = "".join(source.read_text() for source in sorted(Path(json.__file__).parent.glob("*.py")))
    assert expert_load(path, sources, 2048).dead == []
