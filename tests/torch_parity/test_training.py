"""The model that training/ trains is the one that this project runs: the same logits from its own checkpoint."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch  # type: ignore[import-not-found]
from safetensors.torch import save_file

from mixbit.engine.loader import load
from mixbit.kernels.registry import choose
from tests.sequence import Sequence

TRAINING = Path(__file__).parents[2] / "training"
TOLERANCE = 1e-4  # of the logits' standard deviation


@pytest.fixture(scope="module", autouse=True)
def importable() -> Any:
    sys.path.insert(0, str(TRAINING))
    yield
    sys.path.remove(str(TRAINING))


def test_logits_of_the_exported_checkpoint(tmp_path: Path) -> None:
    from model import Config, TinyCoder  # type: ignore[import-not-found]

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "full_attention_interval": 2, "num_experts": 8}
    config = Config(vocab_size=512, max_position_embeddings=128, **sizes)
    model = TinyCoder(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name:
                value.add_(0.1 * torch.randn_like(value))
            if not name.endswith("A_log"):
                value.copy_(value.bfloat16().float())  # as the checkpoint holds it
        tokens = torch.randint(0, 512, (1, 50))
        expected = model(tokens)[0][0].numpy()
    save_file(model.checkpoint(), tmp_path / "model.safetensors", metadata={"format": "mlx"})
    (tmp_path / "config.json").write_text(config.document())
    actual = Sequence(choose("cpu").backend, load(tmp_path).program, 64).run(tokens[0].tolist())
    assert np.abs(actual - expected).max() / expected.std() < TOLERANCE


def test_every_parameter_learns() -> None:
    from model import Config, TinyCoder

    torch.manual_seed(1)
    model = TinyCoder(
        Config(vocab_size=64, hidden_size=64, num_hidden_layers=4, num_experts=4, full_attention_interval=2)
    )
    tokens = torch.randint(0, 64, (2, 40))
    loss, router, counts = model(tokens, tokens)
    (loss + router).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert counts.sum().item() == 4 * 2 * 40 * 4  # layers, sequences, tokens, experts of a token


def test_a_filled_hole_is_the_text() -> None:
    from samples import MIDDLE, PREFIX, SUFFIX, arrange, pieces  # type: ignore[import-not-found]

    text, arranged = "def f(x):\n    return x + 1\n\n\nclass A:\n    pass\n" * 300, 0
    assert "".join(pieces(text)) == text
    for seed in range(200):
        made = arrange(text[:400], random.Random(seed))
        if made.startswith(PREFIX):
            arranged += 1
            before, rest = made.removeprefix(PREFIX).split(SUFFIX)
            after, middle = rest.split(MIDDLE)
            made = before + middle + after
        assert made == text[:400]
    assert 60 < arranged < 140  # half of them
