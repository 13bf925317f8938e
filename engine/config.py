"""Settings of the engine. `EngineConfig` travels to the worker as JSON on its command line."""

from __future__ import annotations

from typing import Literal

import msgspec

from mixbit.engine.errors import UserError
from mixbit.engine.logs import LogFormat

KERNELS = ("auto", "stock")
_DTYPES = ("float32", "float16", "bfloat16")


class ConfigError(UserError):
    """A setting that cannot be honoured; the message names it, its value and what is allowed."""


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the worker must know, validated once by `check`.

    model: path of a checkpoint directory. device: a name from the kernels' registry, or "auto".
    kernels: "auto" for this project's where they apply, "stock" for MLX's own operations on GPUs.
    threads: CPU threads, 0 for one a core. context_length: tokens, None for the model's own.
    max_running: sequences in a batch. max_queue: requests waiting beyond that. step_tokens: rows of the
    largest batch, so also the prefill chunk; None for 512, or more where experts are streamed. cache_bytes: bytes for
    KV and states, None for a share of the memory that is free after loading. memory_bytes: bytes of main memory to use
    at most, None for what is free; experts that do not fit are streamed from disk. expert_bytes: bytes for streamed
    experts, even if all would fit; None for what memory_bytes leaves. memory_share: of the free memory, what this
    engine may count as its own; below 1 where other engines run beside it. block_size: tokens in a KV block.
    top_k_experts: overrides the model's experts per token. disk_cache: directory for prefixes that survive the process,
    None for none. disk_cache_bytes: what it may hold. isa, dtype, precision, profile: as in kernels' ExecutorOptions.
    log_format: "text" or "json".
    """

    model: str
    device: str = "auto"
    kernels: str = "auto"
    threads: int = 0
    context_length: int | None = None
    max_running: int = 16
    max_queue: int = 256
    step_tokens: int | None = None
    cache_bytes: int | None = None
    memory_bytes: int | None = None
    expert_bytes: int | None = None
    memory_share: float = 1.0
    block_size: int = 32
    disk_cache: str | None = None
    disk_cache_bytes: int = 8 << 30
    top_k_experts: int | None = None
    isa: str | None = None
    dtype: str | None = None
    precision: Literal["exact", "fast"] = "fast"
    profile: bool = False
    log_format: LogFormat = "text"

    def check(self) -> EngineConfig:
        """Return self if every value is in range, else raise ConfigError."""
        for name, low in (
            ("threads", 0),
            ("context_length", 1),
            ("max_running", 1),
            ("max_queue", 0),
            ("step_tokens", 1),
            ("cache_bytes", 1),
            ("memory_bytes", 1),
            ("expert_bytes", 1),
            ("block_size", 1),
            ("disk_cache_bytes", 1),
            ("top_k_experts", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"{name} is {value}; it must be at least {low}")
        if not 0 < self.memory_share <= 1:
            raise ConfigError(f"memory_share is {self.memory_share}; it must be above 0 and at most 1")
        if self.dtype not in (None, *_DTYPES):
            raise ConfigError(f"dtype is {self.dtype!r}; it must be one of {', '.join(_DTYPES)}")
        if self.kernels not in KERNELS:
            raise ConfigError(f"kernels is {self.kernels!r}; it must be one of {', '.join(KERNELS)}")
        if self.step_tokens is not None and self.step_tokens < self.max_running:
            raise ConfigError(
                f"step_tokens is {self.step_tokens}, below max_running {self.max_running}: "
                "a step must hold one token of every running request"
            )
        return self
