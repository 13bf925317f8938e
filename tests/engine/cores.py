"""Engine cores in this process over tiny models, and what they say until they are idle."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixbit.engine.build import build
from mixbit.engine.config import EngineConfig
from mixbit.engine.core import EngineCore
from mixbit.engine.protocol import Delta, Embed, Failed, Finished, Generate, Sampling, TokenLogprobs


def exact_core(model: Path, device: str, **settings: Any) -> EngineCore:
    """Of a checkpoint, in float32, with one thread."""
    config = EngineConfig(model=str(model), device=device, threads=1, precision="exact", **settings)
    return build(config, lambda *_: None).core


def greedy(request_id: str, prompt: list[int], max_tokens: int, **fields: Any) -> Generate:
    """A request for exactly so many tokens, whose identities come with it."""
    values: dict[str, Any] = {"logprobs": 0, **fields}
    return Generate(
        request_id=request_id,
        prompt=prompt,
        add_special_tokens=False,
        sampling=Sampling(temperature=0),
        max_tokens=max_tokens,
        ignore_eos=True,
        **values,
    )


@dataclass
class Said:
    """What the engine answered: of each request its end, and the tokens that it told of."""

    ends: dict[str, Finished | Failed] = field(default_factory=dict)
    entries: dict[str, list[TokenLogprobs]] = field(default_factory=dict)

    def tokens(self, request_id: str) -> list[int]:
        return [entry.chosen.token_id for entry in self.entries[request_id]]


def run(core: EngineCore, *requests: Generate | Embed) -> Said:
    """Step until nothing is left, and nothing is held."""
    for request in requests:
        core.add(core.admission.admit(request))
    said = Said()
    while not core.idle:
        for message in core.step():
            if isinstance(message, Delta):
                said.entries.setdefault(message.request_id, []).extend(message.logprobs)
            elif isinstance(message, Finished | Failed):
                said.ends[message.request_id] = message
    core.scheduler.check_idle()
    return said
