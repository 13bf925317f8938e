"""GGUF import: values bit for bit, names, config, refusals, and nothing half-made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from gguf.constants import GGMLQuantizationType as Type
from safetensors.numpy import load_file

from mixbit.engine.convert.errors import ConvertError
from mixbit.engine.convert.gguf_file import read_gguf
from mixbit.engine.convert.gguf_import import import_gguf
from mixbit.engine.demo import demo_gguf
from mixbit.kernels.reference.matrix import dequantize
from mixbit.kernels.spec import QuantizedTensor
from tests.engine.gguf_models import EXPERTS, HEAD_DIM, HEADS, KV_HEADS, TinyGguf, patch_block_scales

F32 = npt.NDArray[np.float32]


def quiet(stage: str, done: int, total: int) -> None:
    pass


def convert(model: TinyGguf, tmp_path: Path, **options: Any) -> Path:
    out = tmp_path / "out"
    import_gguf(model.write(tmp_path / "in.gguf"), out, progress=quiet, **options)
    return out


def tensors_of(path: Path) -> dict[str, npt.NDArray[Any]]:
    tensors: dict[str, npt.NDArray[Any]] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def config_of(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((path / "config.json").read_text())
    return config


def decode(tensors: dict[str, npt.NDArray[Any]], config: dict[str, Any], module: str) -> F32:
    """The module's values as a reader of the MLX format sees them, in float32: scale * code + bias."""
    weight = tensors[f"{module}.weight"]
    if f"{module}.scales" not in tensors:
        return weight.astype(np.float32)
    section = config["quantization"]
    scheme = section.get(module) or section
    return dequantize(
        QuantizedTensor(
            module,
            weight,
            tensors[f"{module}.scales"],
            tensors[f"{module}.biases"],
            scheme["bits"],
            scheme["group_size"],
            "affine",
        )
    )


def half_split(rows: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Interleaved RoPE rows (2i, 2i + 1) to half-split rows (i, i + d/2), spelled out."""
    out = np.empty_like(rows)
    size = len(rows) // heads
    for head in range(heads):
        for i in range(size // 2):
            out[head * size + i] = rows[head * size + 2 * i]
            out[head * size + size // 2 + i] = rows[head * size + 2 * i + 1]
    return out


def assert_same_bits(ours: F32, theirs: F32, name: str, signed_zeros: bool) -> None:
    """Equal bit patterns. Without signed_zeros, -0 counts as 0: scale * code + bias has no negative zero."""
    if not signed_zeros:
        ours, theirs = ours + np.float32(0), theirs + np.float32(0)
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32), err_msg=name)


def test_smollm2_dequantizes_to_the_same_values_bit_for_bit(demo_checkpoint: Path) -> None:
    """Every tensor: `gguf`'s own dequantization to float32, against ours of the checkpoint to float32."""
    with demo_gguf(quiet) as path:
        source = read_gguf(path)
    tensors, config = tensors_of(demo_checkpoint), config_of(demo_checkpoint)
    layer = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
    layer |= {"attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    layer |= {f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
    top = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    seen = set()
    for name, tensor in source.tensors.items():
        parts = name.split(".")
        module = top[parts[0]] if len(parts) == 2 else f"model.layers.{parts[1]}.{layer[parts[2]]}"
        theirs = gguf.quants.dequantize(tensor.data, tensor.type).reshape(tensor.shape)
        if parts[-2] in ("attn_q", "attn_k"):
            theirs = half_split(theirs, 9 if parts[-2] == "attn_q" else 3)
        assert_same_bits(decode(tensors, config, module), theirs, name, signed_zeros=tensor.type != Type.Q8_0)
        seen.add(module)
    assert len(source.tensors) == 272
    assert {name.rsplit(".", 1)[0] for name in tensors} == seen
    assert config["quantization"] == {
        "group_size": 32,
        "bits": 4,
        "mode": "affine",
        "model.embed_tokens": {"group_size": 32, "bits": 8},
    }


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_1, Type.Q8_0, Type.F16, Type.BF16, Type.F32], ids=lambda k: k.name)
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "qwen3moe"])
def test_every_type_and_architecture_is_lossless(arch: str, kind: Type, tmp_path: Path) -> None:
    model = TinyGguf(arch, default=kind, tied=arch != "qwen3")
    out = convert(model, tmp_path)
    config = config_of(out)
    if kind == Type.BF16:
        return check_with_mlx_lm_reader(model, out)
    tensors = tensors_of(out)
    q, k = model.values["blk.1.attn_q.weight"], model.values["blk.1.attn_k.weight"]
    if arch == "llama":
        q, k = half_split(q, HEADS), half_split(k, KV_HEADS)
    expected = {
        "model.embed_tokens": model.values["token_embd.weight"],
        "model.layers.1.self_attn.q_proj": q,
        "model.layers.1.self_attn.k_proj": k,
        "model.layers.1.self_attn.v_proj": model.values["blk.1.attn_v.weight"],
        "model.layers.1.self_attn.o_proj": model.values["blk.1.attn_output.weight"],
    }
    if arch == "qwen3moe":
        expected["model.layers.0.mlp.gate"] = model.values["blk.0.ffn_gate_inp.weight"]
        expected |= {
            f"model.layers.0.mlp.switch_mlp.{x}_proj": model.values[f"blk.0.ffn_{x}_exps.weight"]
            for x in ("gate", "up", "down")
        }
    else:
        expected["model.layers.0.mlp.down_proj"] = model.values["blk.0.ffn_down.weight"]
    if arch == "qwen3":
        expected["lm_head"] = model.values["output.weight"]
    if arch.startswith("qwen3"):
        expected["model.layers.1.self_attn.q_norm"] = model.values["blk.1.attn_q_norm.weight"]
    for module, values in expected.items():
        exact_zeros = kind not in (Type.Q4_0, Type.Q8_0)
        assert_same_bits(decode(tensors, config, module), values, module, signed_zeros=exact_zeros)
    if arch == "qwen2":
        np.testing.assert_array_equal(
            tensors["model.layers.0.self_attn.q_proj.bias"], model.values["blk.0.attn_q.bias"]
        )
    assert len([n for n in tensors if not n.endswith((".scales", ".biases"))]) == len(model.values)
    return None


