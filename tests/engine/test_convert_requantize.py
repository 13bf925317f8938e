"""Conversion of safetensors checkpoints: widths, copies, layouts of transformers, and what is left behind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import dequantize_model, load_model

from mixbit.engine.convert.errors import ConvertError
from mixbit.engine.convert.requantize import ConvertOptions, convert_checkpoint
from mixbit.engine.convert.widths import Width, parse_override
from mixbit.engine.errors import UserError
from mixbit.engine.loader import LoadedModel, load
from mixbit.engine.safetensors import open_safetensors
from mixbit.kernels.quantize import dequantize, quantize
from mixbit.kernels.spec import QuantizedTensor
from tests.checkpoints import CONFIGS, random_tensors, write_checkpoint, write_json, write_safetensors

Arrays = dict[str, npt.NDArray[Any]]
FAMILIES = list(CONFIGS)
Q4 = Width(4, 64)


def quiet(stage: str, done: int, total: int) -> None:
    pass


def convert(source: Path, *overrides: str, width: Width | None = None, dtype: str | None = None, **rest: Any) -> Path:
    out = source.parent / "out"
    options = ConvertOptions(width, tuple(parse_override(text) for text in overrides), dtype)
    convert_checkpoint(source, out, options, progress=quiet, **rest)
    return out


def tensors_of(path: Path) -> Arrays:
    return {
        name: tensor.array()
        for file in sorted(path.glob("*.safetensors"))
        for name, tensor in open_safetensors(file).items()
    }


def widths_of(model: LoadedModel) -> dict[str, tuple[int, int] | None]:
    return {
        path: None if binding.scheme is None else (binding.scheme.bits, binding.scheme.group_size)
        for path, binding in model.bindings.items()
    }


def write_transformers(directory: Path, model_type: str, *, fused: bool) -> tuple[Path, Arrays]:
    """A random checkpoint in the layout of transformers, and the tensors of MLX's layout that it stands for."""
    directory.mkdir()
    config = CONFIGS[model_type]
    hybrid = "full_attention_interval" in config
    vision = model_type.startswith("qwen3_5")
    stored: Arrays = {}
    expected = random_tensors(model_type, config, seed=3)
    for name, values in expected.items():
        prefix = "model.language_model." if vision and name.startswith("model.") else ""
        path = prefix + name.removeprefix("model.") if prefix else name
        if ".switch_mlp." in name:
            base, part = path.removesuffix(".weight").split(".switch_mlp.")
            if not fused:
                stored |= {f"{base}.experts.{e}.{part}.weight": values[e] for e in range(len(values))}
            elif part == "gate_proj":
                up = expected[name.replace("gate_proj", "up_proj")]
                stored[f"{base}.experts.gate_up_proj"] = np.concatenate([values, up], axis=1)
            elif part == "down_proj":
                stored[f"{base}.experts.down_proj"] = values
        elif "conv1d" in name:
            stored[path] = values.transpose(0, 2, 1)
        elif hybrid and name.endswith("norm.weight") and "linear_attn" not in name:
            stored[path] = values - np.float32(1)
        else:
            stored[path] = values
    if hybrid:
        stored["mtp.fc.weight"] = np.ones((2, 2), np.float32)
    if vision:
        stored["model.visual.patch_embed.weight"] = np.ones((2, 2), np.float32)
    write_safetensors(directory / "model.safetensors", {k: np.ascontiguousarray(v) for k, v in stored.items()})
    document: dict[str, Any] = {"model_type": model_type}
    if vision:
        document |= {"text_config": dict(config), "vision_config": {}, "auto_map": {"AutoModel": "modeling.Evil"}}
    else:
        document |= config
    write_json(directory / "config.json", document)
    return directory, expected


