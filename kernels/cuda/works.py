"""A program as the work of a step: nodes in order, with sums and norms folded into their neighbours if asked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mixbit.kernels import ops


@dataclass(frozen=True, eq=False)
class Work:
    """One node. x: what it reads instead of its own input, normed by `norm` first. residual: added to its only
    output, which is then `out`, the sum."""

    node: ops.Node
    x: ops.Value | None = None
    norm: ops.Norm | None = None
    residual: ops.Value | None = None
    out: ops.Value | None = None

    @property
    def reads(self) -> tuple[ops.Value, ...]:
        """Values it needs."""
        inputs = inputs_of(self.node) if self.x is None else (self.x,)
        return inputs if self.residual is None else (*inputs, self.residual)

    @property
    def writes(self) -> tuple[ops.Value, ...]:
        """Values it makes."""
        return ops.outputs_of(self.node) if self.out is None else (self.out,)


def inputs_of(node: ops.Node) -> tuple[ops.Value, ...]:
    """Values that a node reads."""
    match node:
        case ops.Embed():
            return ()
        case ops.AddNorm(x, delta):
            return (x, delta)
        case ops.Attention(q, k, v, gate):
            return tuple(columns.value for columns in (q, k, v, gate) if columns is not None)
        case ops.GatedDelta(q, k, v, z, b, a):
            return tuple(columns.value for columns in (q, k, v, z, b, a))
        case _:
            return (node.x,)


def plain(program: ops.Program) -> tuple[Work, ...]:
    """One work for each node."""
    return tuple(Work(node) for node in program.nodes)


def folded(program: ops.Program) -> tuple[Work, ...]:
    """A norm goes to the products that read it, a residual sum to the product that makes its summand."""
    makers = {value: i for i, node in enumerate(program.nodes) for value in ops.outputs_of(node)}
    readers: defaultdict[ops.Value, list[int]] = defaultdict(list)
    for i, node in enumerate(program.nodes):
        for value in inputs_of(node):
            readers[value].append(i)
    works: dict[int, Work] = {i: Work(node) for i, node in enumerate(program.nodes)}
    for i, node in enumerate(program.nodes):
        match node:
            case ops.AddNorm(x, delta, norm, total, out):
                maker = makers[delta]
                if not (_sums(program.nodes[maker]) and readers[delta] == [i] and makers[x] < maker):
                    continue
                works[maker] = replace(works[maker], residual=x, out=total)
                works[i] = Work(ops.RmsNorm(total, norm, out))
            case ops.RmsNorm(total, norm, out):
                pass
            case _:
                continue
        if out is not program.logits and all(_norms(program.nodes[reader]) for reader in readers[out]):
            for reader in readers[out]:
                works[reader] = replace(works[reader], x=total, norm=norm)
            del works[i]
    return tuple(works.values())


def _sums(node: ops.Node) -> bool:
    """Whether the kernels of a node can add a residual."""
    return isinstance(node, ops.Moe | ops.Mlp) or (isinstance(node, ops.BatchMatvec) and len(node.outs) == 1)


def _norms(node: ops.Node) -> bool:
    """Whether the kernels of a node can norm their input."""
    return isinstance(node, ops.BatchMatvec | ops.Moe)


def share_memory(works: Sequence[Work], logits: ops.Value) -> tuple[dict[ops.Value, int], list[int]]:
    """(place of each value, dim of each place): values whose lives do not overlap share a place."""
    last: dict[ops.Value, int] = {}
    for i, work in enumerate(works):
        for value in (*work.reads, *work.writes):
            last[value] = i
    last[logits] = len(works)
    places: dict[ops.Value, int] = {}
    dims: list[int] = []
    free: list[int] = []
    for i, work in enumerate(works):
        for value in work.writes:
            place = _best(free, dims, value.dim)
            if place is None:
                place = len(dims)
                dims.append(0)
            else:
                free.remove(place)
            dims[place] = max(dims[place], value.dim)
            places[value] = place
        free.extend(places[value] for value in _ended(work, last, i))
    return places, dims


def _best(free: Sequence[int], dims: Sequence[int], dim: int) -> int | None:
    """The free place that fits best: the smallest that is large enough, else the largest."""
    enough = [place for place in free if dims[place] >= dim]
    if enough:
        return min(enough, key=lambda place: dims[place])
    return max(free, key=lambda place: dims[place], default=None)


def _ended(work: Work, last: dict[ops.Value, int], i: int) -> Iterator[ops.Value]:
    yield from dict.fromkeys(value for value in (*work.reads, *work.writes) if last[value] == i)