def check_with_mlx_lm_reader(model: TinyGguf, out: Path) -> None:
    """bfloat16, which NumPy's reader does not know: MLX reads it."""
    mx = pytest.importorskip("mlx.core")
    tensors = mx.load(str(out / "model.safetensors"))
    embed = tensors["model.embed_tokens.weight"]
    assert embed.dtype == mx.bfloat16
    values = np.array(embed.astype(mx.float32))
    np.testing.assert_array_equal(values, model.values["token_embd.weight"])
    assert config_of(out)["torch_dtype"] == "bfloat16"


def test_llama_q_bias_is_reordered_like_its_rows(tmp_path: Path) -> None:
    model = TinyGguf(extra={})
    bias = np.arange(HEADS * HEAD_DIM, dtype=np.float32)
    kv_bias = np.arange(KV_HEADS * HEAD_DIM, dtype=np.float32)
    for layer in range(model.layers):
        model.extra |= {f"blk.{layer}.attn_{x}.bias": kv_bias if x in "kv" else bias for x in ("q", "k", "v", "output")}
    out = convert(model, tmp_path)
    tensors = tensors_of(out)
    np.testing.assert_array_equal(tensors["model.layers.1.self_attn.q_proj.bias"], half_split(bias, HEADS))
    np.testing.assert_array_equal(tensors["model.layers.1.self_attn.k_proj.bias"], half_split(kv_bias, KV_HEADS))
    assert config_of(out)["attention_bias"] is True


def test_mixed_types_become_overrides(tmp_path: Path) -> None:
    types = {"token_embd": Type.Q8_0, "attn_v": Type.F16, "ffn_gate_inp": Type.F32, "ffn_down_exps": Type.Q8_0}
    config = config_of(convert(TinyGguf("qwen3moe", types=types, layers=1), tmp_path))
    assert config["quantization"] == {
        "group_size": 32,
        "bits": 4,
        "mode": "affine",
        "model.embed_tokens": {"group_size": 32, "bits": 8},
        "model.layers.0.self_attn.v_proj": False,
        "model.layers.0.mlp.gate": False,
        "model.layers.0.mlp.switch_mlp.down_proj": {"group_size": 32, "bits": 8},
    }
    assert config["num_experts"] == EXPERTS
    assert config["num_experts_per_tok"] == 2
    assert config["norm_topk_prob"] is True


