"""What a step must move and compute at least, from the program: the base of every floor."""

from __future__ import annotations

from dataclasses import dataclass

from mixbit.engine.sizing import slot_bytes
from mixbit.kernels.ops import Attention, BatchMatvec, Embed, GatedDelta, Mlp, MlpSpec, Moe, Program, Rows
from mixbit.kernels.spec import Matrix


@dataclass(frozen=True)
class Cost:
    """Of one step. matrix_operations: those on weights; operations: of attention and the gated delta net.

    A multiplication and an addition are two operations.
    """

    bytes: float
    matrix_operations: float
    operations: float


def step_cost(program: Program, sequences: int, tokens: int, context: int, kv_token_bytes: float) -> Cost:
    """A step of `tokens` new tokens after `context` in each of the sequences, with logits for the last of each.

    kv_token_bytes: keys and values of one token in all layers. Of experts, those count that so many tokens
    are expected to choose if each chooses freely.
    """
    rows = {Rows.TOKENS: sequences * tokens, Rows.SELECTED: sequences}
    moved = sequences * (kv_token_bytes * (context + tokens) + 2 * slot_bytes(program))
    matrix_operations = operations = 0.0
    seen: set[str] = set()
    for node in program.nodes:
        uses: list[tuple[Matrix, float, float]] = []  # matrix, part of it that is read, rows it is applied to
        match node:
            case Embed():
                moved += rows[Rows.TOKENS] * node.table.nbytes / node.table.out_dim
            case BatchMatvec():
                uses = [(spec.matrix, 1, rows[node.x.rows]) for spec in node.specs]
            case Mlp():
                uses = [(matrix, 1, rows[node.x.rows]) for matrix in _parts(node.spec)]
            case Moe():
                spec, count = node.spec, rows[node.x.rows]
                share = spec.top_k / spec.router.out_dim
                uses = [(spec.router, 1, count)]
                uses += [(matrix, 1 - (1 - share) ** count, count * share) for matrix in _parts(spec.experts)]
                uses += [(matrix, 1, count) for matrix in (_parts(spec.shared) if spec.shared else ())]
                uses += [(spec.shared_gate, 1, count)] if spec.shared_gate else []
            case Attention():
                attended = tokens * (context + (tokens + 1) / 2)
                operations += sequences * attended * 4 * node.spec.heads * node.spec.head_dim
            case GatedDelta():
                delta = node.spec
                operations += rows[Rows.TOKENS] * 7 * delta.value_heads * delta.value_dim * delta.key_dim
        for matrix, part, applied in uses:
            moved += 0 if matrix.name in seen else matrix.nbytes * part
            seen.add(matrix.name)
            matrix_operations += 2 * applied * matrix.out_dim * matrix.in_dim * (matrix.experts or 1)
    return Cost(moved, matrix_operations, operations)


def _parts(spec: MlpSpec) -> tuple[Matrix, ...]:
    return (spec.gate, spec.up, spec.down)
