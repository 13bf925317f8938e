"""As peer_llama_cpp.py, with the wheel llama-cpp-py-sync, which brings llama.cpp compiled: building it takes long.

Its physical batches are 512 tokens, llama.cpp's own default.
"""

from __future__ import annotations

import json
import random
import sys
import time

from llama_cpp_py_sync import Llama


class Engine:
    def __init__(self, model: str, threads: int, context: int) -> None:
        start = time.perf_counter()
        self.llm = Llama(
            model, n_ctx=context, n_batch=512, n_ubatch=512, n_threads=threads, n_threads_batch=threads, use_mmap=True
        )
        self.random = random.Random(0)
        self.past = self.llm._eval_tokens([1], 0)
        self.loaded = {"seconds": time.perf_counter() - start}

    def run(self, tokens: int, step: int) -> float:
        """Seconds for so many further random tokens, `step` at a time."""
        start = time.perf_counter()
        for _ in range(0, tokens, step):
            drawn = [self.random.randrange(100, self.llm.n_vocab) for _ in range(step)]
            self.past = self.llm._eval_tokens(drawn, self.past)
        return time.perf_counter() - start


def main() -> None:
    options = json.loads(sys.argv[1])
    engine = Engine(options["model"], options["threads"], options["context"])
    reply(engine.loaded)
    for line in sys.stdin:
        command = json.loads(line)
        tokens = command["tokens"]
        reply({"seconds": engine.run(tokens, tokens if command["do"] == "prefill" else 1)})


def reply(message: dict[str, float]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
