"""Log-probabilities of prompts from real executors: those that the same tokens had when they were generated."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixbit.engine.build import build
from mixbit.engine.config import EngineConfig
from mixbit.engine.core import EngineCore
from mixbit.engine.protocol import Delta, Generate, Sampling, TokenLogprobs
from tests.checkpoints import write_checkpoint

PROMPT = [token % 200 for token in range(7, 107)]  # more than are scored in one step


@pytest.fixture(scope="module", params=[("llama", "cpu"), ("qwen3_next", "cpu"), ("llama", "reference")])
def core(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> EngineCore:
    model_type, device = request.param
    directory: Path = tmp_path_factory.mktemp("models") / model_type
    write_checkpoint(directory, model_type)
    config = EngineConfig(model=str(directory), device=device, threads=1, precision="exact")
    return build(config, lambda *_: None).core


def entries(core: EngineCore, *requests: Generate) -> dict[str, list[TokenLogprobs]]:
    for request in requests:
        core.add(core.admission.admit(request))
    found: dict[str, list[TokenLogprobs]] = {request.request_id: [] for request in requests}
    while not core.idle:
        for said in core.step():
            if isinstance(said, Delta):
                found[said.request_id] += said.logprobs
    core.scheduler.check_idle()
    return found


def message(request_id: str, prompt: list[int], *, prompt_logprobs: bool, max_tokens: int = 1) -> Generate:
    return Generate(
        request_id=request_id,
        prompt=prompt,
        add_special_tokens=False,
        sampling=Sampling(temperature=0),
        max_tokens=max_tokens,
        ignore_eos=True,
        logprobs=2,
        prompt_logprobs=prompt_logprobs,
    )


def test_a_prompt_scores_as_it_was_generated_alone_and_among_others(core: EngineCore) -> None:
    written = entries(core, message("a", PROMPT, prompt_logprobs=False, max_tokens=40))["a"]
    assert len(written) == 40
    whole = [*PROMPT, *(entry.chosen.token_id for entry in written)]
    alone = entries(core, message("a", whole, prompt_logprobs=True))
    others = [message("b", whole[:90], prompt_logprobs=True), message("c", whole, prompt_logprobs=False, max_tokens=9)]
    together = entries(core, message("a", whole, prompt_logprobs=True), *others)
    for scored in (alone["a"], together["a"]):
        assert [entry.chosen.token_id for entry in scored[:-1]] == whole
        for entry, known in zip(scored[len(PROMPT) : -1], written, strict=True):
            assert entry.chosen.logprob == pytest.approx(known.chosen.logprob, abs=1e-4)
            assert [each.token_id for each in entry.top] == [each.token_id for each in known.top]
    assert [entry.chosen.token_id for entry in together["b"][:-1]] == whole[:90]
    for entry, known in zip(together["b"], alone["a"][:90], strict=False):
        assert entry.chosen.logprob == pytest.approx(known.chosen.logprob, abs=1e-4)
