"""`mixbit generate`: text to the terminal, without a server, and where the time went."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mixbit.engine.errors import UserError
from mixbit.server.cli.memory import add_memory_options

if TYPE_CHECKING:
    from mixbit.engine.admission import Work
    from mixbit.engine.build import BuiltEngine
    from mixbit.engine.protocol import ExpertStats
    from mixbit.server.model import ServedModel

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")

_EPILOG = """examples:
  mixbit generate --prompt "The capital of France is" --tokens 8 --temperature 0
  mixbit generate --chat --prompt "What is the capital of France?" --timing
  mixbit generate --model mlx-community/Qwen3-Coder-Next-4bit --prompt "def fib(n):" --k 4
  git diff | mixbit generate --chat --prompt -"""


class GenerateError(UserError):
    """A prompt that cannot be used."""


def add_parser(commands: Any) -> None:
    """Add `generate` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "generate",
        help="complete a prompt in the terminal",
        description="Complete a prompt in the terminal. The text goes to stdout, all else to stderr.",
        epilog=_EPILOG,
    )
    parser.add_argument("--prompt", metavar="TEXT", required=True, help="the prompt; - reads it from stdin")
    parser.add_argument("--tokens", metavar="N", type=_positive, default=128, help="tokens at most (default: 128)")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    parser.add_argument("--timing", action="store_true", help="tokens per second, and milliseconds per kind of node")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the model has ended its answer")

    model = parser.add_argument_group("model and device")
    model.add_argument(
        "--model", metavar="PATH_OR_HUB_ID", default="demo", help="directory or hub id (default: the demo model)"
    )
    model.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    model.add_argument("--k", metavar="K", type=_positive, help="active experts per token (default: the model's own)")
    model.add_argument("--context-length", metavar="N", type=_positive, help="tokens (default: the model's own)")
    model.add_argument("--device", metavar="NAME", default="auto", help="see mixbit doctor (default: auto)")
    model.add_argument("--threads", metavar="N", type=int, default=0, help="CPU threads (default: one a core)")
    add_memory_options(model)
    model.add_argument("--kernels", choices=["auto", "stock"], default="auto", help="on GPUs: ours, or MLX's own")
    model.add_argument("--isa", metavar="NAME", help="force a CPU instruction set (default: the best)")
    model.add_argument("--dtype", metavar="NAME", help="activations of GPU backends (default: the checkpoint's)")
    model.add_argument(
        "--precision",
        choices=["fast", "exact"],
        default="fast",
        help="fast: on CPUs, quantized matrices take their inputs rounded to 8 bits (default); exact: as float32",
    )

    sampling = parser.add_argument_group("sampling (default: as the model's authors recommend)")
    sampling.add_argument("--temperature", metavar="T", type=float, help="0 takes the most likely token")
    sampling.add_argument("--top-p", metavar="P", type=float)
    sampling.add_argument("--top-k", metavar="N", type=int, help="0: off")
    sampling.add_argument("--min-p", metavar="P", type=float)
    sampling.add_argument("--repetition-penalty", metavar="X", type=float)
    sampling.add_argument("--seed", metavar="N", type=int, help="the same seed gives the same text")
    parser.set_defaults(run=run)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Load, complete, and print the timing if asked to."""
    from mixbit.engine.admission import RefusedError
    from mixbit.engine.build import build
    from mixbit.engine.config import EngineConfig
    from mixbit.engine.download import resolve_model
    from mixbit.server.console import Steps
    from mixbit.server.model import describe_model

    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise GenerateError("the prompt is not valid UTF-8") from None
    with Steps() as steps:
        directory = resolve_model(args.model, revision=args.revision, progress=steps.update)
        config = EngineConfig(
            model=str(directory),
            device=args.device,
            kernels=args.kernels,
            threads=args.threads,
            context_length=args.context_length,
            max_running=1,
            max_queue=0,
            memory_bytes=args.memory,
            expert_bytes=args.expert_memory,
            top_k_experts=args.k,
            isa=args.isa,
            dtype=args.dtype,
            precision=args.precision,
            profile=args.timing,
        )
        model = describe_model(directory, [args.model, directory.name])
        engine = build(config, steps.update)
    try:
        work = _admit(args, engine, model, prompt)
    except RefusedError as error:
        raise GenerateError(error.message) from None
    timing = _complete(engine, work)
    if args.timing:
        _show(timing, engine)
    return 0


def _admit(args: argparse.Namespace, engine: BuiltEngine, model: ServedModel, prompt: str) -> Work:
    from mixbit.engine.protocol import Generate, Sampling

    values = {name: getattr(args, name) for name in _SAMPLING}
    values = {name: getattr(model.defaults, name) if value is None else value for name, value in values.items()}
    known = {name: value for name, value in values.items() if value is not None}
    if args.chat:
        prompt = _in_template(model, prompt)
    return engine.core.admission.admit(
        Generate(
            request_id="terminal",
            prompt=prompt,
            add_special_tokens=not args.chat,
            sampling=Sampling(**known, seed=args.seed),
            max_tokens=args.tokens,
            ignore_eos=args.ignore_eos,
        )
    )


def _in_template(model: ServedModel, prompt: str) -> str:
    import asyncio

    from mixbit.server.templates import RenderError

    if model.template is None:
        raise GenerateError(f"--chat cannot be used: {model.template_problem}")
    variables = {"messages": [{"role": "user", "content": prompt}], "add_generation_prompt": True}
    try:
        return asyncio.run(model.template.render(variables, has_tools=False))
    except RenderError as error:
        raise GenerateError(str(error)) from None


@dataclass(frozen=True)
class _Span:
    """A part of the run: tokens computed in it, wall seconds, and seconds by kind of node.

    experts: what streamed layers had done at its start and its end.
    """

    tokens: int
    seconds: float
    phases: Mapping[str, float]
    experts: tuple[Sequence[ExpertStats], Sequence[ExpertStats]]


@dataclass(frozen=True)
class _Timing:
    prefill: _Span
    decode: _Span


def _complete(engine: BuiltEngine, work: Work) -> _Timing:
    """Stream the completion to stdout."""
    from mixbit.engine.protocol import Delta, Failed

    core, request = engine.core, work.request
    core.add(work)
    marks = [_mark(engine)]
    while not core.idle:
        for message in core.step():
            if isinstance(message, Delta):
                sys.stdout.write(message.text)
                sys.stdout.flush()
            elif isinstance(message, Failed):
                raise GenerateError(message.message)
        if len(marks) == 1 and request.output_tokens:
            marks.append(_mark(engine))
    marks.append(_mark(engine))
    print(flush=True)
    tokens = (request.prompt_tokens, request.output_tokens - 1)
    return _Timing(*(_span(count, *marks[place : place + 2]) for place, count in enumerate(tokens)))


@dataclass(frozen=True)
class _Mark:
    """What had been done at a time."""

    time: float
    phases: Mapping[str, float]
    experts: Sequence[ExpertStats]


def _mark(engine: BuiltEngine) -> _Mark:
    return _Mark(time.perf_counter(), dict(engine.executor.phase_seconds()), engine.core.expert_layers())


def _span(tokens: int, start: _Mark, end: _Mark) -> _Span:
    phases = {name: seconds - start.phases.get(name, 0.0) for name, seconds in end.phases.items()}
    return _Span(tokens, end.time - start.time, phases, (start.experts, end.experts))


def _show(timing: _Timing, engine: BuiltEngine) -> None:
    """A table on stderr: the columns of prefill are for the whole prompt, those of decode for one token."""
    from rich.console import Console
    from rich.table import Table

    from mixbit.server.cli.expert_timing import expert_table

    prefill, decode = timing.prefill, timing.decode
    table = Table()
    for column in ("phase", f"prefill of {prefill.tokens}\nms", "\nshare", "decode\nms per token", "\nshare"):
        table.add_column(column, justify="left" if column == "phase" else "right", no_wrap=True)
    names = sorted(prefill.phases, key=lambda name: -(prefill.phases[name] + decode.phases[name]))
    for name in names:
        table.add_row(
            name, *_cells(prefill, prefill.phases[name], 1), *_cells(decode, decode.phases[name], decode.tokens)
        )
    rest = [span.seconds - sum(span.phases.values()) for span in (prefill, decode)]
    label = "sampling and text" if names else "everything"
    table.add_row(label, *_cells(prefill, rest[0], 1), *_cells(decode, rest[1], decode.tokens), end_section=True)
    table.add_row("all", *_cells(prefill, prefill.seconds, 1), *_cells(decode, decode.seconds, decode.tokens))
    table.add_row("tokens per second", _rate(prefill), "", _rate(decode), "", style="bold")
    console = Console(stderr=True)
    console.print(engine.ready.backend_reason, style="dim")
    console.print(engine.ready.memory_reason, style="dim")
    console.print(table)
    if decode.tokens and decode.experts[1]:
        console.print(expert_table(*decode.experts, decode.tokens))


def _cells(span: _Span, seconds: float, count: int) -> tuple[str, str]:
    return (f"{1000 * seconds / count:.2f}", f"{seconds / span.seconds:.0%}") if span.tokens else ("", "")


def _rate(span: _Span) -> str:
    return f"{span.tokens / span.seconds:,.1f}" if span.tokens else ""
