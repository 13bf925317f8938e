"""Writes tiny random checkpoints of every model type, in MLX layout, with a tokenizer of their own."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mixbit.kernels.quantize import quantize

Array = npt.NDArray[Any]
Width = tuple[int, int]  # bits, group size

VOCAB_SIZE = 384
ROUTERS_AT_8_BITS: Mapping[str, Width | None] = {"*.mlp.gate": (8, 64), "*.shared_expert_gate": (8, 64)}

_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
_FORMAT_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint32": "U32", "uint8": "U8", "int64": "I64"}

_DENSE: Mapping[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "vocab_size": VOCAB_SIZE,
    "tie_word_embeddings": False,
}
_EXPERTS: Mapping[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_HYBRID: Mapping[str, Any] = {
    **_DENSE,
    "num_hidden_layers": 4,
    "full_attention_interval": 2,
    "partial_rotary_factor": 0.25,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
}
_QWEN3_5: Mapping[str, Any] = {
    **{key: value for key, value in _HYBRID.items() if key not in {"rope_theta", "partial_rotary_factor"}},
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 20000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
    },
}
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "llama": _DENSE,
    "qwen2": {**_DENSE, "num_attention_heads": 2, "num_key_value_heads": 1},
    "qwen3": _DENSE,
    "qwen3_moe": {**_DENSE, **_EXPERTS, "num_hidden_layers": 4, "mlp_only_layers": [1]},
    "qwen3_next": {**_HYBRID, **_EXPERTS, "shared_expert_intermediate_size": 128, "norm_topk_prob": False},
    "qwen3_5": _QWEN3_5,
    "qwen3_5_moe": {**_QWEN3_5, **_EXPERTS, "shared_expert_intermediate_size": 128},
}
_VISION_TYPES = {"qwen3_5", "qwen3_5_moe"}  # MLX keeps these under language_model., with a text_config


def write_checkpoint(
    directory: Path,
    model_type: str,
    *,
    bits: int | None = 4,
    group_size: int = 64,
    overrides: Mapping[str, Width | None] = ROUTERS_AT_8_BITS,
    dtype: str = "float32",
    shards: int = 1,
    vision: bool | None = None,
    config: Mapping[str, Any] | None = None,
    seed: int = 0,
    factors: Mapping[str, float] | None = None,
) -> Path:
    """Write a checkpoint to `directory` and return it.

    bits: of every matrix, None for none quantized. overrides: by glob over module paths, another width
    or None for unquantized; the last match counts. vision: in the layout of a vision checkpoint, by default
    where MLX has it so. config: changes to config.json. factors: by glob over tensor names.
    """
    directory.mkdir(parents=True, exist_ok=True)
    vision = model_type in _VISION_TYPES if vision is None else vision
    text = {**CONFIGS[model_type], **(config or {})}
    prefix = "language_model." if vision else ""
    tensors: dict[str, Array] = {}
    section: dict[str, Any] = {} if bits is None else {"group_size": group_size, "bits": bits}
    for name, value in _scaled(random_tensors(model_type, text, seed), factors or {}).items():
        path = name.removesuffix(".weight")
        width = None if bits is None else (bits, group_size)
        if _is_quantizable(name, value):
            for pattern, override in overrides.items():
                if bits is not None and fnmatchcase(path, pattern):
                    width = override
                    section[prefix + path] = _override(override)
        if width is None or not _is_quantizable(name, value):
            tensors[prefix + name] = value.astype(_DTYPES[dtype])
            continue
        packed, scales, biases = quantize(value.astype(_DTYPES[dtype]), *width)
        tensors |= {f"{prefix}{path}.weight": packed, f"{prefix}{path}.scales": scales}
        tensors[f"{prefix}{path}.biases"] = biases
    if vision:
        tensors["vision_tower.patch_embed.weight"] = np.ones((4, 4), _DTYPES[dtype])
    _write_weights(directory, tensors, shards)
    document: dict[str, Any] = {"model_type": model_type, "eos_token_id": [0, 2]}
    document |= {"text_config": {"model_type": f"{model_type}_text", **text}} if vision else text
    if bits is not None:
        document |= {"quantization": section, "quantization_config": section}
    write_json(directory / "config.json", document)
    write_json(directory / "generation_config.json", {"eos_token_id": [0, 2], "temperature": 0.7, "top_p": 0.9})
    _write_tokenizer(directory)
    return directory


def edit_config(directory: Path, **changes: Any) -> None:
    """Set values of config.json; a value of None removes the key."""
    path = directory / "config.json"
    document = json.loads(path.read_text()) | changes
    write_json(path, {key: value for key, value in document.items() if value is not None})


def write_json(path: Path, document: Any) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(document, indent=1))


def write_safetensors(path: Path, tensors: Mapping[str, Array]) -> None:
    """Write one file, tensors in the given order."""
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    position = 0
    for name, value in tensors.items():
        header[name] = {
            "dtype": _FORMAT_NAMES[value.dtype.name],
            "shape": list(value.shape),
            "data_offsets": [position, position + value.nbytes],
        }
        position += value.nbytes
    text = json.dumps(header).encode()
    data = b"".join(value.tobytes() for value in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def _scaled(tensors: Mapping[str, Array], factors: Mapping[str, float]) -> dict[str, Array]:
    def factor(name: str) -> np.float32:
        return np.float32(math.prod(factor for pattern, factor in factors.items() if fnmatchcase(name, pattern)))

    return {name: value * factor(name) for name, value in tensors.items()}


def _override(width: Width | None) -> Any:
    return False if width is None else {"group_size": width[1], "bits": width[0]}


def _is_quantizable(name: str, value: Array) -> bool:
    return name.endswith(".weight") and value.ndim >= 2 and "conv1d" not in name


def _write_weights(directory: Path, tensors: dict[str, Array], shards: int) -> None:
    if shards == 1:
        write_safetensors(directory / "model.safetensors", tensors)
        return
    weight_map: dict[str, str] = {}
    names = list(tensors)
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}  # parts of a matrix lie in several files
        write_safetensors(directory / file, part)
        weight_map |= dict.fromkeys(part, file)
    write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def random_tensors(model_type: str, config: Mapping[str, Any], seed: int) -> dict[str, Array]:
    """Every tensor of the text model, float32, scaled so that logits differ clearly."""
    random = np.random.default_rng(seed)
    tensors: dict[str, Array] = {}
    for name, shape in tensor_shapes(model_type, config).items():
        noise = random.standard_normal(shape).astype(np.float32)
        if name.endswith(("norm.weight", "norm")):
            tensors[name] = 1 + np.float32(0.2) * noise
        elif name.endswith("A_log"):
            tensors[name] = np.log(random.uniform(0.5, 8, shape)).astype(np.float32)
        elif name.endswith(("bias", "conv1d.weight")):
            tensors[name] = np.float32(0.5) * noise
        else:
            tensors[name] = noise * np.float32((1 if "embed" in name else 1.5) / math.sqrt(shape[-1]))
    return tensors


def tensor_shapes(model_type: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes by name within the text model."""
    size, vocab = config["hidden_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, size), "model.norm.weight": (size,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, size)
    for layer in range(config["num_hidden_layers"]):
        path = f"model.layers.{layer}"
        shapes |= {f"{path}.{norm}_layernorm.weight": (size,) for norm in ("input", "post_attention")}
        interval = config.get("full_attention_interval", 1)
        if (layer + 1) % interval:
            shapes |= _gated_delta_shapes(f"{path}.linear_attn", config, fused=model_type == "qwen3_next")
        else:
            shapes |= _attention_shapes(f"{path}.self_attn", model_type, config)
        if config.get("num_experts") and layer not in config["mlp_only_layers"]:
            shapes |= _moe_shapes(f"{path}.mlp", config)
        else:
            shapes |= _mlp_shapes(f"{path}.mlp", size, config["intermediate_size"])
    return shapes


def _attention_shapes(path: str, model_type: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    size, dim = config["hidden_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    gated = "full_attention_interval" in config
    rows = {"q": (2 if gated else 1) * heads * dim, "k": kv_heads * dim, "v": kv_heads * dim}
    shapes: dict[str, tuple[int, ...]] = {f"{path}.{name}_proj.weight": (n, size) for name, n in rows.items()}
    shapes[f"{path}.o_proj.weight"] = (size, heads * dim)
    if model_type == "qwen2" or config.get("attention_bias"):
        shapes |= {f"{path}.{name}_proj.bias": (n,) for name, n in rows.items()}
    if config.get("attention_bias"):
        shapes[f"{path}.o_proj.bias"] = (size,)
    if model_type.startswith("qwen3"):
        shapes |= {f"{path}.{name}_norm.weight": (dim,) for name in "qk"}
    return shapes


def _gated_delta_shapes(path: str, config: Mapping[str, Any], *, fused: bool) -> dict[str, tuple[int, ...]]:
    size, heads, dim = config["hidden_size"], config["linear_num_value_heads"], config["linear_value_head_dim"]
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    values, channels = heads * dim, 2 * keys + heads * dim
    rows = (
        {"qkvz": channels + values, "ba": 2 * heads}
        if fused
        else {"qkv": channels, "z": values, "b": heads, "a": heads}
    )
    return {
        **{f"{path}.in_proj_{name}.weight": (n, size) for name, n in rows.items()},
        f"{path}.conv1d.weight": (channels, config["linear_conv_kernel_dim"], 1),
        f"{path}.A_log": (heads,),
        f"{path}.dt_bias": (heads,),
        f"{path}.norm.weight": (dim,),
        f"{path}.out_proj.weight": (size, values),
    }


def _mlp_shapes(path: str, size: int, inner: int, experts: tuple[int, ...] = ()) -> dict[str, tuple[int, ...]]:
    return {
        f"{path}.gate_proj.weight": (*experts, inner, size),
        f"{path}.up_proj.weight": (*experts, inner, size),
        f"{path}.down_proj.weight": (*experts, size, inner),
    }


def _moe_shapes(path: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    size, experts = config["hidden_size"], config["num_experts"]
    shapes: dict[str, tuple[int, ...]] = {f"{path}.gate.weight": (experts, size)}
    shapes |= _mlp_shapes(f"{path}.switch_mlp", size, config["moe_intermediate_size"], (experts,))
    if "shared_expert_intermediate_size" in config:
        shapes |= _mlp_shapes(f"{path}.shared_expert", size, config["shared_expert_intermediate_size"])
        shapes[f"{path}.shared_expert_gate.weight"] = (1, size)
    return shapes


SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _write_tokenizer(directory: Path) -> None:
    """Byte-level BPE: three special tokens, 256 bytes, and merges up to the vocabulary of the model."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CHAT_TEMPLATE, "What is the capital of France? The user is an assistant."], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": SPECIAL_TOKENS[2],
            "pad_token": SPECIAL_TOKENS[0],
            "chat_template": CHAT_TEMPLATE,
        },
    )
