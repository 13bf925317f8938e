"""Random tensors, one-node programs and batches for tests of the op table.

A program's only input is tokens, so activations are fed as rows of a dense float32 embedding table:
`feed(x)` starts a program whose first value is x, one token for each row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from mixbit.kernels.executor import Batch, CacheConfig, Executor
from mixbit.kernels.ops import MlpSpec, MoeSpec, Norm, Program, ProgramBuilder, Value
from mixbit.kernels.reference.packing import pack
from mixbit.kernels.spec import DenseTensor, Matrix, QuantizedTensor

FloatArray = npt.NDArray[np.float32]
Tokens = Sequence[int] | npt.NDArray[Any]

DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

CACHE = CacheConfig(blocks=24, block_size=4, state_slots=6)


class Tensors:
    """Named random tensors, from one seed. Matrices keep the size of what they are applied to."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self._count = 0

    def _name(self, kind: str) -> str:
        self._count += 1
        return f"{kind}{self._count}"

    def values(self, *shape: int, scale: float = 1.0) -> FloatArray:
        """Normal activations."""
        return (self.rng.standard_normal(shape) * scale).astype(np.float32)

    def dense(self, *shape: int, dtype: str = "float32", scale: float | None = None) -> DenseTensor:
        """[..., out, in] or [n]; scale: standard deviation, 1 / sqrt(in) if not given."""
        scale = shape[-1] ** -0.5 if scale is None else scale
        return DenseTensor(self._name("dense"), self.values(*shape, scale=scale).astype(DTYPES[dtype]))

    def quantized(self, *shape: int, bits: int, group_size: int = 32, dtype: str = "float32") -> QuantizedTensor:
        """[..., out, in] with uniform codes, scales of both signs, and biases that roughly centre the values."""
        *lead, in_dim = shape
        codes = self.rng.integers(0, 2**bits, shape, dtype=np.uint8)
        groups = (*lead, in_dim // group_size)
        span = np.sqrt(12.0 / in_dim) * self.rng.uniform(0.5, 1.5, groups) * self.rng.choice([-1, 1], groups)
        scales = span / 2**bits
        biases = -span / 2 + self.rng.standard_normal(groups) * 0.2 * np.abs(span)
        kept = DTYPES[dtype]
        return QuantizedTensor(
            self._name(f"q{bits}g{group_size}"),
            pack(codes, bits),
            scales.astype(kept),
            biases.astype(kept),
            bits=bits,
            group_size=group_size,
            mode="affine",
        )

    def matrix(self, *shape: int, bits: int | None, group_size: int = 32, dtype: str = "float32") -> Matrix:
        """Dense where bits is None, else quantized."""
        if bits is None:
            return self.dense(*shape, dtype=dtype)
        return self.quantized(*shape, bits=bits, group_size=group_size, dtype=dtype)

    def norm(self, dim: int, eps: float = 1e-6, dtype: str = "float32") -> Norm:
        """Weights around 1."""
        return Norm(DenseTensor(self._name("norm"), (1 + self.values(dim, scale=0.3)).astype(DTYPES[dtype])), eps)

    def mlp(self, dim: int, hidden: int, *stack: int, bits: int | None = 4, group_size: int = 32) -> MlpSpec:
        """A feed-forward, or a stack of experts."""
        shapes = (hidden, dim), (hidden, dim), (dim, hidden)
        return MlpSpec(*(self.matrix(*stack, *shape, bits=bits, group_size=group_size) for shape in shapes))

    def moe(
        self,
        dim: int = 64,
        hidden: int = 32,
        experts: int = 8,
        top_k: int = 3,
        *,
        bits: int | None = 4,
        router_bits: int | None = 8,
        normalize: bool = True,
        shared: bool = True,
        shared_gate: bool = True,
    ) -> MoeSpec:
        """Experts at `bits`, router and shared gate at `router_bits`."""
        return MoeSpec(
            router=self.matrix(experts, dim, bits=router_bits),
            experts=self.mlp(dim, hidden, experts, bits=bits),
            top_k=top_k,
            normalize=normalize,
            shared=self.mlp(dim, 2 * hidden, bits=bits) if shared else None,
            shared_gate=self.matrix(1, dim, bits=router_bits) if shared and shared_gate else None,
        )


def feed(x: FloatArray) -> tuple[ProgramBuilder, Value]:
    """A builder and its first value: row t of x for token t."""
    builder = ProgramBuilder()
    return builder, builder.embed(DenseTensor("activations", x))


def program_of(x: FloatArray, verb: Callable[[ProgramBuilder, Value], Value]) -> Program:
    """The program whose output is verb(x), for the rows that a batch selects."""
    builder, value = feed(x)
    return builder.build(builder.select_rows(verb(builder, value)))


def all_rows(tokens: Tokens) -> Batch:
    """One new sequence of these tokens, every row selected."""
    return Sequences(CACHE, count=1).step({0: tokens})


@dataclass
class Sequences:
    """Sequences that own scattered blocks and slots of a cache, and remember how far they are."""

    cache: CacheConfig
    count: int
    seed: int = 0
    lengths: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        each = self.cache.blocks // self.count
        self._blocks = rng.permutation(self.cache.blocks)[: each * self.count].reshape(self.count, each)
        self._slots = rng.permutation(self.cache.state_slots)[: self.count]

    def step(self, tokens: Mapping[int, Tokens], logit_rows: Sequence[int] | None = None) -> Batch:
        """The batch that appends these tokens to these sequences, in the order given.

        logit_rows: all rows if not given.
        """
        counts = [len(new) for new in tokens.values()]
        starts = np.concatenate([[0], np.cumsum(counts)])
        contexts = [self.lengths.get(s, 0) for s in tokens]
        needed = [-(-(c + n) // self.cache.block_size) for c, n in zip(contexts, counts, strict=True)]
        tables = np.full((len(tokens), max(needed)), -1)
        for row, (s, blocks) in enumerate(zip(tokens, needed, strict=True)):
            assert blocks <= len(self._blocks[s]), "the sequence outgrew its blocks"
            tables[row, :blocks] = self._blocks[s, :blocks]
        for s, new in tokens.items():
            self.lengths[s] = self.lengths.get(s, 0) + len(new)
        rows = np.arange(starts[-1]) if logit_rows is None else np.asarray(logit_rows)
        return Batch(
            tokens=np.concatenate([np.asarray(new) for new in tokens.values()]).astype(np.int32),
            query_starts=starts.astype(np.int32),
            context_lengths=np.array(contexts, np.int32),
            block_tables=tables.astype(np.int32),
            state_slots=np.array([self._slots[s] for s in tokens], np.int32),
            logit_rows=rows.astype(np.int32),
        )

    def restart(self, sequence: int) -> None:
        """Forget what the sequence held: its next step is a new one in the same blocks and slot."""
        self.lengths.pop(sequence, None)


def run_in_pieces(executor: Executor, cache: CacheConfig, tokens: Tokens, sizes: Sequence[int]) -> FloatArray:
    """Outputs of one sequence that is fed in chunks of these sizes."""
    assert sum(sizes) == len(tokens)
    sequences = Sequences(cache, count=1)
    outs: list[FloatArray] = []
    start = 0
    for size in sizes:
        outs.append(executor.run(sequences.step({0: tokens[start : start + size]})))
        start += size
    return np.concatenate(outs)


def assert_close(got: npt.NDArray[Any], want: npt.NDArray[Any], tolerance: float = 2e-5) -> None:
    """Equal up to `tolerance` times the largest value wanted."""
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    limit = tolerance * max(float(np.abs(want).max(initial=0)), 1e-3)
    worst = float(np.abs(got - want).max(initial=0))
    assert worst <= limit, f"differs by {worst:.3g}, allowed {limit:.3g}"
