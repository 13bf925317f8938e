"""Drives llama.cpp through llama-cpp-python with the commands of bench/ours.py.

Runs in an environment of its own (`make bench` builds it natively for this machine).
"""

from __future__ import annotations

import random
import time
from typing import Any

import llama_cpp
from commands import drive


class Engine:
    """repack: whether weights are copied into another order, as llama.cpp does unless told otherwise; without, they
    stay where they are mapped, as they must where they are larger than memory."""

    def __init__(self, model: str, threads: int, context: int, *, repack: bool = True) -> None:
        start = time.perf_counter()
        defaults = llama_cpp.llama_cpp.llama_model_default_params

        def params() -> llama_cpp.llama_model_params:
            found = defaults()
            found.use_extra_bufts = repack
            return found

        llama_cpp.llama_cpp.llama_model_default_params = params  # no argument of Llama sets it
        self.llm = llama_cpp.Llama(
            model_path=model,
            n_threads=threads,
            n_threads_batch=threads,
            n_ctx=context,
            n_batch=512,
            n_ubatch=512,
            use_mmap=True,
            flash_attn=True,
            verbose=False,
        )
        self.filled: int | None = None
        self.random = random.Random(0)
        self.llm.eval([1])
        self.loaded = {"seconds": time.perf_counter() - start}

    def prefill(self, tokens: int) -> float:
        """Seconds for a prompt of `tokens`."""
        self.llm.reset()
        self.llm._ctx.kv_cache_clear()
        start = time.perf_counter()
        self.llm.eval([self.random.randrange(100, self.llm.n_vocab()) for _ in range(tokens)])
        self.filled = tokens
        return time.perf_counter() - start

    def decode(self, tokens: int, context: int, sequences: int) -> float:
        """Seconds for `tokens` steps after `context` tokens; filling is not counted."""
        if sequences != 1:
            raise ValueError("this driver decodes one sequence")
        if self.filled != context or not self._rewind(context):
            self.prefill(context)
        start = time.perf_counter()
        for _ in range(tokens):
            self.llm.eval([self.random.randrange(100, self.llm.n_vocab())])
        return time.perf_counter() - start

    def _rewind(self, context: int) -> bool:
        """Forget what follows the context; recurrent states cannot."""
        done = bool(self.llm._ctx.kv_cache_seq_rm(-1, context, -1))
        self.llm.n_tokens = context
        return done

    def answer(self, do: str, **command: Any) -> dict[str, Any]:
        return {"seconds": {"prefill": self.prefill, "decode": self.decode}[do](**command)}


if __name__ == "__main__":
    drive(Engine)
