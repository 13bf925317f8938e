"""Routers of a random model made uneven in place: its experts, nearly all of its bytes, stay as they are.

A second model of 45 GB is then made in a second, where the disk has no room for two or writing takes minutes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFReader

from mixbit.engine.loader import load
from mixbit.engine.synth import Skew, favoured_experts, router_factor, sizes_of
from mixbit.kernels.experts import streamable
from mixbit.kernels.spec import QuantizedTensor

_SEED = 0  # of the models that are made here


def reroute_checkpoint(directory: Path, like: str, skew: Skew) -> None:
    """What `synthesize` would have made with this skew: rows of favoured experts have larger scales and biases."""
    factor = router_factor(sizes_of(like), skew)
    for node in streamable(load(directory).program):
        router = node.spec.router
        if not isinstance(router, QuantizedTensor):
            raise ValueError(f"{router.name}: its router is not quantized")
        favoured = favoured_experts(router.name, _SEED, router.out_dim, skew)
        for values, place in zip((router.scales, router.biases), router.stored[1:], strict=True):
            changed = values.copy()
            changed[favoured] = (changed[favoured].astype(np.float32) * factor).astype(changed.dtype)
            with place.file.open("r+b") as file:
                file.seek(place.offset)
                file.write(changed.view(np.uint8).data)


def reroute_gguf(file: Path, like: str, skew: Skew) -> None:
    """The same of the peer's file; its favoured experts are others."""
    factor, random = router_factor(sizes_of(like), skew), np.random.default_rng(_SEED)
    for tensor in GGUFReader(file, "r+").tensors:
        if tensor.name.endswith(".ffn_gate_inp.weight"):
            favoured = random.permutation(len(tensor.data))[: round(skew.experts * len(tensor.data))]
            tensor.data[favoured] *= np.float32(factor)
