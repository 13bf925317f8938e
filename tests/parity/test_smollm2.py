"""SmolLM2, real weights: greedy text on the CPU backend against mlx-lm in float32.

Our tokens are replayed through mlx-lm's model. By induction the two texts are equal if each of our tokens is
the most likely one there. Its matrices are expanded to float32 and applied by NumPy, because MLX multiplies
float32 matrices at 1 GFLOP/s on Linux. Where its two best logits are closer than 1e-3, either may win: the order of
float32 sums decides.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.nn.layers.base import Module
from mlx.nn.layers.quantized import QuantizedEmbedding, QuantizedLinear
from mlx.utils import tree_map_with_path
from mlx_lm.utils import load_model
from tokenizers import Tokenizer

from mixbit.engine.loader import load
from mixbit.kernels.executor import Batch, CacheConfig, Executor, ExecutorOptions
from mixbit.kernels.registry import choose

NEW_TOKENS = 64
NEAR_TIE = 1e-3
BLOCK_SIZE = 32

QUESTIONS = (
    "What is the capital of France?",
    "Name three primary colors.",
    "Write a haiku about the sea.",
    "Explain photosynthesis to a child.",
    "What is 7 times 8?",
    "Translate 'good morning' to Spanish.",
    "List the planets of the solar system.",
    "Who wrote Romeo and Juliet?",
    "How do I boil an egg?",
    "Write a Python function that adds two numbers.",
)
BEGINNINGS = (
    "The quick brown fox",
    "Once upon a time, in a village by the mountains,",
    "def fibonacci(n):\n",
    "The three laws of thermodynamics are",
    "In 1969, the first",
    "Ingredients:\n- 2 cups of flour\n-",
    "Dear Sir or Madam,",
    "SELECT name FROM users WHERE",
    "The derivative of x^2 is",
    "Café, naïve and 東京 are",
)


@pytest.fixture(scope="module")
def prompts(demo_checkpoint: Path) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(demo_checkpoint / "tokenizer.json"))
    chats = [f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in QUESTIONS]
    return [list(tokenizer.encode(text, add_special_tokens=False).ids) for text in (*chats, *BEGINNINGS)]


class NumpyMatrix(Module):
    """A quantized linear layer or embedding, as a float32 matrix that NumPy multiplies."""

    def __init__(self, quantized: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        parts = quantized.weight, quantized.scales.astype(mx.float32), quantized.biases.astype(mx.float32)
        self._matrix = np.array(mx.dequantize(*parts, quantized.group_size, quantized.bits))

    def as_linear(self, x: mx.array) -> mx.array:
        return mx.array(np.array(x) @ self._matrix.T)

    def rows(self, tokens: mx.array) -> mx.array:
        return mx.array(self._matrix[np.array(tokens)])


class NumpyLinear(NumpyMatrix):
    __call__ = NumpyMatrix.as_linear


class NumpyEmbedding(NumpyMatrix):
    __call__ = NumpyMatrix.rows


@pytest.fixture(scope="module")
def mlx_lm_model(demo_checkpoint: Path) -> Any:
    def replace(path: str, module: Any) -> Any:
        if isinstance(module, QuantizedLinear):
            return NumpyLinear(module)
        return NumpyEmbedding(module) if isinstance(module, QuantizedEmbedding) else module

    with mx.stream(mx.cpu):
        model, _ = load_model(demo_checkpoint, lazy=True)
        model.set_dtype(mx.float32)
        model.update_modules(tree_map_with_path(replace, model.leaf_modules(), is_leaf=Module.is_module))
        mx.eval(model.parameters())
    return model


class Together:
    """Several sequences that advance in one batch."""

    def __init__(self, executor: Executor, count: int, blocks: int) -> None:
        self._executor = executor
        self._tables = np.arange(count * blocks, dtype=np.int32).reshape(count, blocks)
        self._lengths = np.zeros(count, np.int32)

    def run(self, tokens: list[list[int]]) -> list[int]:
        """Append tokens to each sequence; the most likely next token of each."""
        starts = np.cumsum([0, *map(len, tokens)], dtype=np.int32)
        logits = self._executor.run(
            Batch(
                tokens=np.concatenate(tokens, dtype=np.int32),
                query_starts=starts,
                context_lengths=self._lengths.copy(),
                block_tables=self._tables,
                state_slots=np.zeros(len(tokens), np.int32),
                logit_rows=starts[1:] - 1,
            )
        )
        self._lengths += np.diff(starts)
        return [int(token) for token in logits.argmax(axis=1)]


def greedy_answers(checkpoint: Path, prompts: list[list[int]]) -> list[list[int]]:
    blocks = -(-(max(map(len, prompts)) + NEW_TOKENS) // BLOCK_SIZE)
    cache = CacheConfig(blocks=len(prompts) * blocks, block_size=BLOCK_SIZE, state_slots=1)
    options = ExecutorOptions(max_tokens=sum(map(len, prompts)))
    executor = choose("cpu").backend.compile(load(checkpoint).program, cache, options)
    sequences = Together(executor, len(prompts), blocks)
    steps = [sequences.run(prompts)]
    while len(steps) < NEW_TOKENS:
        steps.append(sequences.run([[token] for token in steps[-1]]))
    return [list(answer) for answer in zip(*steps, strict=True)]


def test_greedy_text_is_that_of_mlx_lm(demo_checkpoint: Path, prompts: list[list[int]], mlx_lm_model: Any) -> None:
    ties = 0
    for prompt, answer in zip(prompts, greedy_answers(demo_checkpoint, prompts), strict=True):
        replayed = mx.array([prompt + answer[:-1]])
        with mx.stream(mx.cpu):
            logits = np.array(mlx_lm_model(replayed)[0, len(prompt) - 1 :])
        assert logits.shape[0] == NEW_TOKENS
        behind = logits.max(axis=1) - logits[np.arange(NEW_TOKENS), answer]
        assert behind.max() < NEAR_TIE, f"{prompt}: token {int(behind.argmax())} of {answer}"
        ties += int((behind > 0).sum())
    assert ties <= 2, "near ties are rare; many of them would be a difference"