@pytest.mark.parametrize(("kind", "scale"), [(Type.Q4_0, 9000.0), (Type.Q8_0, 600.0)])
def test_a_bias_beyond_float16_gets_float32_scales(kind: Type, scale: float, tmp_path: Path) -> None:
    path = TinyGguf(default=kind, layers=1).write(tmp_path / "in.gguf")
    patch_block_scales(path, "blk.0.attn_v.weight", scale)
    import_gguf(path, tmp_path / "out", progress=quiet)
    tensors = tensors_of(tmp_path / "out")
    module = "model.layers.0.self_attn.v_proj"
    assert tensors[f"{module}.scales"].dtype == np.float32
    assert tensors["model.layers.0.self_attn.q_proj.scales"].dtype == np.float16
    raw = read_gguf(path).tensors["blk.0.attn_v.weight"]
    theirs = gguf.quants.dequantize(raw.data, kind)
    assert_same_bits(decode(tensors, config_of(tmp_path / "out"), module), theirs, module, signed_zeros=False)


def test_a_scale_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    path = TinyGguf(default=Type.Q4_0, layers=1).write(tmp_path / "in.gguf")
    patch_block_scales(path, "blk.0.attn_v.weight", float("inf"))
    with pytest.raises(ConvertError, match=r"blk\.0\.attn_v\.weight: a block scale is infinite"):
        import_gguf(path, tmp_path / "out", progress=quiet)


@pytest.mark.parametrize("kind", [Type.Q5_0, Type.Q5_1, Type.Q6_K, Type.Q4_K])
def test_other_quantizations_are_refused_by_tensor_and_type(kind: Type, tmp_path: Path) -> None:
    path = TinyGguf(layers=1).write(tmp_path / "in.gguf")
    block, _ = gguf.constants.GGML_QUANT_SIZES[kind]
    data = bytearray(path.read_bytes())
    at = data.index(b"blk.0.attn_v.weight") + len(b"blk.0.attn_v.weight")
    # After the name: the number of dimensions, the dimensions, the type.
    data[at + 4 : at + 12] = (block).to_bytes(8, "little")
    data[at + 20 : at + 24] = int(kind).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(ConvertError, match=rf"blk\.0\.attn_v\.weight: type {kind.name} has no lossless MLX form"):
        import_gguf(path, tmp_path / "out", progress=quiet)
    assert not (tmp_path / "out").exists()


