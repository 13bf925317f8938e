"""Log-probabilities of prompts from real executors: those that the same tokens had when they were generated."""

from __future__ import annotations

import pytest

from mixbit.engine.core import EngineCore
from mixbit.engine.protocol import Generate
from tests.checkpoints import write_checkpoint
from tests.engine.cores import exact_core, greedy, run

PROMPT = [token % 200 for token in range(7, 107)]  # more than are scored in one step


@pytest.fixture(scope="module", params=[("llama", "cpu"), ("qwen3_next", "cpu"), ("llama", "reference")])
def core(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> EngineCore:
    model_type, device = request.param
    return exact_core(write_checkpoint(tmp_path_factory.mktemp("models") / model_type, model_type), device)


def message(request_id: str, prompt: list[int], *, prompt_logprobs: bool, max_tokens: int = 1) -> Generate:
    return greedy(request_id, prompt, max_tokens, logprobs=2, prompt_logprobs=prompt_logprobs)


def test_a_prompt_scores_as_it_was_generated_alone_and_among_others(core: EngineCore) -> None:
    written = run(core, message("a", PROMPT, prompt_logprobs=False, max_tokens=40)).entries["a"]
    assert len(written) == 40
    whole = [*PROMPT, *(entry.chosen.token_id for entry in written)]
    alone = run(core, message("a", whole, prompt_logprobs=True)).entries
    others = [message("b", whole[:90], prompt_logprobs=True), message("c", whole, prompt_logprobs=False, max_tokens=9)]
    together = run(core, message("a", whole, prompt_logprobs=True), *others).entries
    for scored in (alone["a"], together["a"]):
        assert [entry.chosen.token_id for entry in scored[:-1]] == whole
        for entry, known in zip(scored[len(PROMPT) : -1], written, strict=True):
            assert entry.chosen.logprob == pytest.approx(known.chosen.logprob, abs=1e-4)
            assert [each.token_id for each in entry.top] == [each.token_id for each in known.top]
    assert [entry.chosen.token_id for entry in together["b"][:-1]] == whole[:90]
    for entry, known in zip(together["b"], alone["a"][:90], strict=False):
        assert entry.chosen.logprob == pytest.approx(known.chosen.logprob, abs=1e-4)
