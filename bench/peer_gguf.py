"""The peer's form of a Qwen3-Next of random weights: a GGUF of the same layers and sizes, in Q4_0.

Tensors are made and written one at a time. The names are llama.cpp's; its text is noise, its speed counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from mixbit.engine.synth import Skew, router_factor

_BLOCK = 32  # values of a block of Q4_0: a float16 scale and 16 bytes of codes
_BLOCK_BYTES = 18
_CHUNK_BLOCKS = 1 << 20
_GAIN = 1.5  # of every matrix but the embedding, as in the checkpoint


@dataclass(frozen=True)
class _Tensor:
    """fill: every value; None for random ones, of this spread. Matrices that are not `plain` are Q4_0, else float32.

    favoured: rows, chosen at random, that are `factor` times as large: a router's.
    """

    name: str
    shape: tuple[int, ...]
    plain: bool = False
    fill: float | None = None
    spread: float | None = None
    favoured: int = 0
    factor: float = 1.0


def write_gguf(out: Path, config: Mapping[str, Any], skew: Skew | None = None) -> None:
    """Write a GGUF like the checkpoint of this config.json (model_type "qwen3_next")."""
    tensors = list(_tensors(config, skew))
    writer = gguf.GGUFWriter(str(out), "qwen3next")
    _write_sizes(writer, config)
    for tensor in tensors:
        if tensor.plain:
            writer.add_tensor_info(
                tensor.name, tensor.shape, np.dtype(np.float32), 4 * math.prod(tensor.shape), raw_dtype=Type.F32
            )
        else:
            stored = (*tensor.shape[:-1], tensor.shape[-1] // _BLOCK * _BLOCK_BYTES)
            writer.add_tensor_info(tensor.name, stored, np.dtype(np.uint8), math.prod(stored), raw_dtype=Type.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.Generator(np.random.SFC64(0))
    for tensor in tensors:
        writer.write_tensor_data(_values(tensor, random))
    writer.close()


def _write_sizes(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(int(config["head_dim"] * config["partial_rotary_factor"]))
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(config["linear_key_head_dim"])
    writer.add_ssm_group_count(config["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(config["linear_num_value_heads"])
    writer.add_ssm_inner_size(config["linear_num_value_heads"] * config["linear_value_head_dim"])
    writer.add_full_attention_interval(config["full_attention_interval"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_Q4_0))


def _tensors(config: Mapping[str, Any], skew: Skew | None) -> Iterator[_Tensor]:
    favoured, factor = 0, 1.0
    if skew is not None:
        favoured, factor = round(skew.experts * config["num_experts"]), router_factor(config, skew)
    size, experts, inner = config["hidden_size"], config["num_experts"], config["moe_intermediate_size"]
    shared, vocab = config["shared_expert_intermediate_size"], config["vocab_size"]
    yield _Tensor("token_embd.weight", (vocab, size), spread=1)
    yield _Tensor("output_norm.weight", (size,), plain=True, fill=1)
    yield _Tensor("output.weight", (vocab, size))
    for layer in range(config["num_hidden_layers"]):
        path = f"blk.{layer}"
        full = (layer + 1) % config["full_attention_interval"] == 0
        yield _Tensor(f"{path}.attn_norm.weight", (size,), plain=True, fill=1)
        yield from _attention(path, config) if full else _gated_delta(path, config)
        yield _Tensor(f"{path}.post_attention_norm.weight", (size,), plain=True, fill=1)
        yield _Tensor(f"{path}.ffn_gate_inp.weight", (experts, size), plain=True, favoured=favoured, factor=factor)
        yield _Tensor(f"{path}.ffn_gate_inp_shexp.weight", (size,), plain=True)
        for name, rows, cols in (("gate", inner, size), ("up", inner, size), ("down", size, inner)):
            yield _Tensor(f"{path}.ffn_{name}_exps.weight", (experts, rows, cols))
        for name, rows, cols in (("gate", shared, size), ("up", shared, size), ("down", size, shared)):
            yield _Tensor(f"{path}.ffn_{name}_shexp.weight", (rows, cols))


def _attention(path: str, config: Mapping[str, Any]) -> Iterator[_Tensor]:
    size, dim = config["hidden_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    yield _Tensor(f"{path}.attn_q.weight", (2 * heads * dim, size))
    yield _Tensor(f"{path}.attn_k.weight", (kv_heads * dim, size))
    yield _Tensor(f"{path}.attn_v.weight", (kv_heads * dim, size))
    yield _Tensor(f"{path}.attn_output.weight", (size, heads * dim))
    yield _Tensor(f"{path}.attn_q_norm.weight", (dim,), plain=True, fill=1)
    yield _Tensor(f"{path}.attn_k_norm.weight", (dim,), plain=True, fill=1)


def _gated_delta(path: str, config: Mapping[str, Any]) -> Iterator[_Tensor]:
    size, heads = config["hidden_size"], config["linear_num_value_heads"]
    values = heads * config["linear_value_head_dim"]
    channels = 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"] + values
    yield _Tensor(f"{path}.attn_qkv.weight", (channels, size))
    yield _Tensor(f"{path}.attn_gate.weight", (values, size))
    yield _Tensor(f"{path}.ssm_ba.weight", (2 * heads, size))
    yield _Tensor(f"{path}.ssm_conv1d.weight", (channels, config["linear_conv_kernel_dim"]), plain=True)
    yield _Tensor(f"{path}.ssm_dt.bias", (heads,), plain=True)
    yield _Tensor(f"{path}.ssm_a", (heads,), plain=True, fill=-1)
    yield _Tensor(f"{path}.ssm_norm.weight", (config["linear_value_head_dim"],), plain=True, fill=1)
    yield _Tensor(f"{path}.ssm_out.weight", (size, values))


def _values(tensor: _Tensor, random: np.random.Generator) -> npt.NDArray[Any]:
    if tensor.fill is not None:
        return np.full(tensor.shape, tensor.fill, np.float32)
    spread = tensor.spread or _GAIN / math.sqrt(tensor.shape[-1])
    if tensor.plain:
        values = random.standard_normal(tensor.shape, np.float32) * np.float32(spread)
        values[random.permutation(len(values))[: tensor.favoured]] *= np.float32(tensor.factor)
        return values
    count = math.prod(tensor.shape) // _BLOCK
    data = np.empty((count, _BLOCK_BYTES), np.uint8)
    for start in range(0, count, _CHUNK_BLOCKS):
        chunk = data[start : start + _CHUNK_BLOCKS]
        chunk[:, 2:] = np.frombuffer(random.bytes(16 * len(chunk)), np.uint8).reshape(-1, 16)
    # Codes are even on 16 steps around -1/2. With scales of one sign every matrix would have that mean, by which the
    # sum of its input drowns all else: hidden states of all tokens become alike, and routers choose the same few.
    signs = 1 - 2 * random.integers(0, 2, count)
    data[:, :2] = (signs * (spread / 4.61)).astype(np.float16).view(np.uint8).reshape(-1, 2)
    return data.reshape(*tensor.shape[:-1], -1)
