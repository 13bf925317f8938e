"""What a step must move and compute at least, and so the rate that no implementation on this machine can pass.

The floor of a step is the larger of: its bytes over the measured bandwidth, and its operations over the
measured rates (matrices at the int8 rate in the fast mode, all else at the float32 rate).
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from mixbit.engine.sizing import slot_bytes
from mixbit.kernels.ops import Attention, BatchMatvec, Embed, GatedDelta, Mlp, MlpSpec, Moe, Program, Rows
from mixbit.kernels.spec import Matrix


@dataclass(frozen=True)
class Rates:
    """read: bytes a second. int8, float32: operations a second (a multiplication and an addition are two)."""

    read: float
    int8: float
    float32: float

    def best(self, other: Rates) -> Rates:
        """The larger of each."""
        return Rates(max(self.read, other.read), max(self.int8, other.int8), max(self.float32, other.float32))


def measure(program: Path, threads: int) -> Rates:
    """Run bench/rates.cpp, compiled as `program`."""
    result = subprocess.run([str(program), str(threads)], capture_output=True, text=True, check=True)
    return Rates(**json.loads(result.stdout))


@dataclass(frozen=True)
class Cost:
    """Of one step. matrix_operations: those on weights; operations: of attention and the gated delta net."""

    bytes: float
    matrix_operations: float
    operations: float

    def seconds(self, rates: Rates, *, exact: bool) -> float:
        """The floor."""
        matrix_rate = rates.float32 if exact or rates.int8 == 0 else rates.int8
        return max(self.bytes / rates.read, self.matrix_operations / matrix_rate + self.operations / rates.float32)


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
        for matrix, part, count in uses:
            moved += 0 if matrix.name in seen else matrix.nbytes * part
            seen.add(matrix.name)
            matrix_operations += 2 * count * matrix.out_dim * matrix.in_dim * (matrix.experts or 1)
    return Cost(moved, matrix_operations, operations)


def _parts(spec: MlpSpec) -> tuple[Matrix, ...]:
    return (spec.gate, spec.up, spec.down)
