"""Tiny GGUF files with random weights, written by the `gguf` package."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType as Type

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, EXPERTS, EXPERT_FFN = 64, 4, 2, 16, 96, 4, 32

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_alphabet() -> list[str]:
    """The 256 characters of byte-level BPE in the order of their bytes."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    return [chr(byte if byte in shown else next(hidden)) for byte in range(256)]


@dataclass
class TinyGguf:
    """A model to be written; change any part of it before `write`.

    types: tensor type by the last part of the GGUF name; the rest of the matrices are `default`.
    values holds what each written tensor dequantizes to.
    """

    arch: str = "llama"
    layers: int = 2
    default: Type = Type.Q4_1
    types: dict[str, Type] = field(default_factory=dict)
    tied: bool = True
    pre: str | None = "smollm"
    tokenizer_model: str = "gpt2"
    chat_template: str | None = "{% for m in messages %}{{ m.content }}{% endfor %}"
    padding: int = 4
    extra: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    values: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    seed: int = 0

    @property
    def tokens(self) -> list[str]:
        words = [*byte_alphabet(), "he", "ll", "hell", "hello", "Ġw"]
        return [*SPECIALS, *words, "<think>", *(f"[PAD{i}]" for i in range(self.padding))]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {
            "token_embd.weight": (len(self.tokens), HIDDEN),
            "output_norm.weight": (HIDDEN,),
        }
        if not self.tied:
            shapes["output.weight"] = (len(self.tokens), HIDDEN)
        for layer in range(self.layers):
            block = f"blk.{layer}."
            shapes |= {
                f"{block}attn_norm.weight": (HIDDEN,),
                f"{block}attn_q.weight": (HEADS * HEAD_DIM, HIDDEN),
                f"{block}attn_k.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
                f"{block}attn_v.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
                f"{block}attn_output.weight": (HIDDEN, HEADS * HEAD_DIM),
                f"{block}ffn_norm.weight": (HIDDEN,),
            }
            if self.arch == "qwen2":
                shapes |= {f"{block}attn_{x}.bias": (shapes[f"{block}attn_{x}.weight"][0],) for x in "qkv"}
            if self.arch.startswith("qwen3"):
                shapes |= {f"{block}attn_{x}_norm.weight": (HEAD_DIM,) for x in "qk"}
            if self.arch == "qwen3moe":
                shapes |= {
                    f"{block}ffn_gate_inp.weight": (EXPERTS, HIDDEN),
                    f"{block}ffn_gate_exps.weight": (EXPERTS, EXPERT_FFN, HIDDEN),
                    f"{block}ffn_up_exps.weight": (EXPERTS, EXPERT_FFN, HIDDEN),
                    f"{block}ffn_down_exps.weight": (EXPERTS, HIDDEN, EXPERT_FFN),
                }
            else:
                shapes |= {
                    f"{block}ffn_gate.weight": (FFN, HIDDEN),
                    f"{block}ffn_up.weight": (FFN, HIDDEN),
                    f"{block}ffn_down.weight": (HIDDEN, FFN),
                }
        return shapes

    def write(self, path: Path) -> Path:
        writer = gguf.GGUFWriter(path, self.arch)
        self._write_metadata(writer)
        rng = np.random.default_rng(self.seed)
        for name, shape in self.shapes().items():
            values = rng.standard_normal(shape, np.float32) * np.float32(0.3)
            kind = self.types.get(name.split(".")[-2], self.default) if len(shape) > 1 else Type.F32
            if name.endswith("ffn_gate_inp.weight"):
                kind = self.types.get("ffn_gate_inp", Type.F32)
            data = gguf.quants.quantize(values, kind)
            self.values[name] = gguf.quants.dequantize(data, kind).reshape(shape)
            writer.add_tensor(name, data, raw_dtype=kind)
        for name, array in self.extra.items():
            writer.add_tensor(name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def _write_metadata(self, writer: gguf.GGUFWriter) -> None:
        writer.add_block_count(self.layers)
        writer.add_context_length(256)
        writer.add_embedding_length(HIDDEN)
        writer.add_feed_forward_length(FFN)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV_HEADS)
        writer.add_key_length(HEAD_DIM)
        writer.add_value_length(HEAD_DIM)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(10000.0)
        if self.arch == "qwen3moe":
            writer.add_expert_count(EXPERTS)
            writer.add_expert_used_count(2)
            writer.add_expert_feed_forward_length(EXPERT_FFN)
        tokens = self.tokens
        kinds = [1] * len(tokens)
        for i, token in enumerate(tokens):
            kinds[i] = 3 if token in SPECIALS else 4 if token == "<think>" else 5 if token.startswith("[PAD") else 1
        writer.add_tokenizer_model(self.tokenizer_model)
        if self.pre is not None:
            writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        writer.add_token_merges(["h e", "l l", "he ll", "hell o", "Ġ w"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)
        for key, value in self.metadata.items():
            writer.add_key_value(key, value, _value_type(value))


def _value_type(value: object) -> gguf.GGUFValueType:
    if isinstance(value, bool):
        return gguf.GGUFValueType.BOOL
    if isinstance(value, int):
        return gguf.GGUFValueType.UINT32
    return gguf.GGUFValueType.FLOAT32 if isinstance(value, float) else gguf.GGUFValueType.STRING


def patch_block_scales(path: Path, name: str, scale: float) -> None:
    """Overwrite the float16 scale of the first block of tensor `name` in the file."""
    reader = gguf.GGUFReader(path, "r+")
    tensor = next(t for t in reader.tensors if t.name == name)
    tensor.data.reshape(-1)[:2] = np.array([scale], np.float16).view(np.uint8)
    reader.data.flush()
