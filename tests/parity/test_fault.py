"""The fault this project exists for: 8-bit routers read as if they had 4 bits, the width of the rest.

Eight nibbles are unpacked where four bytes lie, rows begin in the middle of others, and the wrong experts
run. The loader refuses such a reading (tests/engine/test_loader.py); these tests force it on the program.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from mixbit.engine.loader import load
from mixbit.kernels.ops import Moe, Node, Program
from mixbit.kernels.reference.moe import route
from mixbit.kernels.registry import choose
from mixbit.kernels.spec import Matrix, QuantizedTensor
from tests.checkpoints import write_checkpoint
from tests.sequence import Sequence


def read_as(matrix: Matrix, bits: int) -> QuantizedTensor:
    """The tensor as a kernel sees it that takes another width for granted: the same words, other rows."""
    assert isinstance(matrix, QuantizedTensor)
    words = matrix.in_dim * bits // 32
    weight = matrix.weight.reshape(-1)[: matrix.out_dim * words].reshape(matrix.out_dim, words)
    return replace(matrix, weight=weight, bits=bits, stored=())  # not as the file holds it


def with_routers_read_as(program: Program, bits: int) -> Program:
    def read(node: Node) -> Node:
        if not isinstance(node, Moe):
            return node
        return replace(node, spec=replace(node.spec, router=read_as(node.spec.router, bits)))

    return replace(program, nodes=tuple(read(node) for node in program.nodes))


@pytest.fixture(scope="module", params=["qwen3_moe", "qwen3_next", "qwen3_5_moe"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("fault"), request.param)


def test_routing_differs(checkpoint: Path) -> None:
    program = load(checkpoint).program
    wrong = with_routers_read_as(program, 4)
    x = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)
    for node, misread in zip(program.nodes, wrong.nodes, strict=True):
        if isinstance(node, Moe) and isinstance(misread, Moe):
            chosen, instead = route(node.spec, x)[0], route(misread.spec, x)[0]
            same = [set(a) == set(b) for a, b in zip(chosen.tolist(), instead.tolist(), strict=True)]
            assert np.mean(same) < 0.25


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_text_differs(checkpoint: Path, backend: str) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    prompt = tokenizer.encode("What is the capital of France?").ids
    program = load(checkpoint).program

    def text(of: Program) -> str:
        tokens = Sequence(choose(backend).backend, of, 64).greedy(prompt, 12)
        return str(tokenizer.decode(tokens, skip_special_tokens=False))

    right = text(program)
    assert right == text(with_routers_read_as(program, 8)), "reading at the stored width changes nothing"
    assert right != text(with_routers_read_as(program, 4))
