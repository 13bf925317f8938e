"""The bfloat16 checkpoint of a trained model: what `mixbit convert` quantizes."""

from __future__ import annotations

import json
from pathlib import Path

from model import TinyCoder
from safetensors.torch import save_file
from samples import END
from tokenizers import Tokenizer


def write_checkpoint(out: Path, model: TinyCoder, tokenizer: Tokenizer, log: list[tuple[int, float, float]]) -> None:
    """Weights, config, tokenizer and generation_config in MLX's layout, and loss.csv, in the directory `out`."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.cpu() for name, tensor in model.checkpoint().items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "mlx"})
    end = tokenizer.token_to_id(END)
    (out / "config.json").write_text(model.c.document().replace("{", f'{{\n  "eos_token_id": {end},', 1))
    sampling = {"eos_token_id": end, "do_sample": True, "temperature": 0.2, "top_p": 0.95}
    (out / "generation_config.json").write_text(json.dumps(sampling, indent=1) + "\n")
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": "<|fim_pad|>"}
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    rows = "".join(f"{step},{loss:.4f},{router:.5f}\n" for step, loss, router in log)
    (out / "loss.csv").write_text(f"step,loss,router\n{rows}")
