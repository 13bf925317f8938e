"""Which experts a backend chooses, seen from outside: no backend has to tell.

The experts of one layer are replaced by probes. Probe e writes to value e of the output alone, so that the
values that are not zero are the experts that were chosen, by the very operation that chooses them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mixbit.engine.errors import UserError
from mixbit.engine.loader import load
from mixbit.engine.tokenizer import load_tokenizer
from mixbit.kernels.executor import Batch, CacheConfig, ExecutorOptions
from mixbit.kernels.ops import Embed, MlpSpec, Moe, MoeSpec, Program, Rows, SelectRows, Value
from mixbit.kernels.registry import choose
from mixbit.kernels.spec import DenseTensor, QuantizedTensor

Floats = npt.NDArray[np.float32]
Chosen = npt.NDArray[np.bool_]  # [tokens, experts]

_INNER, _BITS, _GROUP = 32, 4, 32
_BLOCK = 32
_CHUNK = 256  # tokens of a step


@dataclass(frozen=True, eq=False)
class ExpertLoad:
    """How often each expert was chosen. counts: [layers with experts, experts]; tokens: that were routed."""

    counts: npt.NDArray[np.int64]
    tokens: int

    @property
    def shares(self) -> Floats:
        """Of the mean load of the layer's experts: 1 if all are used equally, 0 for a dead expert."""
        shares: Floats = (self.counts / self.counts.mean(1, keepdims=True)).astype(np.float32)
        return shares

    @property
    def dead(self) -> list[tuple[int, int]]:
        """(layer with experts, expert) of those that no token chose."""
        return [(int(layer), int(expert)) for layer, expert in np.argwhere(self.counts == 0)]


def expert_load(model: Path, text: str, most: int) -> ExpertLoad:
    """Route the first `most` tokens of a text (fewer if the context is shorter), in the exact precision on the CPU.

    Every layer is a run of its own up to there. Raises UserError if the model has no experts, or the text no tokens.
    """
    loaded = load(model)
    places = moe_layers(loaded.program)
    if not places:
        raise UserError(f"{model}: a {loaded.model_type} model without experts has no routing to show")
    ids = load_tokenizer(model).encode(text, add_special_tokens=False)[: min(most, loaded.context_length)]
    if not ids:
        raise UserError("the text to be routed has no tokens")
    options = ExecutorOptions(max_tokens=_CHUNK)
    tokens = np.array(ids, np.int32)
    counts = [chosen_after(loaded.program, place, tokens, options).sum(0) for place in places]
    return ExpertLoad(np.array(counts, np.int64), len(ids))


def moe_layers(program: Program) -> list[int]:
    """Places of the mixtures of experts among the program's nodes."""
    return [place for place, node in enumerate(program.nodes) if isinstance(node, Moe)]


def router_inputs(program: Program, place: int, tokens: npt.NDArray[np.int32], options: ExecutorOptions) -> Floats:
    """What the router at `place` is given for each of the tokens: [tokens, dim]."""
    node = program.nodes[place]
    assert isinstance(node, Moe)
    return _run(_ended(program, place, node.x), tokens, options)


def chosen_after(program: Program, place: int, tokens: npt.NDArray[np.int32], options: ExecutorOptions) -> Chosen:
    """Experts chosen at `place` when everything before it is computed with the same options."""
    node = program.nodes[place]
    assert isinstance(node, Moe)
    probed = Moe(node.x, _probed(node.spec), node.out)
    before = Program((*program.nodes[:place], probed), program.values, program.logits)
    return _chosen(_run(_ended(before, place + 1, node.out), tokens, options), node.spec)


def chosen_for(spec: MoeSpec, inputs: Floats, options: ExecutorOptions) -> Chosen:
    """Experts chosen for given inputs of the router, [tokens, dim]."""
    count, dim = inputs.shape
    x, out = Value(0, dim, Rows.TOKENS), Value(1, dim, Rows.TOKENS)
    table = DenseTensor("inputs", inputs)
    program = Program((Embed(table, x), Moe(x, _probed(spec), out)), (x, out), out)
    return _chosen(_run(_ended(program, 2, out), np.arange(count, dtype=np.int32), options), spec)


def _ended(program: Program, place: int, result: Value) -> Program:
    """The nodes before `place`, with rows of `result` in place of logits."""
    nodes, values = program.nodes[:place], program.values
    if result.rows is Rows.TOKENS:
        selected = Value(len(values), result.dim, Rows.SELECTED)
        return Program((*nodes, SelectRows(result, selected)), (*values, selected), selected)
    return Program(nodes, values, result)


def _probed(spec: MoeSpec) -> MoeSpec:
    experts, dim = spec.router.out_dim, spec.router.in_dim
    if dim < experts:
        raise ValueError(f"{experts} experts cannot be told apart in outputs of {dim} values")
    random = np.random.default_rng(0)

    def stack(name: str, rows: int, cols: int, scales: Any) -> QuantizedTensor:
        codes = random.integers(0, 1 << 32, (experts, rows, cols * _BITS // 32), np.uint32)
        full = np.broadcast_to(scales, (experts, rows, cols // _GROUP)).astype(np.float32)
        return QuantizedTensor(name, codes, full, full * np.float32(-7.4), _BITS, _GROUP, "affine")

    spread = np.float32(0.2 * dim**-0.5)
    own = np.zeros((experts, dim, 1), np.float32)
    own[np.arange(experts), np.arange(experts)] = 1
    probes = MlpSpec(
        stack("probe.gate", _INNER, dim, spread),
        stack("probe.up", _INNER, dim, spread),
        stack("probe.down", dim, _INNER, own),
    )
    return MoeSpec(spec.router, probes, spec.top_k, spec.normalize)


def _chosen(outputs: Floats, spec: MoeSpec) -> Chosen:
    chosen: Chosen = outputs[:, : spec.router.out_dim] != 0
    counts = chosen.sum(1)
    if (counts != spec.top_k).any():
        raise ValueError(f"{counts.min()} to {counts.max()} experts show, {spec.top_k} were to be chosen")
    return chosen


def _run(program: Program, tokens: npt.NDArray[np.int32], options: ExecutorOptions) -> Floats:
    """The program's result for every token of one sequence."""
    blocks = -(-len(tokens) // _BLOCK)
    executor = choose("cpu").backend.compile(program, CacheConfig(blocks, _BLOCK, 1), options)
    parts = []
    for start in range(0, len(tokens), options.max_tokens):
        part = tokens[start : start + options.max_tokens]
        batch = Batch(
            tokens=part,
            query_starts=np.array([0, len(part)], np.int32),
            context_lengths=np.array([start], np.int32),
            block_tables=np.arange(blocks, dtype=np.int32)[None],
            state_slots=np.zeros(1, np.int32),
            logit_rows=np.arange(len(part), dtype=np.int32),
        )
        parts.append(executor.run(batch).copy())
    return np.concatenate(parts)
