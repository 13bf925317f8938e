"""Many tokens of the gated delta net: chunks of 32, by matrix products of simdgroups. Metal alone."""

from __future__ import annotations

import mlx.core as mx

from mixbit.kernels import ops
from mixbit.kernels.mlx import gated_delta as stock
from mixbit.kernels.mlx.arrays import Values
from mixbit.kernels.mlx.custom.gated_delta import rows_of, sizes
from mixbit.kernels.mlx.custom.launch import Kernel, Launcher, Size, Template
from mixbit.kernels.mlx.step import Group

CHUNK = 32  # tokens, one for each lane of a simdgroup
_RUN = 8  # tokens that a simdgroup convolves
_SOLVE_THREADS = CHUNK // 8 * 32  # a simdgroup for each eight tokens
_MAX_DIM = 256  # of keys: a row of eight of them is in a simdgroup's registers


def applies(spec: ops.GatedDeltaSpec) -> bool:
    """Whether the kernels take these sizes: tiles of 8 x 8 fill the memory."""
    return spec.kernel > 1 and spec.key_dim % 8 == 0 and spec.value_dim % 8 == 0 and spec.key_dim <= _MAX_DIM


class PrefillDelta:
    """Convolution, what all chunks need, chunk after chunk, and gated norm: four launches."""

    def __init__(self, launcher: Launcher, node: ops.GatedDelta, layer: stock.GatedDelta) -> None:
        """layer: the stock operation, for its weights."""
        self._node, self._spec = node, node.spec
        self._taps, self._rate, self._dt_bias = mx.contiguous(layer.taps), layer.rate, layer.dt_bias
        self._weight = layer.norm.weight
        wide = node.spec.value_dim % 16 == 0 and node.spec.key_dim <= _MAX_DIM // 2
        self._rows = 16 if wide else 8  # of the memory, for each simdgroup
        self._template: Template = [
            *sizes(node),
            *(("CHUNK", CHUNK), ("RUN", _RUN), ("THREADS", _SOLVE_THREADS), ("ROWS", self._rows)),
        ]

        def kernel(name: str, inputs: str, outputs: str) -> Kernel:
            return launcher.kernel(f"prefill_delta_{name}", inputs.split(), outputs.split())

        self._mix = kernel("mix", "q k v conv taps", "queries keys values new_conv")
        self._solve = kernel("solve", "queries keys b a rate dt_bias", "solved recall within factors")
        self._advance = kernel("advance", "queries keys values solved recall within factors memory", "out new_memory")
        self._norm = kernel("norm", "read z weight", "out")

    def __call__(
        self, values: Values, group: Group, conv: mx.array, memory: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """(out [sequences * new, value_heads * value_dim], conv, memory) after the group's tokens."""
        spec, dtype, sequences = self._spec, conv.dtype, len(group.slots)
        chunks = -(-group.new // CHUNK)
        padded, heads = chunks * CHUNK, spec.value_heads
        q, k, v, z, b, a = rows_of(self._node, values, group)

        def launch(
            kernel: Kernel, inputs: list[mx.array], grid: Size, threads: int, *shapes: tuple[int, ...], last: mx.Dtype
        ) -> list[mx.array]:
            return kernel(
                inputs=inputs,
                template=[("T", dtype), *self._template],
                grid=grid,
                threadgroup=(threads, 1, 1),
                output_shapes=shapes,
                output_dtypes=[*[mx.float32] * (len(shapes) - 1), last],
            )

        keyed = (sequences, spec.key_heads, padded, spec.key_dim)
        valued = (sequences, heads, padded, spec.value_dim)
        square = (sequences, heads, chunks, CHUNK, CHUNK)
        queries, keys, mixed, conv = launch(
            self._mix,
            [q, k, v, conv, self._taps],
            (padded // _RUN * 32, 2 * spec.key_heads + heads, sequences),
            128,
            *(keyed, keyed, valued, conv.shape),
            last=dtype,
        )
        pieces = launch(
            self._solve,
            [queries, keys, b, a, self._rate, self._dt_bias],
            (heads * _SOLVE_THREADS, chunks, sequences),
            _SOLVE_THREADS,
            *(square, square, square, (sequences, heads, chunks, 2 * CHUNK + 8, 8)),
            last=mx.float32,
        )
        read, memory = launch(
            self._advance,
            [queries, keys, mixed, *pieces, memory],
            (spec.value_dim // self._rows * 32, heads, sequences),
            32,
            *(valued, memory.shape),
            last=mx.float32,
        )
        (out,) = launch(
            self._norm,
            [read, z, self._weight],
            (heads * 32, group.new, sequences),
            128,
            (sequences * group.new, heads * spec.value_dim),
            last=dtype,
        )
        return out, conv, memory
