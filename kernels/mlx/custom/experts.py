"""Router and experts for a few tokens, each in one launch, experts in two."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mixbit.kernels.mlx.custom.launch import Launcher, Template, lanes_for
from mixbit.kernels.mlx.weights import QuantizedWeight

MAX_TOP_K = 32
_SIMDGROUPS = 4
_HIDDEN_ROWS = 2
_PROJECT_ROWS = 4


class Router:
    """Softmax over all logits, the top_k largest, and their weights."""

    def __init__(self, launcher: Launcher, top_k: int, *, normalize: bool) -> None:
        """top_k: at most MAX_TOP_K."""
        self._kernel = launcher.kernel("router", ["logits"], ["experts", "weights"])
        self._top_k, self._normalize = top_k, normalize

    def __call__(self, logits: mx.array) -> tuple[mx.array, mx.array]:
        """logits [tokens, experts] -> experts uint32 and weights float32, [tokens, top_k] each."""
        tokens, count = logits.shape
        shape = (tokens, self._top_k)
        experts, weights = self._kernel(
            inputs=[logits],
            template=[("EXPERTS", count), ("TOP_K", self._top_k), ("NORMALIZE", self._normalize)],
            grid=(tokens * 32, 1, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[shape, shape],
            output_dtypes=[mx.uint32, mx.float32],
        )
        return experts, weights


@dataclass(frozen=True, eq=False)
class QuantizedMlp:
    """A feed-forward [out, in], or a stack of experts [experts, out, in]."""

    gate: QuantizedWeight
    up: QuantizedWeight
    down: QuantizedWeight

    @property
    def hidden(self) -> int:
        """Rows of gate and up."""
        return int(self.gate.codes.shape[-2])


def _arrays(weight: QuantizedWeight) -> tuple[mx.array, mx.array, mx.array]:
    return weight.codes, weight.scales, weight.biases


def _names(prefix: str) -> tuple[str, str, str]:
    return prefix, f"{prefix}_scales", f"{prefix}_biases"


class Experts:
    """Weighted sum of the chosen experts, plus the shared one: gate, up and SwiGLU in one launch, then the rest."""

    def __init__(
        self, launcher: Launcher, experts: QuantizedMlp, shared: QuantizedMlp | None, dtype: mx.Dtype, *, gated: bool
    ) -> None:
        """dtype: of x, the scales and the output. gated: the shared expert has a logit for each token."""
        self._dtype, self._experts, self._shared = dtype, experts, shared
        self._in = experts.gate.codes.shape[-1] * 32 // experts.gate.bits
        self._out = experts.down.codes.shape[-2]
        self._widest = max(experts.hidden, 0 if shared is None else shared.hidden)
        self._make_hidden(launcher)
        self._make_project(launcher, gated)

    def _make_hidden(self, launcher: Launcher) -> None:
        experts, shared = self._experts, self._shared
        self._hidden_lanes = lanes_for(self._in)
        inputs, outputs = ["x", "experts", *_names("gate"), *_names("up")], ["hidden"]
        self._hidden_arrays = [*_arrays(experts.gate), *_arrays(experts.up)]
        template: list[tuple[str, int | bool | mx.Dtype]] = [
            *(("T", self._dtype), ("IN", self._in), ("HIDDEN", experts.hidden), ("ROWS", _HIDDEN_ROWS)),
            *(("LANES", self._hidden_lanes), ("SIMDGROUPS", _SIMDGROUPS)),
            *(("GATE_BITS", experts.gate.bits), ("GATE_GROUP", experts.gate.group_size)),
            *(("UP_BITS", experts.up.bits), ("UP_GROUP", experts.up.group_size)),
        ]
        if shared is not None:
            inputs += [*_names("shared_gate"), *_names("shared_up")]
            outputs += ["shared_hidden"]
            self._hidden_arrays += [*_arrays(shared.gate), *_arrays(shared.up)]
            template += [
                ("SHARED_HIDDEN", shared.hidden),
                *(("SHARED_GATE_BITS", shared.gate.bits), ("SHARED_GATE_GROUP", shared.gate.group_size)),
                *(("SHARED_UP_BITS", shared.up.bits), ("SHARED_UP_GROUP", shared.up.group_size)),
            ]
        self._hidden_template: Template = template
        defines = () if shared is None else ("WITH_SHARED",)
        self._hidden = launcher.kernel("experts_hidden", inputs, outputs, *defines)

    def _make_project(self, launcher: Launcher, gated: bool) -> None:
        down, shared = self._experts.down, self._shared
        self._project_lanes = lanes_for(self._experts.hidden)
        inputs = ["hidden", "experts", "weights", "down", "scales", "biases"]
        self._project_arrays = [*_arrays(down)]
        template: list[tuple[str, int | bool | mx.Dtype]] = [
            *(("T", self._dtype), ("HIDDEN", self._experts.hidden), ("OUT", self._out), ("ROWS", _PROJECT_ROWS)),
            *(("LANES", self._project_lanes), ("SIMDGROUPS", _SIMDGROUPS)),
            *(("BITS", down.bits), ("GROUP", down.group_size)),
        ]
        defines = []
        if shared is not None:
            inputs += ["shared_down", "shared_scales", "shared_biases", "shared_hidden"]
            self._project_arrays += [*_arrays(shared.down)]
            template += [
                ("SHARED_HIDDEN", shared.hidden),
                *(("SHARED_BITS", shared.down.bits), ("SHARED_GROUP", shared.down.group_size)),
            ]
            defines += ["WITH_SHARED"]
            if gated:
                inputs += ["shared_logit"]
                defines += ["WITH_SHARED_LOGIT"]
        self._project_template: Template = template
        self._project = launcher.kernel("experts_project", inputs, ["out"], *defines)

    def __call__(
        self, x: mx.array, experts: mx.array, weights: mx.array, shared_logit: mx.array | None = None
    ) -> mx.array:
        """x [tokens, in]; experts uint32, weights float32 [tokens, top_k]; shared_logit [tokens, 1] -> [tokens, in]."""
        tokens, top_k = experts.shape
        pairs, threads = tokens * top_k, (_SIMDGROUPS * 32, 1, 1)
        shapes = [(pairs, self._experts.hidden)]
        jobs = pairs
        if self._shared is not None:
            shapes.append((tokens, self._shared.hidden))
            jobs += tokens
        tiles = -(-self._widest // (_SIMDGROUPS * _HIDDEN_ROWS * 32 // self._hidden_lanes))
        hidden, *shared_hidden = self._hidden(
            inputs=[x, experts, *self._hidden_arrays],
            template=[*self._hidden_template, ("TOP_K", top_k)],
            grid=(tiles * threads[0], jobs, 1),
            threadgroup=threads,
            output_shapes=shapes,
            output_dtypes=[self._dtype] * len(shapes),
        )
        tiles = -(-self._out // (_PROJECT_ROWS * 32 // self._project_lanes))
        logit = [] if shared_logit is None else [shared_logit]
        (out,) = self._project(
            inputs=[hidden, experts, weights, *self._project_arrays, *shared_hidden, *logit],
            template=[*self._project_template, ("TOP_K", top_k)],
            grid=(tiles * threads[0], tokens, 1),
            threadgroup=threads,
            output_shapes=[(tokens, self._out)],
            output_dtypes=[self._dtype],
        )
        return out
