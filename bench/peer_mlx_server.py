"""mlx_lm.server with float32 activations, which is what MLX computes fastest on CPUs. Arguments as mlx_lm.server's."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm import server

load = server.load


def load_float32(*arguments: Any, **options: Any) -> Any:
    model, *rest = load(*arguments, **options)
    model.set_dtype(mx.float32)
    return model, *rest


server.load = load_float32
server.main()
