"""Experts for many tokens: pairs sorted by expert, matrix products of simdgroups on dequantized tiles. Metal alone."""

from __future__ import annotations

import mlx.core as mx

from mixbit.kernels.mlx.custom.experts import QuantizedMlp
from mixbit.kernels.mlx.custom.launch import Kernel, Launcher, Template
from mixbit.kernels.mlx.weights import QuantizedWeight

_ROWS = 32
_COLUMNS = 64
_THREADS = 128


class PrefillExperts:
    """Weighted sum of the chosen experts: gate, up and SwiGLU in one launch, down in another."""

    def __init__(self, launcher: Launcher, experts: QuantizedMlp, dtype: mx.Dtype) -> None:
        """dtype: of x, the scales and the output."""
        self._dtype = dtype
        self._hidden_weights, self._down_weights = [experts.gate, experts.up], [experts.down]
        names = ("gate", "gate_scales", "gate_biases")
        self._hidden = launcher.kernel(
            "prefill_experts",
            ["x", "experts", "pairs", *names, "up", "up_scales", "up_biases"],
            ["out"],
            "GATED 1",
        )
        self._down = launcher.kernel("prefill_experts", ["x", "experts", *names], ["out"], "GATED 0")

    def __call__(self, x: mx.array, experts: mx.array, weights: mx.array) -> mx.array:
        """x [tokens, in]; experts uint32, weights float32 [tokens, top_k] -> [tokens, in]."""
        tokens, top_k = experts.shape
        flat = experts.flatten()
        pairs = mx.argsort(flat).astype(mx.uint32)
        ordered = flat[pairs]
        hidden = self._launch(self._hidden, self._hidden_weights, [x, ordered, pairs], [("TOP_K", top_k)])
        out = self._launch(self._down, self._down_weights, [hidden, ordered], [])
        each = out[mx.argsort(pairs)].reshape(tokens, top_k, -1)
        return (each * weights[..., None].astype(each.dtype)).sum(axis=1)

    def _launch(
        self,
        kernel: Kernel,
        matrices: list[QuantizedWeight],
        inputs: list[mx.array],
        template: list[tuple[str, int | bool | mx.Dtype]],
    ) -> mx.array:
        first, count = matrices[0], inputs[1].shape[0]
        out_dim, in_dim = first.codes.shape[-2], first.codes.shape[-1] * 32 // first.bits
        sizes: Template = [
            *template,
            *(("T", self._dtype), ("IN", in_dim), ("OUT", out_dim)),
            *(("ROWS", _ROWS), ("COLUMNS", _COLUMNS), ("THREADS", _THREADS)),
            *(
                pair
                for name, matrix in zip(("GATE", "UP"), matrices, strict=False)
                for pair in ((f"{name}_BITS", matrix.bits), (f"{name}_GROUP", matrix.group_size))
            ),
        ]
        (out,) = kernel(
            inputs=[*inputs, *(part for m in matrices for part in (m.codes, m.scales, m.biases))],
            template=sizes,
            grid=(-(-out_dim // _COLUMNS) * _THREADS, -(-count // _ROWS), 1),
            threadgroup=(_THREADS, 1, 1),
            output_shapes=[(count, out_dim)],
            output_dtypes=[self._dtype],
        )
        return out
