"""Random checkpoints: the tensors of the model, at the widths asked for, in bounded memory, ready to serve."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixbit.engine.convert.widths import Width, parse_override
from mixbit.engine.errors import UserError
from mixbit.engine.loader import load
from mixbit.engine.synth import Skew, SynthError, SynthOptions, sizes_of, synthesize, tensor_shapes
from mixbit.engine.synth_sizes import SIZES
from mixbit.engine.tokenizer import load_tokenizer
from mixbit.kernels.ops import Moe
from mixbit.kernels.quantize import dequantize
from mixbit.kernels.spec import QuantizedTensor
from tests.checkpoints import CONFIGS, write_checkpoint


def quiet(stage: str, done: int, total: int) -> None:
    pass


def config_file(path: Path, model_type: str, **changes: Any) -> str:
    path.write_text(json.dumps({"model_type": model_type, **CONFIGS[model_type], **changes}))
    return str(path)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_every_architecture_is_written_as_its_checkpoints_are(model_type: str, tmp_path: Path) -> None:
    """Names, shapes and widths equal those of a checkpoint that was written from a list of its own."""
    expected = load(write_checkpoint(tmp_path / "real", model_type, dtype="bfloat16", vision=False))
    synthesize(config_file(tmp_path / "c.json", model_type), tmp_path / "out", SynthOptions(), progress=quiet)
    model = load(tmp_path / "out")

    def stored(of: Any) -> dict[str, Any]:
        return {name: (tensor.dtype, tensor.shape) for name, tensor in of.checkpoint.tensors.items()}

    decay = {name: kind for name, kind in stored(model).items() if name.endswith("A_log")}
    assert {dtype for dtype, _ in decay.values()} <= {"F32"}
    assert stored(model) | decay == stored(expected) | decay
    assert {path: each.scheme for path, each in model.bindings.items()} == {
        path: each.scheme for path, each in expected.bindings.items()
    }


def test_values_are_spread_as_weights_are(tmp_path: Path) -> None:
    synthesize(config_file(tmp_path / "c.json", "llama"), tmp_path / "out", SynthOptions(), progress=quiet)
    model = load(tmp_path / "out")
    head = model.program.nodes[-1].specs[0].matrix  # type: ignore[union-attr]
    assert isinstance(head, QuantizedTensor)
    values = dequantize(head)
    assert abs(values.mean()) < 0.01
    assert values.std() == pytest.approx(1.5 / math.sqrt(128), rel=0.1)
    assert len(np.unique(head.scales)) > 10


def test_the_same_seed_gives_the_same_tensor_whatever_else_is_written(tmp_path: Path) -> None:
    like = config_file(tmp_path / "c.json", "qwen3_moe")

    def scales(name: str, **options: Any) -> Any:
        synthesize(like, tmp_path / name, SynthOptions(**options), progress=quiet)
        return load(tmp_path / name).checkpoint.tensors["model.layers.0.mlp.gate.scales"].array().astype(np.float32)

    first = scales("a")
    assert np.array_equal(first, scales("b", layers=1))
    assert not np.array_equal(first, scales("c", seed=1))


def test_widths_and_layers_as_asked(tmp_path: Path) -> None:
    options = SynthOptions(layers=2, width=Width(3, 32), overrides=(parse_override("*.switch_mlp.*=2:64"),))
    synthesize(config_file(tmp_path / "c.json", "qwen3_next"), tmp_path / "out", options, progress=quiet)
    model = load(tmp_path / "out")
    widths = {path: each.scheme and (each.scheme.bits, each.scheme.group_size) for path, each in model.bindings.items()}
    assert widths["model.layers.1.mlp.switch_mlp.up_proj"] == (2, 64)
    assert widths["model.layers.1.mlp.gate"] == (8, 64)
    assert widths["model.layers.1.self_attn.q_proj"] == (3, 32)
    assert not [path for path in widths if path.startswith("model.layers.2.")]
    synthesize(config_file(tmp_path / "c.json", "llama"), tmp_path / "dense", SynthOptions(width=None), progress=quiet)
    assert {each.scheme for each in load(tmp_path / "dense").bindings.values()} == {None}


def test_the_tokenizer_reaches_every_token(tmp_path: Path) -> None:
    like = config_file(tmp_path / "c.json", "llama", vocab_size=12_000)
    synthesize(like, tmp_path / "out", SynthOptions(layers=1), progress=quiet)
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.vocab_size == 12_000
    assert len({tokenizer.token_bytes(token) for token in range(12_000)}) == 12_000
    text = "Grüße, <|im_start|>world\n"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.added_token("<|im_end|>") in tokenizer.eos_ids


def test_real_sizes() -> None:
    """Known figures: 80 and 30.5 billion weights; one expert of Qwen3-Next is 1,769,472 bytes at 4 bits."""

    def weights(name: str) -> float:
        return sum(math.prod(shape) for shape in tensor_shapes(sizes_of(name)).values()) / 1e9

    assert weights("qwen3-coder-next") == pytest.approx(79.7, abs=0.2)
    assert weights("qwen3-30b-a3b") == pytest.approx(30.5, abs=0.1)
    assert weights("qwen3-0.6b") == pytest.approx(0.596, abs=0.002)
    assert weights("smollm2-135m") == pytest.approx(0.1345, abs=0.0002)
    experts = [shape for path, shape in tensor_shapes(sizes_of("qwen3-coder-next", 1)).items() if "switch_mlp" in path]
    assert sum(math.prod(shape[1:]) * 9 // 16 for shape in experts) == 1_769_472
    assert set(SIZES) >= {"qwen3-coder-next"}


def test_refusals(tmp_path: Path) -> None:
    def attempt(like: str, **options: Any) -> None:
        synthesize(like, tmp_path / "out", SynthOptions(**options), progress=quiet)

    with pytest.raises(SynthError, match=r"'gpt-5' is neither a config.json nor one of: qwen3-coder-next"):
        attempt("gpt-5")
    (tmp_path / "m.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(SynthError, match="model_type 'mamba' is not one of"):
        attempt(str(tmp_path / "m.json"))
    with pytest.raises(SynthError, match=r"override '\*.gates' matches no matrix; there is, for example: model"):
        attempt(config_file(tmp_path / "c.json", "llama"), overrides=(parse_override("*.gates=8"),))
    with pytest.raises(UserError, match="vocab_size is 100; a tokenizer of bytes needs 259"):
        attempt(config_file(tmp_path / "c.json", "llama", vocab_size=100))
    with pytest.raises(SynthError, match=r"the checkpoint takes .* GB; .* has .* GB free"):
        attempt("qwen3-coder-next", layers=9_999)
    assert not (tmp_path / "out").exists()


def test_routing_is_skewed_as_asked(tmp_path: Path) -> None:
    """Of normal inputs, seven in ten picks fall on a fifth of the experts, which differ from layer to layer."""
    sizes = {"num_experts": 200, "num_experts_per_tok": 4, "hidden_size": 512}
    config = config_file(tmp_path / "c.json", "qwen3_moe", **sizes)
    synthesize(config, tmp_path / "out", SynthOptions(skew=Skew(0.7, 0.2), seed=3), progress=quiet)
    inputs = np.random.default_rng(0).standard_normal((2000, 512)).astype(np.float32)
    favoured = []
    for node in load(tmp_path / "out").program.nodes:
        if isinstance(node, Moe):
            assert isinstance(node.spec.router, QuantizedTensor)
            logits = inputs @ dequantize(node.spec.router).T
            picks = np.bincount(np.argsort(logits, axis=1)[:, -4:].ravel(), minlength=200)
            assert np.sort(picks)[-40:].sum() / picks.sum() == pytest.approx(0.7, abs=0.06)
            favoured.append(frozenset(np.argsort(picks)[-20:].tolist()))
    assert len(set(favoured)) == len(favoured) == 3


@pytest.mark.parametrize(
    ("model_type", "skew", "message"),
    [
        ("llama", Skew(0.7, 0.2), "has no experts"),
        ("qwen3_moe", Skew(0.9, 0.2), "90% of the picks cannot fall on 20% of the experts where 3 of 8 are chosen"),
    ],
)
def test_a_skew_that_cannot_be_had_is_refused(tmp_path: Path, model_type: str, skew: Skew, message: str) -> None:
    with pytest.raises(SynthError, match=message):
        synthesize(
            config_file(tmp_path / "c.json", model_type), tmp_path / "out", SynthOptions(skew=skew), progress=quiet
        )