@pytest.mark.parametrize("model_type", FAMILIES)
def test_without_options_everything_is_copied(model_type: str, tmp_path: Path) -> None:
    source = write_checkpoint(
        tmp_path / "in", model_type, overrides={"*.mlp.gate": (8, 64), "*.1.*.down_proj": (3, 32)}
    )
    out = convert(source)
    before, after = tensors_of(source), tensors_of(out)
    assert {n for n in before if "vision" not in n} == set(after)
    for name, values in after.items():
        np.testing.assert_array_equal(values, before[name], err_msg=name)
    assert widths_of(load(out)) == widths_of(load(source))
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_bits_apply_to_every_matrix_and_routers_stay_at_eight(model_type: str, tmp_path: Path) -> None:
    out = convert(write_checkpoint(tmp_path / "in", model_type, bits=None), width=Q4)
    widths = widths_of(load(out))
    for path, width in widths.items():
        at_8 = path.endswith((".mlp.gate", ".shared_expert_gate"))
        assert width == ((8, 64) if at_8 else (4, 64)), path
    config = json.loads((out / "config.json").read_text())
    prefix = "language_model." if model_type.startswith("qwen3_5") else ""
    assert config["quantization"]["bits"] == 4
    assert {key for key in config["quantization"] if "." in key} == {
        prefix + path for path, width in widths.items() if width == (8, 64)
    }