def test_llama3_rope_factors_become_rope_scaling(tmp_path: Path) -> None:
    """The formula of Llama 3.1, written as its authors do: by wavelength, in three ranges."""
    divisors = []
    for i in range(HEAD_DIM // 2):
        wavelength = 2 * np.pi * 10000.0 ** (2 * i / HEAD_DIM)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192 / 1:
            divisors.append(8.0)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / 8.0 + smooth))
    model = TinyGguf(extra={"rope_freqs.weight": np.array(divisors, np.float32)})
    assert config_of(convert(model, tmp_path))["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_unknown_rope_factors_are_refused(tmp_path: Path) -> None:
    model = TinyGguf(extra={"rope_freqs.weight": np.linspace(1, 3, HEAD_DIM // 2, dtype=np.float32)})
    with pytest.raises(ConvertError, match=r"rope_freqs\.weight: frequency divisors from 1 to 3"):
        convert(model, tmp_path)


def test_rope_scaling_from_metadata(tmp_path: Path) -> None:
    keys = {"type": "yarn", "factor": 4.0, "original_context_length": 64}
    model = TinyGguf("qwen3", metadata={f"qwen3.rope.scaling.{k}": v for k, v in keys.items()})
    assert config_of(convert(model, tmp_path))["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arch": "gemma"}, "architecture 'gemma' cannot be imported; supported: llama, qwen2, qwen3, qwen3moe"),
        ({"extra": {"blk.0.ffn_up.bias": np.zeros(4, np.float32)}}, "blk.0.ffn_up.bias: unknown tensor for a llama"),
        ({"metadata": {"llama.rope.dimension_count": 8}}, "head of 16, 8 of them rotated"),
        ({"metadata": {"llama.rope.scaling.type": "longrope"}}, "rope scaling 'longrope' is not supported"),
        ({"tokenizer_model": "llama"}, "tokenizer model 'llama' cannot be rebuilt exactly"),
        ({"pre": "tekken"}, "pre-tokenizer 'tekken'"),
        ({"pre": None}, "pre-tokenizer 'None'"),
    ],
)
def test_refusals_name_what_is_unsupported(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConvertError) as error:
        convert(TinyGguf(**change), tmp_path)
    assert message in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.gguf"]


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    whole = TinyGguf(layers=1).write(tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "in.gguf"
    for data, message in (
        (b"", "the file is empty"),
        (b"PK\x03\x04" + whole[4:], "not a GGUF file"),
        (whole[:4] + b"\x01\0\0\0" + whole[8:], "GGUF version 1"),
        (whole[:4] + b"\0\0\0\x03" + whole[8:], "GGUF version 50331648"),
        (whole[:2000], "truncated"),
        (whole[:-100], "truncated"),
        (whole[:16] + b"\xff" * 8 + whole[24:], "truncated"),
    ):
        path.write_bytes(data)
        with pytest.raises(ConvertError, match=message):
            read_gguf(path)
    # Any cut through the header is a ConvertError, never a struct or index error.
    for cut in range(4, 3000, 37):
        path.write_bytes(whole[:cut])
        with pytest.raises(ConvertError):
            read_gguf(path)


def test_existing_output_needs_force_and_force_needs_a_model(tmp_path: Path) -> None:
    out = convert(TinyGguf(), tmp_path)
    marker = out / "marker"
    marker.touch()
    with pytest.raises(ConvertError, match="exists already"):
        import_gguf(tmp_path / "in.gguf", out, progress=quiet)
    assert marker.exists()
    import_gguf(tmp_path / "in.gguf", out, progress=quiet, force=True)
    assert not marker.exists()
    assert (out / "config.json").exists()
    other = tmp_path / "documents"
    other.mkdir()
    (other / "thesis.txt").touch()
    with pytest.raises(ConvertError, match=r"no config\.json"):
        import_gguf(tmp_path / "in.gguf", other, progress=quiet, force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["documents", "in.gguf", "out"]


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path) -> None:
    class Interrupted(BaseException):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "writing" and done > total // 2:
            raise Interrupted

    path = TinyGguf().write(tmp_path / "in.gguf")
    with pytest.raises(Interrupted):
        import_gguf(path, tmp_path / "out", progress=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["in.gguf"]


def test_shards_follow_the_hub_and_hold_whole_modules(tmp_path: Path) -> None:
    out = convert(TinyGguf(), tmp_path, shard_bytes=20_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in out.glob("*.safetensors"))
    assert len(files) > 2
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    stored = {name: file for file in files for name in load_file(out / file)}
    assert index["weight_map"] == stored
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(out).values())
    for name, file in stored.items():
        assert stored[name.rsplit(".", 1)[0] + ".weight"] == file
    single = tmp_path / "single"
    import_gguf(tmp_path / "in.gguf", single, progress=quiet)
    assert {n: t.tobytes() for n, t in tensors_of(single).items()} == {
        n: t.tobytes() for n, t in tensors_of(out).items()
    }


def test_progress_counts_the_bytes_that_are_written(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    out = tmp_path / "out"
    import_gguf(TinyGguf().write(tmp_path / "in.gguf"), out, progress=lambda *call: calls.append(call))
    writing = [(done, total) for stage, done, total in calls if stage == "writing"]
    assert writing == sorted(writing)
    assert writing[-1] == (sum(t.nbytes for t in tensors_of(out).values()),) * 2
