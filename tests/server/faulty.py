"""A server whose model fails on demand: `python faulty.py serve ...` is `mixbit serve ...` with this worker.

The worker is the real one with a faulty executor step under it. What it does is written in the prompts:
a token FAULT asks for an exception whenever the request takes part in a step. STEP_SECONDS in the environment
makes every step that slow, so that there is time to break things in the middle.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

FAULT = 77
WORKER = "worker"


def serve() -> int:
    from mixbit.engine import process
    from mixbit.server.cli.main import main

    process.PROGRAM = ("-P", __file__, WORKER)
    return main()


def work(arguments: list[str]) -> int:
    import numpy as np
    import numpy.typing as npt

    from mixbit.engine import worker
    from mixbit.engine.request import Chunk
    from mixbit.engine.runner import Runner

    seconds = float(os.environ.get("STEP_SECONDS", "0"))
    run = Runner.run

    def faulty(self: Runner, chunks: Sequence[Chunk], *rest: Any) -> Iterable[npt.NDArray[np.float32]]:
        time.sleep(seconds)
        if any(FAULT in chunk.request.tokens[: chunk.request.prompt_tokens] for chunk in chunks):
            raise ArithmeticError("the model step failed, as asked")
        return run(self, chunks, *rest)

    Runner.run = faulty  # type: ignore[method-assign, assignment]
    return worker.main(arguments)


if __name__ == "__main__":
    if sys.argv[1] == WORKER:
        status = work(sys.argv[2:])
        sys.stderr.flush()
        os._exit(status)  # as the worker does
    sys.exit(serve())
