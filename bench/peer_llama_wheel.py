"""As peer_llama_cpp.py, with the wheel llama-cpp-py-sync, which brings llama.cpp compiled: building it takes long.

Its physical batches are 512 tokens, llama.cpp's own default. A sequence is only ever continued: decoding goes on from
whatever lies there.
"""

from __future__ import annotations

import random
import time

from llama_cpp_py_sync import Llama
from peer_commands import drive


class Engine:
    def __init__(self, model: str, threads: int, context: int) -> None:
        start = time.perf_counter()
        self.llm = Llama(
            model, n_ctx=context, n_batch=512, n_ubatch=512, n_threads=threads, n_threads_batch=threads, use_mmap=True
        )
        self.random = random.Random(0)
        self.past = self.llm._eval_tokens([1], 0)
        self.loaded = {"seconds": time.perf_counter() - start}

    def prefill(self, tokens: int) -> float:
        """Seconds for so many further random tokens at once."""
        return self._run(tokens, tokens)

    def decode(self, tokens: int, context: int, sequences: int) -> float:
        """Seconds for so many, one after another."""
        if sequences != 1:
            raise ValueError("this driver decodes one sequence")
        return self._run(tokens, 1)

    def _run(self, tokens: int, step: int) -> float:
        start = time.perf_counter()
        for _ in range(0, tokens, step):
            drawn = [self.random.randrange(100, self.llm.n_vocab) for _ in range(step)]
            self.past = self.llm._eval_tokens(drawn, self.past)
        return time.perf_counter() - start


if __name__ == "__main__":
    drive(Engine)
