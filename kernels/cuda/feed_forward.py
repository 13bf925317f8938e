"""Feed-forwards of few rows: alone, or as a mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mixbit.kernels.cuda.compiler import Source
from mixbit.kernels.cuda.driver import Addressed
from mixbit.kernels.cuda.linear import Choice, FoldedNorm, Kind, Output, linear
from mixbit.kernels.cuda.plan import NULL, Planned, Scratch, addresses, ceil_div, format_defines, group_of, padded
from mixbit.kernels.cuda.prefill import Weights
from mixbit.kernels.cuda.prefill_moe import MlpWeights
from mixbit.kernels.cuda.step import as_struct

_MOST_WARPS = 16
_WARPS_OF_ONE = 24  # where one row's experts are all there is
_ROWS = 16  # of a tile


def _tiles(rows: int) -> int:
    """Tiles of a block: the more blocks there are, the more of a matrix each takes for what it prepares."""
    return 1 if rows <= 1 else 2 if rows < 4 else 4


@dataclass(frozen=True, eq=False)
class MoeWeights:
    """A mixture of experts on the device."""

    router: Weights
    experts: MlpWeights
    top_k: int
    normalize: bool
    shared: MlpWeights | None
    shared_gate: Weights | None


def _alike(*pairs: Weights) -> bool:
    """Whether the first of each two is stored as the second."""
    forms = [format_defines("", weights) for weights in pairs]
    return forms[::2] == forms[1::2]


def _hidden(
    kind: Kind,
    x: Addressed,
    norm: FoldedNorm | None,
    chosen: Addressed | np.uint64,
    routed: MlpWeights | None,
    shared: MlpWeights | None,
    outs: tuple[Addressed | np.uint64, Addressed | np.uint64],
    top_k: int,
    rows: int,
) -> Planned:
    """Hidden activations of the chosen experts and of the shared one."""
    some = routed or shared
    assert some is not None
    warps = kind.warps(some.gate.depth)
    defines = [*kind.defines, f"DIM {some.gate.depth}", f"WARPS {warps}", f"TOP_K {top_k}"]
    tiles = min(_tiles(rows), 4 * 8 // warps)  # sums of a block take 1 KB a warp and tile
    defines.append(f"TILES {tiles}")
    if routed is not None and shared is not None and _alike(routed.gate, shared.gate, routed.up, shared.up):
        defines.append("ONE_FORMAT")
    for name, part in (("HIDDEN", routed), ("SHARED_HIDDEN", shared)):
        defines.append(f"{name} {0 if part is None else part.gate.rows}")
    if routed is not None:
        defines += ["ROUTED", *format_defines("GATE", routed.gate), *format_defines("UP", routed.up)]
    if shared is not None:
        defines.append("WITH_SHARED")
        defines += [*format_defines("SHARED_GATE", shared.gate), *format_defines("SHARED_UP", shared.up)]
    parts = [NULL.item()] * 6 if routed is None else [*addresses(routed.gate), *addresses(routed.up)]
    shared_parts = [NULL.item()] * 6 if shared is None else [*addresses(shared.gate), *addresses(shared.up)]
    widest = max(part.gate.rows for part in (routed, shared) if part is not None)
    jobs = rows * top_k + (0 if shared is None else ceil_div(rows, 8))
    if norm is not None:
        defines.append("WITH_NORM")
    normed = (NULL, np.float32(0)) if norm is None else (norm.weight, np.float32(norm.eps))
    arguments = (x, *normed, chosen, as_struct("<6Q", *parts), as_struct("<6Q", *shared_parts), *outs, np.int32(rows))
    grid = (jobs, ceil_div(widest, tiles * _ROWS), 1)
    return Planned(Source("experts_hidden.cu", tuple(defines)), "experts_hidden", grid, 32 * warps, arguments)


def mlp(
    kind: Kind,
    weights: MlpWeights,
    x: Addressed,
    out: Addressed,
    scratch: Scratch,
    rows: int,
    residual: Addressed | None,
) -> list[Planned]:
    """out = down(silu(gate x) * up x), plus residual."""
    width = 4 if kind.dtype == "float32" else 2
    hidden = scratch("hidden", rows * weights.gate.rows * width)
    return [
        _hidden(kind, x, None, NULL, None, weights, (NULL, hidden), 0, rows),
        linear(kind, hidden, [Output(weights.down, out)], rows, residual=residual),
    ]


def moe(
    kind: Kind,
    weights: MoeWeights,
    x: Addressed,
    out: Addressed,
    scratch: Scratch,
    rows: int,
    norm: FoldedNorm | None,
    residual: Addressed | None,
) -> list[Planned]:
    """Choose, then the hidden activations, then their weighted sum: three launches."""
    width = 4 if kind.dtype == "float32" else 2
    experts, shared = weights.experts, weights.shared
    pairs = rows * weights.top_k
    logits = scratch("logits", rows * weights.router.rows * 4)
    shared_logit = scratch("shared logit", rows * 4)
    chosen, factors = scratch("experts", pairs * 4), scratch("expert weights", pairs * 4)
    hidden = scratch("hidden", pairs * experts.gate.rows * width)
    shared_hidden = NULL if shared is None else scratch("shared hidden", rows * shared.gate.rows * width)
    arrived = scratch("routers arrived", ceil_div(rows, 8) * 4)
    outputs = [Output(weights.router, logits, exact=True)]
    if weights.shared_gate is not None:
        outputs.append(Output(weights.shared_gate, shared_logit, exact=True))
    choice = Choice(weights.top_k, weights.normalize, chosen, factors, arrived)
    return [
        linear(kind, x, outputs, rows, norm=norm, choice=choice),
        _hidden(kind, x, norm, chosen, experts, shared, (hidden, shared_hidden), weights.top_k, rows),
        _project(kind, weights, (hidden, shared_hidden, chosen, factors, shared_logit), out, rows, residual),
    ]


def _project(
    kind: Kind,
    weights: MoeWeights,
    made: tuple[Addressed | np.uint64, ...],
    out: Addressed,
    rows: int,
    residual: Addressed | None,
) -> Planned:
    """The weighted sum of the experts' outputs."""
    down, shared = weights.experts.down, weights.shared
    jobs = weights.top_k + (shared is not None)
    most = _WARPS_OF_ONE if rows == 1 else _MOST_WARPS
    split = max(1, min(ceil_div(padded(down) // group_of(down), 4), most // jobs))
    warps = min(most, jobs * split)
    defines = [*kind.defines, f"OUT {down.rows}", f"WARPS {warps}", f"SPLIT {split}", f"TOP_K {weights.top_k}"]
    tiles = _tiles(rows)
    defines += [
        f"TILES {tiles}",
        f"SHARED_JOBS {int(shared is not None)}",
        f"HIDDEN {down.depth}",
        *format_defines("DOWN", down),
    ]
    parts = [NULL.item()] * 3
    if shared is not None:
        defines += ["WITH_SHARED", f"SHARED_HIDDEN {shared.down.depth}", *format_defines("SHARED_DOWN", shared.down)]
        parts = list(addresses(shared.down))
    if shared is None or (_alike(down, shared.down) and down.depth == shared.down.depth):
        defines.append("ONE_FORMAT")
    if weights.shared_gate is not None:
        defines.append("WITH_SHARED_LOGIT")
    if residual is not None:
        defines.append("WITH_RESIDUAL")
    arguments = (
        *made,
        NULL if residual is None else residual,
        as_struct("<3Q", *addresses(down)),
        as_struct("<3Q", *parts),
        out,
    )
    grid = (rows, ceil_div(down.rows, tiles * _ROWS), 1)
    return Planned(Source("experts_project.cu", tuple(defines)), "experts_project", grid, 32 * warps, arguments)
