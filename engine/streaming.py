"""What a model whose experts are streamed costs on this machine, before it is run."""

from __future__ import annotations

from dataclasses import dataclass

from mixbit.engine.config import EngineConfig
from mixbit.engine.loader import LoadedModel
from mixbit.engine.memory_plan import plan_memory
from mixbit.kernels.executor import ExecutorOptions
from mixbit.kernels.experts import MeasuresReads, StreamingBackend, expert_bytes, stacks, streamable
from mixbit.kernels.registry import choose

_LEAST_READS, _MOST_READS, _READ_BYTES = 8, 256, 256 << 20  # of the measurement: experts, bytes


@dataclass(frozen=True)
class Streaming:
    """Experts that are read from disk as tokens choose them; see MemoryPlan. Bytes.

    experts: all of them. memory: where they come and go. resident: what stays. token_bytes: experts of one token.
    disk: bytes per second, measured with random experts. rate: tokens per second that the disk allows when every
    expert is as likely as another; text prefers some, which then stay.
    """

    experts: int
    memory: int
    resident: int
    token_bytes: float
    disk: float
    rate: float
    explanation: str


def describe_streaming(model: LoadedModel, config: EngineConfig) -> Streaming | None:
    """Whether experts of `model` would be streamed here, and what the disk then allows: it is measured."""
    program, backend = model.program, choose(config.device).backend
    if not isinstance(backend, StreamingBackend) or not isinstance(backend, MeasuresReads):
        return None
    options = ExecutorOptions(max_tokens=1, precision=config.precision)
    plan = plan_memory(program, model.weight_bytes, config, model.context_length, backend, options)
    if plan.experts is None:
        return None
    experts, memory = expert_bytes(program), min(plan.experts.nbytes, expert_bytes(program))
    chosen = [
        (node.spec.top_k, sum(each.nbytes for each in stacks(node)) / node.spec.router.out_dim)
        for node in streamable(program)
    ]
    token_bytes = sum(top_k * nbytes for top_k, nbytes in chosen)
    count = max(_LEAST_READS, min(_MOST_READS, int(_READ_BYTES / max(nbytes for _, nbytes in chosen))))
    disk = backend.read_rate(program, access=plan.experts.access, count=count)
    return Streaming(
        experts=experts,
        memory=memory,
        resident=model.weight_bytes - experts,
        token_bytes=token_bytes,
        disk=disk,
        rate=disk / (token_bytes * max(1 - memory / experts, 1e-3)),
        explanation=plan.explanation,
    )
