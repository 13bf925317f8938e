"""Feed-forwards of many tokens: SwiGLU, alone or as a mixture of experts with the tokens grouped by expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mixbit.kernels.cuda.compiler import Source
from mixbit.kernels.cuda.driver import Addressed, Device, Function, Launch
from mixbit.kernels.cuda.prefill import F32, LOW, MOST_SHARED, NULL, SQUARE, Block, Format, Modules, Weights, ceil_div
from mixbit.kernels.cuda.prefill_linear import Linear, Output, choose_block
from mixbit.kernels.ops import MlpSpec, MoeSpec

_MOST_EXPERTS = 8192  # whose counters fit in shared memory


@dataclass(frozen=True, eq=False)
class MlpWeights:
    """gate and up [hidden, dim], of one format; down [dim, hidden]. For experts each is a stack."""

    gate: Weights
    up: Weights
    down: Weights


def mlp_applies(spec: MlpSpec) -> bool:
    """Whether the kernels serve this feed-forward, or these experts."""
    alike = Format.of(spec.gate) == Format.of(spec.up)
    return alike and spec.gate.in_dim % 32 == 0 and spec.down.in_dim % 32 == 0


def moe_applies(spec: MoeSpec) -> bool:
    """Whether the kernels serve this mixture."""
    shared = spec.shared is None or mlp_applies(spec.shared)
    return mlp_applies(spec.experts) and shared and spec.router.out_dim <= _MOST_EXPERTS


def _source(block: Block, form: Format, *, gated: bool) -> Source:
    defines = (f"FORMAT {form.bits}, {form.group_size}, {form.dtype}", f"GATED {int(gated)}", *block.defines)
    return Source("prefill_experts.cu", defines)


@dataclass(frozen=True, eq=False)
class _Grouping:
    """Where the pairs lie, grouped by expert: what prefill_scan and prefill_scatter leave. most: tiles there can be."""

    tiles: Addressed
    tile_count: Addressed
    order: Addressed
    top_k: int
    most: int


def _product(
    block: Block, modules: Modules, parts: Sequence[Weights], x: Addressed, out: Addressed, rows: int | _Grouping
) -> Launch:
    """One launch of prefill_experts: `parts` is (gate, up) or (down,); rows of x, or pairs that are grouped."""
    first, last = parts[0], parts[-1]
    source = _source(block, first.format, gated=len(parts) == 2)
    kernel = modules[source].function("prefill_experts", block.shared(first.format.bits))
    where: tuple[Addressed | np.generic, ...]
    if isinstance(rows, _Grouping):
        where = (rows.tiles, rows.tile_count, rows.order, np.int32(rows.top_k), np.int32(0))
        tiles = rows.most
    else:
        where = (NULL, NULL, NULL, np.int32(1), np.int32(rows))
        tiles = ceil_div(rows, block.tokens)
    arguments = (
        *(_or_null(part) for part in (first.codes, first.scales, first.biases, last.codes, last.scales, last.biases)),
        *(x, out, *where, np.int32(first.rows), np.int32(first.depth)),
    )
    grid = (ceil_div(first.rows, block.columns // len(parts)), tiles, 1)
    return Launch(kernel, grid, (block.threads, 1, 1), arguments)


def _or_null(place: Addressed | None) -> Addressed | np.uint64:
    return NULL if place is None else place


class Mlp:
    """out = down(silu(gate x) * up x). hidden: room for bfloat16 [tokens, hidden]."""

    def __init__(self, device: Device, weights: MlpWeights, x: Addressed, hidden: Addressed, out: Addressed) -> None:
        self._device, self._weights, self._x, self._hidden, self._out = device, weights, x, hidden, out
        self._blocks = [block for block in (SQUARE, LOW) if _widest(weights, block) <= MOST_SHARED]

    @property
    def sources(self) -> tuple[Source, ...]:
        """What must be compiled."""
        weights = self._weights
        return tuple(
            _source(block, part.format, gated=gated)
            for block in self._blocks
            for part, gated in ((weights.gate, True), (weights.down, False))
        )

    def launches(self, modules: Modules, tokens: int) -> list[Launch]:
        """The feed-forward of `tokens` rows."""
        weights = self._weights
        launches = []
        for parts, x, out in (
            ((weights.gate, weights.up), self._x, self._hidden),
            ((weights.down,), self._hidden, self._out),
        ):
            columns = [part.rows for part in parts]
            block = choose_block(self._blocks, columns, tokens, self._device.multiprocessors)
            launches.append(_product(block, modules, parts, x, out, tokens))
        return launches


def _widest(weights: MlpWeights, block: Block) -> int:
    return max(block.shared(part.format.bits) for part in (weights.gate, weights.down))


class MoeScratch:
    """What a mixture needs between its kernels; one serves all layers of the same sizes. 84 MB for the sums of 2,048
    tokens of Qwen3-Coder-Next."""

    def __init__(self, device: Device, spec: MoeSpec, max_tokens: int) -> None:
        pairs, experts, dim = max_tokens * spec.top_k, spec.router.out_dim, spec.router.in_dim
        self.tiles_most = most_tiles(pairs, experts)
        self.logits = device.alloc(max_tokens * experts * 4)
        self.places = device.alloc(experts * 4)
        self.experts, self.weights, self.order, self.row_of = (device.alloc(pairs * 4) for _ in range(4))
        self.tiles, self.tile_count = device.alloc(self.tiles_most * 16), device.alloc(16)
        self.hidden = device.alloc(pairs * spec.experts.gate.out_dim * 2)
        self.results = device.alloc(pairs * dim * 2)
        shared_hidden = 0 if spec.shared is None else spec.shared.gate.out_dim
        self.shared_hidden = device.alloc(max_tokens * shared_hidden * 2)
        self.shared = device.alloc(max_tokens * dim * 2 if spec.shared is not None else 0)
        self.shared_gate = device.alloc(max_tokens * 4)


def most_tiles(pairs: int, experts: int) -> int:
    """The most tiles that so many pairs over so many experts can make."""
    return min(pairs, experts + pairs // LOW.tokens)


class Moe:
    """out = mixture of experts of x; weights as on the device."""

    def __init__(
        self,
        device: Device,
        spec: MoeSpec,
        router: Weights,
        experts: MlpWeights,
        shared: MlpWeights | None,
        shared_gate: Weights | None,
        scratch: MoeScratch,
        x: Addressed,
        out: Addressed,
    ) -> None:
        self._spec, self._experts, self._scratch, self._x, self._out = spec, experts, scratch, x, out
        outputs = [Output(router, scratch.logits, F32)]
        if shared_gate is not None:
            outputs.append(Output(shared_gate, scratch.shared_gate, F32))
        self._gates = Linear(device, x, outputs)
        self._gated = shared_gate is not None
        self._shared = None if shared is None else Mlp(device, shared, x, scratch.shared_hidden, scratch.shared)
        self._around = Source("prefill_moe.cu", (f"EXPERTS {spec.router.out_dim}", f"BM {LOW.tokens}"))

    @property
    def sources(self) -> tuple[Source, ...]:
        """What must be compiled."""
        shared = () if self._shared is None else self._shared.sources
        gated = _source(LOW, self._experts.gate.format, gated=True)
        return (
            *self._gates.sources,
            *shared,
            self._around,
            gated,
            _source(LOW, self._experts.down.format, gated=False),
        )

    def launches(self, modules: Modules, tokens: int) -> list[Launch]:
        """The mixture for `tokens` rows."""
        spec, scratch, experts = self._spec, self._scratch, self._experts
        top_k, pairs = np.int32(spec.top_k), tokens * spec.top_k

        def around(name: str) -> Function:
            return modules[self._around].function(name)

        route = (scratch.logits, scratch.experts, scratch.weights, np.int32(tokens), top_k, np.int32(spec.normalize))
        scan = (scratch.experts, scratch.places, scratch.tiles, scratch.tile_count, np.int32(pairs))
        scatter = (scratch.experts, scratch.places, scratch.order, scratch.row_of, np.int32(pairs))
        most = most_tiles(pairs, spec.router.out_dim)
        grouping = _Grouping(scratch.tiles, scratch.tile_count, scratch.order, spec.top_k, most)
        shared = self._shared is not None
        combine = (
            scratch.results,
            scratch.row_of,
            scratch.weights,
            scratch.shared if shared else NULL,
            scratch.shared_gate if self._gated else NULL,
            self._out,
            top_k,
            np.int32(spec.router.in_dim),
        )
        return [
            *self._gates.launches(modules, tokens),
            Launch(around("prefill_route"), (ceil_div(tokens, 4), 1, 1), (128, 1, 1), route),
            Launch(around("prefill_scan"), (1, 1, 1), (1024, 1, 1), scan),
            Launch(around("prefill_scatter"), (ceil_div(pairs, 256), 1, 1), (256, 1, 1), scatter),
            _product(LOW, modules, (experts.gate, experts.up), self._x, scratch.hidden, grouping),
            _product(LOW, modules, (experts.down,), scratch.hidden, scratch.results, grouping),
            *([] if self._shared is None else self._shared.launches(modules, tokens)),
            Launch(around("prefill_combine"), (tokens, 1, 1), (256, 1, 1), combine),
        ]
