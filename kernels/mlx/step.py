"""A batch as the device sees it, sorted so that sequences of one shape are neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mixbit.kernels.executor import Batch


@dataclass(frozen=True, eq=False)
class Group:
    """Neighbouring sequences with equally many new tokens and contexts of similar length.

    rows: where their tokens lie in the step. new: tokens of each. slots: the state slot of each.
    continued: bool [sequences], false for a sequence whose state is zero; None if all have a state.
    tables: int32 [sequences, blocks]. context: length of the longest, new tokens included.
    mask: what each new token may see, for scaled_dot_product_attention.
    """

    rows: slice
    new: int
    slots: tuple[int, ...]
    continued: mx.array | None
    tables: mx.array
    context: int
    mask: mx.array | str | None


@dataclass(frozen=True, eq=False)
class Step:
    """The arrays that the nodes of a step share, made once.

    tokens, positions: int32 [tokens]. places: int32 [tokens], the index of each token in the KV pools,
    counted in tokens. logit_rows: int32 [selected].
    """

    tokens: mx.array
    positions: mx.array
    places: mx.array
    logit_rows: mx.array
    groups: tuple[Group, ...]

    @classmethod
    def prepare(cls, batch: Batch, block_size: int) -> Step:
        """Reorder the sequences of the batch by shape; the order of the logits stays."""
        new = np.diff(batch.query_starts)
        ends = batch.context_lengths + new
        # Within a group contexts are padded to the longest, at most about four times too long.
        shapes = [(int(n), int(end).bit_length() // 2) for n, end in zip(new, ends, strict=True)]
        order = sorted(range(len(shapes)), key=shapes.__getitem__)
        rows = np.concatenate([np.arange(*batch.query_starts[s : s + 2]) for s in order])
        moved = np.empty_like(rows)
        moved[rows] = np.arange(len(rows))

        positions = batch.positions
        sequence = np.repeat(np.arange(len(new)), new)
        places = batch.block_tables[sequence, positions // block_size] * block_size + positions % block_size
        groups, start = [], 0
        for _, members in groupby(order, key=shapes.__getitem__):
            group = _group(batch, np.array(list(members)), start, block_size)
            groups.append(group)
            start = group.rows.stop
        return cls(
            mx.array(batch.tokens[rows]),
            mx.array(positions[rows]),
            mx.array(places[rows].astype(np.int32)),
            mx.array(moved[batch.logit_rows].astype(np.int32)),
            tuple(groups),
        )


def _group(batch: Batch, members: npt.NDArray[np.intp], start: int, block_size: int) -> Group:
    contexts = batch.context_lengths[members]
    new = int(np.diff(batch.query_starts)[members[0]])
    longest = int(contexts.max()) + new
    tables = batch.block_tables[members, : -(-longest // block_size)]
    continued = contexts > 0
    return Group(
        rows=slice(start, start + new * len(members)),
        new=new,
        slots=tuple(batch.state_slots[members].tolist()),
        continued=None if continued.all() else mx.array(continued),
        tables=mx.array(np.maximum(tables, 0)),  # what a shorter sequence lacks is masked
        context=longest,
        mask=_mask(contexts, new, longest),
    )


def _mask(contexts: npt.NDArray[np.int32], new: int, longest: int) -> mx.array | str | None:
    if (contexts == contexts[0]).all():
        return "causal" if new > 1 else None
    last_seen = contexts[:, None] + np.arange(new)
    return mx.array(np.arange(longest) <= last_seen[:, None, :, None])
