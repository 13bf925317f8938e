"""How far the fast mode (int8 activations) is from the exact one (float32), as text and as routing.

    python -m bench.quality text [--model DIR] [--tokens 20480]
    python -m bench.quality routers MODEL [--tokens 1024]

text: perplexity of both modes and how often they agree on the most likely token, on text of this machine:
Python's licence, its reference documentation (pydoc_data.topics, by name) up to two thirds, then sources of its
standard library (by name). The text's SHA-256 is printed, so that runs can be compared.

routers: in how many (token, layer) pairs both modes choose the same experts: `alone` gives both routers the
same inputs, which the exact mode computed; `in the model` lets each mode compute all that comes before.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mixbit.engine.demo import ensure_demo
from mixbit.engine.loader import LoadedModel, load
from mixbit.engine.routing import chosen_after, chosen_for, moe_layers, router_inputs
from mixbit.engine.tokenizer import load_tokenizer
from mixbit.kernels.executor import Batch, CacheConfig, Executor, ExecutorOptions, Precision
from mixbit.kernels.ops import Moe
from mixbit.kernels.registry import choose

WINDOW = 512  # tokens scored together; each begins without a past
MODES: tuple[Precision, ...] = ("exact", "fast")
BLOCK = 32


@dataclass(frozen=True)
class Text:
    """windows: int32 [windows, WINDOW]. sha256: of the text."""

    windows: npt.NDArray[np.int32]
    sha256: str


@dataclass(frozen=True)
class TextQuality:
    """perplexity: by mode. agreement: share of positions with the same most likely token. kl: mean divergence of
    the fast mode's distribution from the exact one's, in nats. tokens: scored."""

    perplexity: dict[str, float]
    agreement: float
    kl: float
    tokens: int
    sha256: str

    @property
    def change(self) -> float:
        """Relative change of the perplexity."""
        return self.perplexity["fast"] / self.perplexity["exact"] - 1


@dataclass(frozen=True)
class RouterQuality:
    """Shares of (token, layer) pairs whose sets of experts are equal; by_layer: alone."""

    alone: float
    in_the_model: float
    by_layer: tuple[float, ...]
    pairs: int


def read_text(model: Path, tokens: int) -> Text:
    """At least `tokens` tokens in whole windows: the licence, documentation up to two thirds, then sources."""
    tokenizer = load_tokenizer(model)
    digest = hashlib.sha256()
    windows: list[list[int]] = []
    whole = -(-tokens // WINDOW)
    for pieces, most in ((_licence(), whole), (_documentation(), 2 * whole // 3), (_sources(), whole)):
        for piece in pieces:
            if len(windows) >= most:
                break
            digest.update(piece.encode())
            ids = tokenizer.encode(piece, add_special_tokens=False)
            found = [ids[at : at + WINDOW] for at in range(0, len(ids) - WINDOW + 1, WINDOW)]
            windows += found[: most - len(windows)]
    return Text(np.array(windows, np.int32), digest.hexdigest())


def _documentation() -> Iterator[str]:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    yield "\n\n".join(topics[name] for name in sorted(topics))


def _licence() -> Iterator[str]:
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("LICENSE*")):
        yield file.read_text(encoding="utf-8", errors="replace")


def _sources() -> Iterator[str]:
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield file.read_text(encoding="utf-8", errors="replace")


def text_quality(model: LoadedModel, text: Text, options: dict[str, ExecutorOptions]) -> TextQuality:
    """Score every window with each mode. options: by mode, max_tokens at least WINDOW."""
    cache = CacheConfig(WINDOW // BLOCK, BLOCK, 1)
    executors = {mode: choose("cpu").backend.compile(model.program, cache, options[mode]) for mode in MODES}
    loss = dict.fromkeys(MODES, 0.0)
    agreed, divergence = 0, 0.0
    for number, window in enumerate(text.windows, 1):
        found = {mode: _log_probabilities(executors[mode], window) for mode in MODES}
        truth = window[1:]
        for mode in MODES:
            loss[mode] -= float(found[mode][np.arange(len(truth)), truth].sum(dtype=np.float64))
        agreed += int((found["exact"].argmax(1) == found["fast"].argmax(1)).sum())
        divergence += float((np.exp(found["exact"]) * (found["exact"] - found["fast"])).sum(dtype=np.float64))
        print(f"{number}/{len(text.windows)} windows", file=sys.stderr, flush=True)
    count = len(text.windows) * (WINDOW - 1)
    perplexity = {mode: float(np.exp(loss[mode] / count)) for mode in MODES}
    return TextQuality(perplexity, agreed / count, divergence / count, count, text.sha256)


def _log_probabilities(executor: Executor, window: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """[WINDOW - 1, vocab]: of what follows each token but the last."""
    logits = executor.run(
        Batch(
            tokens=window,
            query_starts=np.array([0, len(window)], np.int32),
            context_lengths=np.zeros(1, np.int32),
            block_tables=np.arange(WINDOW // BLOCK, dtype=np.int32)[None],
            state_slots=np.zeros(1, np.int32),
            logit_rows=np.arange(len(window) - 1, dtype=np.int32),
        )
    )
    logits = logits - logits.max(1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(1, keepdims=True))
    return logits


def router_quality(model: LoadedModel, tokens: int, options: dict[str, ExecutorOptions]) -> RouterQuality:
    """Compare the modes' choices for random tokens, layer by layer."""
    program = model.program
    ids = np.random.default_rng(0).integers(0, model.vocab_size, tokens).astype(np.int32)
    alone: list[float] = []
    together: list[float] = []
    for place in moe_layers(program):
        node = program.nodes[place]
        assert isinstance(node, Moe)
        inputs = router_inputs(program, place, ids, options["exact"])
        given = [chosen_for(node.spec, inputs, options[mode]) for mode in MODES]
        alone.append(float((given[0] == given[1]).all(1).mean()))
        whole = [chosen_after(program, place, ids, options[mode]) for mode in MODES]
        together.append(float((whole[0] == whole[1]).all(1).mean()))
        print(
            f"layer {len(alone)}: {alone[-1]:.4%} alone, {together[-1]:.2%} in the model", file=sys.stderr, flush=True
        )
    return RouterQuality(float(np.mean(alone)), float(np.mean(together)), tuple(alone), tokens * len(alone))


def modes(threads: int) -> dict[str, ExecutorOptions]:
    """Options of each mode."""
    return {mode: ExecutorOptions(max_tokens=WINDOW, threads=threads, precision=mode) for mode in MODES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    text = what.add_parser("text")
    text.add_argument("--model", type=Path, help="default: the demo model")
    text.add_argument("--tokens", type=int, default=20_480)
    routers = what.add_parser("routers")
    routers.add_argument("model", type=Path)
    routers.add_argument("--tokens", type=int, default=1024)
    for each in (text, routers):
        each.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.what == "text":
        path = args.model or ensure_demo(lambda stage, done, total: None)
        found = text_quality(load(path), read_text(path, args.tokens), modes(args.threads))
        print(json.dumps(asdict(found) | {"change": found.change}, indent=1))
    else:
        print(json.dumps(asdict(router_quality(load(args.model), args.tokens, modes(args.threads))), indent=1))


if __name__ == "__main__":
    main()
