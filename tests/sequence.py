"""Drives an executor with a single sequence: the smallest runner, for tests of models."""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np
import numpy.typing as npt

from mixbit.kernels.executor import Backend, Batch, CacheConfig, Dtype, Executor, ExecutorOptions
from mixbit.kernels.ops import Program

BLOCK_SIZE = 16


class Sequence:
    """One sequence of at most `capacity` tokens on a backend; blocks are taken in reverse, to be unlike their order."""

    def __init__(self, backend: Backend, program: Program, capacity: int, dtype: Dtype | None = None) -> None:
        blocks = -(-capacity // BLOCK_SIZE)
        cache = CacheConfig(blocks=blocks + 1, block_size=BLOCK_SIZE, state_slots=2)
        options = ExecutorOptions(max_tokens=capacity, threads=2, dtype=dtype)
        self.executor: Executor = backend.compile(program, cache, options)
        self._blocks = np.arange(blocks, 0, -1, dtype=np.int32)
        self._length = 0

    def reset(self) -> None:
        """Begin a new sequence in the same place."""
        self._length = 0

    def run(self, tokens: Items[int], logit_rows: Items[int] | None = None) -> npt.NDArray[np.float32]:
        """Append tokens; logits [rows, vocab] of the rows asked for, by default of every token."""
        rows = range(len(tokens)) if logit_rows is None else logit_rows
        return self.executor.run(self._batch(tokens, rows)).copy()

    def hidden_states(self, tokens: Items[int]) -> npt.NDArray[np.float32]:
        """Append tokens; what the head would be applied to, of every token: [tokens, hidden_dim]."""
        return self.executor.hidden_states(self._batch(tokens, range(len(tokens)))).copy()

    def _batch(self, tokens: Items[int], logit_rows: Items[int]) -> Batch:
        batch = Batch(
            tokens=np.array(tokens, np.int32),
            query_starts=np.array([0, len(tokens)], np.int32),
            context_lengths=np.array([self._length], np.int32),
            block_tables=self._blocks[None],
            state_slots=np.array([1], np.int32),
            logit_rows=np.array(logit_rows, np.int32),
        )
        self._length += len(tokens)
        return batch

    def greedy(self, prompt: Items[int], count: int) -> list[int]:
        """The `count` tokens that follow the prompt, each the most likely."""
        logits = self.run(prompt, [len(prompt) - 1])
        tokens = [int(logits[0].argmax())]
        while len(tokens) < count:
            tokens.append(int(self.run(tokens[-1:])[0].argmax()))
        return tokens
