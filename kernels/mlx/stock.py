"""The table of stock MLX operations: every node, on every MLX device."""

from __future__ import annotations

from mixbit.kernels import ops
from mixbit.kernels.mlx.attention import Attention
from mixbit.kernels.mlx.feed_forward import Mlp, Moe
from mixbit.kernels.mlx.gated_delta import GatedDelta
from mixbit.kernels.mlx.operation import Table
from mixbit.kernels.mlx.rows import AddNorm, BatchMatvec, Embed, RmsNorm, SelectRows

STOCK: Table = {
    ops.Embed: Embed,
    ops.RmsNorm: RmsNorm,
    ops.AddNorm: AddNorm,
    ops.BatchMatvec: BatchMatvec,
    ops.Attention: Attention,
    ops.GatedDelta: GatedDelta,
    ops.Mlp: Mlp,
    ops.Moe: Moe,
    ops.SelectRows: SelectRows,
}
