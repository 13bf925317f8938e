"""config.json and tensor names from GGUF metadata, for each architecture that can be imported.

Keys and tensor names: the GGUF specification and the `gguf` package's constants.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mixbit.engine.convert.errors import ConvertError
from mixbit.engine.convert.gguf_file import GgufFile, GgufTensor
from mixbit.engine.convert.gguf_tensors import RowOrder

ROPE_FREQS = "rope_freqs.weight"

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.switch_mlp.gate_proj",
    "ffn_up_exps": "mlp.switch_mlp.up_proj",
    "ffn_down_exps": "mlp.switch_mlp.down_proj",
}
_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<module>\w+)\.(?P<parameter>weight|bias)")


@dataclass(frozen=True)
class Architecture:
    """How one GGUF architecture maps to a model type of ours.

    modules: names within a layer. permuted: q and k rows are stored for interleaved RoPE.
    """

    model_type: str
    model_class: str
    modules: Mapping[str, str]
    permuted: bool = False


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", _ATTENTION | _MLP, permuted=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _ATTENTION | _MLP),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", _ATTENTION | _QK_NORM | _MLP),
    "qwen3moe": Architecture("qwen3_moe", "Qwen3MoeForCausalLM", _ATTENTION | _QK_NORM | _EXPERTS),
}


def architecture_of(file: GgufFile) -> Architecture:
    """Raises ConvertError naming the architecture if it cannot be imported."""
    name = file.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ConvertError(
            f"{file.path}: architecture {name!r} cannot be imported; supported: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


def mlx_name(architecture: Architecture, name: str) -> tuple[str, str]:
    """(module path, parameter) of a GGUF tensor.

    "blk.0.attn_q.weight" is ("model.layers.0.self_attn.q_proj", "weight").
    Raises ConvertError if the architecture has no such tensor.
    """
    match = _NAME.fullmatch(name)
    if match:
        layer, module = match["layer"], match["module"]
        known = _TOP if layer is None else architecture.modules
        has_bias = module in ("attn_q", "attn_k", "attn_v", "attn_output")
        if module in known and (match["parameter"] == "weight" or has_bias):
            prefix = "" if layer is None else f"model.layers.{layer}."
            return prefix + known[module], match["parameter"]
    raise ConvertError(f"{name}: unknown tensor for a {architecture.model_type} model; it cannot be imported")


class _Keys:
    """Metadata under the architecture's prefix."""

    def __init__(self, file: GgufFile) -> None:
        self.file, self.prefix = file, file.metadata["general.architecture"]

    def get(self, key: str, default: Any = None) -> Any:
        return self.file.metadata.get(f"{self.prefix}.{key}", default)

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise ConvertError(f"{self.file.path}: metadata {self.prefix}.{key} is missing")
        if isinstance(value, list):
            raise ConvertError(f"{self.file.path}: {self.prefix}.{key} differs by layer, which is not supported")
        return value


def row_order(file: GgufFile, architecture: Architecture, name: str) -> RowOrder | None:
    """For q and k of a permuted architecture: the rows in the order of half-split RoPE, else None.

    Pair i of a head lies in rows (2i, 2i + 1); half-split RoPE wants rows (i, i + head_dim / 2).
    """
    module = name.rsplit(".", 2)[-2]
    if not architecture.permuted or module not in ("attn_q", "attn_k"):
        return None
    keys = _Keys(file)
    heads = keys.need("attention.head_count")
    if module == "attn_k":
        heads = keys.get("attention.head_count_kv", heads)
    rows = file.tensors[name].shape[0]
    if rows % (2 * heads):
        raise ConvertError(f"{name}: {rows} rows do not divide into {heads} heads")
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).ravel()


def model_config(file: GgufFile, architecture: Architecture) -> dict[str, Any]:
    """config.json without its quantization: the fields transformers and mlx-lm read.

    Raises ConvertError for missing metadata, or for a setting that the model type cannot express.
    """
    keys = _Keys(file)
    tensors = file.tensors
    if "token_embd.weight" not in tensors:
        raise ConvertError(f"{file.path}: tensor token_embd.weight is missing (a split or adapter file?)")
    heads, hidden = keys.need("attention.head_count"), keys.need("embedding_length")
    head_dim = keys.get("attention.key_length", hidden // heads)
    rotated = keys.get("rope.dimension_count", head_dim)
    if rotated != head_dim or keys.get("attention.value_length", head_dim) != head_dim:
        raise ConvertError(
            f"{file.path}: head of {head_dim}, {rotated} of them rotated, values of "
            f"{keys.get('attention.value_length', head_dim)}: only equal sizes are supported"
        )
    config: dict[str, Any] = {
        "architectures": [architecture.model_class],
        "model_type": architecture.model_type,
        "hidden_size": hidden,
        "intermediate_size": keys.need("feed_forward_length"),
        "num_hidden_layers": keys.need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "max_position_embeddings": keys.need("context_length"),
        "rms_norm_eps": _shortest(keys.need("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(keys.get("rope.freq_base", 10000.0)),
        "rope_scaling": _rope_scaling(keys, tensors, head_dim),
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    if architecture.model_type == "qwen3_moe":
        config |= {
            "num_experts": keys.need("expert_count"),
            "num_experts_per_tok": keys.need("expert_used_count"),
            "moe_intermediate_size": keys.need("expert_feed_forward_length"),
            # Runtimes of this architecture renormalise, and most files do not say.
            "norm_topk_prob": bool(keys.get("expert_weights_norm", True)),
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    return config


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05 rather than 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(keys: _Keys, tensors: Mapping[str, GgufTensor], head_dim: int) -> dict[str, Any] | None:
    kind = keys.get("rope.scaling.type", "none")
    if ROPE_FREQS in tensors:
        return _llama3_scaling(keys, tensors[ROPE_FREQS], head_dim)
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise ConvertError(f"{keys.file.path}: rope scaling {kind!r} is not supported (none, linear, yarn, llama3)")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": _shortest(keys.need("rope.scaling.factor"))}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = keys.need("rope.scaling.original_context_length")
    return scaling


def _llama3_scaling(keys: _Keys, tensor: GgufTensor, head_dim: int) -> dict[str, Any]:
    """GGUF stores Llama 3's scaling as one divisor for each frequency; find the parameters that give them.

    Formula: transformers, `_compute_llama3_parameters`; every published model has low 1, high 4, original 8192.
    """
    divisors = tensor.data.view(np.float32).ravel()
    low, high, original = 1.0, 4.0, 8192
    factor = float(divisors.max())
    base = keys.get("rope.freq_base", 10000.0)
    wavelengths = 2 * np.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    expected = 1.0 / ((1.0 - smooth) / factor + smooth)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-5):
        raise ConvertError(
            f"{keys.file.path}: {ROPE_FREQS}: frequency divisors from {divisors.min():g} to {divisors.max():g} are not "
            f"those of llama3 rope scaling with factor {factor:g}, and no other kind is supported"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