@pytest.mark.parametrize("model_type", FAMILIES)
def test_mlx_lm_loads_the_result_with_the_same_values(model_type: str, tmp_path: Path) -> None:
    """mlx-lm is the second reader: its dequantized weights against ours, to float32's last bits."""
    mx.set_default_device(mx.cpu)
    source, _ = write_transformers(tmp_path / "in", model_type, fused=model_type != "qwen3_next")
    out = convert(source, "*.v_proj=3:32", "*.down_proj=2:32", "*.k_proj=none", width=Q4)
    ours = tensors_of(out)
    model, _ = load_model(out, strict=True)
    theirs = dict(tree_flatten(dequantize_model(model).parameters()))
    section = json.loads((out / "config.json").read_text())["quantization"]
    names = {name for name in ours if not name.endswith((".scales", ".biases"))}
    assert set(theirs) == names
    for name in names:
        module = name.rpartition(".")[0]
        values = ours[name]
        if name == f"{module}.weight" and f"{module}.scales" in ours:
            width = section.get(module) or section
            scales, biases = ours[f"{module}.scales"], ours[f"{module}.biases"]
            values = dequantize(
                QuantizedTensor(module, values, scales, biases, width["bits"], width["group_size"], "affine")
            )
        np.testing.assert_allclose(np.array(theirs[name]), values, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("fused", [False, True], ids=["experts", "fused"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen3_next", "qwen3_5", "qwen3_5_moe"])
def test_layout_of_transformers_becomes_that_of_mlx(model_type: str, fused: bool, tmp_path: Path) -> None:
    source, expected = write_transformers(tmp_path / "in", model_type, fused=fused)
    out = convert(source)
    prefix = "language_model." if model_type.startswith("qwen3_5") else ""
    stored = tensors_of(out)
    assert set(stored) == {prefix + name for name in expected}
    for name, values in expected.items():
        np.testing.assert_allclose(stored[prefix + name], values, rtol=0, atol=1e-6, err_msg=name)
    config = json.loads((out / "config.json").read_text())
    assert not {"vision_config", "auto_map", "quantization", "quantization_config"} & config.keys()
    load(out)


def test_quantizing_a_transformers_checkpoint_gives_the_codes_of_the_quantizer(tmp_path: Path) -> None:
    source, expected = write_transformers(tmp_path / "in", "qwen3_moe", fused=False)
    stored = tensors_of(convert(source, width=Width(3, 32), shard_bytes=200_000))
    for module in ("model.layers.0.mlp.switch_mlp.up_proj", "model.layers.2.self_attn.q_proj", "lm_head"):
        packed, scales, biases = quantize(expected[f"{module}.weight"], 3, 32)
        np.testing.assert_array_equal(stored[f"{module}.weight"], packed)
        np.testing.assert_array_equal(stored[f"{module}.scales"], scales)
        np.testing.assert_array_equal(stored[f"{module}.biases"], biases)


def test_overrides_the_last_match_counts_and_the_rest_is_untouched(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", "qwen3_moe")
    out = convert(source, "*.switch_mlp.*=2:32", "*.0.mlp.switch_mlp.*=6", "*.o_proj=none")
    before, after = widths_of(load(source)), widths_of(load(out))
    for path, width in after.items():
        if "switch_mlp" in path:
            assert width == ((6, 64) if ".0.mlp." in path else (2, 32)), path
        elif path.endswith("o_proj"):
            assert width is None
        else:
            assert width == before[path]
    assert np.array_equal(tensors_of(out)["lm_head.weight"], tensors_of(source)["lm_head.weight"])
    assert json.loads((out / "config.json").read_text())["quantization"]["model.layers.0.self_attn.o_proj"] is False


def test_rows_that_do_not_divide_stay_unquantized_unless_asked_for(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", "llama", bits=None, config={"intermediate_size": 160})
    widths = widths_of(load(convert(source, width=Q4)))
    assert widths["model.layers.0.mlp.down_proj"] is None
    assert widths["model.layers.0.mlp.up_proj"] == (4, 64)
    with pytest.raises(ConvertError, match=r"down_proj: rows of 160 values do not divide into groups of 64"):
        convert(source, "*.down_proj=4:64", force=True)


def test_dtype_applies_to_dense_tensors_and_scales(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", "qwen3_next")
    stored = tensors_of(convert(source, dtype="bfloat16"))
    assert stored["model.norm.weight"].dtype == ml_dtypes.bfloat16
    assert stored["lm_head.scales"].dtype == stored["lm_head.biases"].dtype == ml_dtypes.bfloat16
    assert stored["model.layers.0.linear_attn.A_log"].dtype == np.float32
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_tied_heads_are_dropped(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", "qwen3", bits=None, config={"tie_word_embeddings": True})
    tensors = tensors_of(source)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write_safetensors(source / "model.safetensors", tensors)
    assert not [name for name in tensors_of(convert(source, width=Q4)) if name.startswith("lm_head")]


def test_only_known_files_are_copied(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", "llama")
    for name in ("modeling_evil.py", "pytorch_model.bin", "notes.json", "chat_template.jinja"):
        (source / name).write_text("x")
    out = convert(source)
    assert {file.name for file in out.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }


REFUSALS: list[tuple[Mapping[str, Any], str]] = [
    ({"config": {"model_type": "gpt_neox"}}, "model_type 'gpt_neox' cannot be converted; supported: llama"),
    ({"config": {"quantization_config": {"quant_method": "gptq"}}}, "quantized by 'gptq'"),
    ({"overrides": ["*.experts.*=2"]}, "override '*.experts.*' matches no matrix; there are, for example: model."),
]


@pytest.mark.parametrize(("case", "message"), REFUSALS)
def test_refusals(case: Mapping[str, Any], message: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", "llama", bits=None)
    path = source / "config.json"
    write_json(path, json.loads(path.read_text()) | case.get("config", {}))
    with pytest.raises(UserError) as error:
        convert(source, *case.get("overrides", []), width=Q4)
    assert message in str(error.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["in"]


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    source, _ = write_transformers(tmp_path / "in", "qwen3_moe", fused=False)
    tensors = tensors_of(source)
    del tensors["model.layers.0.mlp.experts.5.up_proj.weight"]
    write_safetensors(source / "model.safetensors", tensors)
    with pytest.raises(ConvertError, match=r"model\.layers\.0\.mlp\.experts\.5\.up_proj\.weight is missing"):
        convert(source)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("experts", "expected GLOB=BITS"),
        ("*=", "is not BITS"),
        ("*=four", "is not BITS"),
        ("*=4:x", "is not BITS"),
        ("*=7", "7 bits: choose one of 1, 2, 3, 4, 5, 6, 8"),
        ("*=4:16", "group size 16: choose one of 32, 64, 128"),
    ],
)
def test_bad_overrides(text: str, message: str) -> None:
    with pytest.raises(ConvertError) as error:
        parse_override(text)
    assert message in str(error.value)
