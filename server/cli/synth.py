"""`mixbit synth`: a checkpoint of a model's real sizes with random weights."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixbit.engine.synth import SynthOptions

_EPILOG = """examples:
  mixbit synth --like qwen3-coder-next --layers 8 OUT/    7.8 GB; all 48: 45 GB
  mixbit synth --like qwen3-30b-a3b --layers 4 --bits 3 OUT/
  mixbit synth --like qwen3-coder-next --skew 70:20 OUT/
  mixbit synth --like path/to/config.json OUT/ --override '*.switch_mlp.*=2:32'

Known sizes: qwen3-coder-next, qwen3-next-80b-a3b, qwen3-30b-a3b, qwen3-0.6b,
smollm2-135m; any other model of a supported type by its config.json or its
directory. Routers keep 8 bits where converters of the family keep them.

What it writes loads, is served and is as fast as the real model; the text is
noise. `mixbit inspect OUT` shows the tensors, `mixbit bench OUT` the speed."""


def add_parser(commands: Any) -> None:
    """Add `synth` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "synth",
        usage="mixbit synth --like MODEL OUT [options]",
        help="write a checkpoint of real sizes with random weights",
        description="Write a checkpoint of a model's real sizes with random weights, to measure with.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="directory to be made")
    parser.add_argument("--like", metavar="MODEL", required=True, help="whose sizes: a name, config.json or directory")
    parser.add_argument("--layers", metavar="N", type=int, help="layers (default: the model's)")
    parser.add_argument("--bits", metavar="B", type=int, default=4, help="of the matrices; 16: bfloat16 (default: 4)")
    parser.add_argument("--group-size", metavar="N", type=int, help="weights that share a scale (default: 64)")
    parser.add_argument(
        "--override",
        metavar="GLOB=BITS[:GROUP]",
        action="append",
        default=[],
        help="another width for some modules, or GLOB=none for none; repeatable",
    )
    parser.add_argument(
        "--skew",
        metavar="PICKS:EXPERTS",
        type=_skew,
        help="routing as in real text: 70:20 lets 70 %% of the picks fall on 20 %% of the experts (default: even)",
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the random numbers (default: 0)")
    parser.add_argument("--force", action="store_true", help="replace OUT if it is a model")
    parser.set_defaults(run=run, usage_error=parser.error)


def _skew(text: str) -> tuple[float, float]:
    match = re.fullmatch(r"(\d{1,2}):(\d{1,2})", text)
    picks, experts = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 0 < experts <= picks:
        raise argparse.ArgumentTypeError(f"{text!r} is not two percentages such as 70:20, the first the larger")
    return picks / 100, experts / 100


def run(args: argparse.Namespace) -> int:
    """Write, then print OUT on stdout; progress goes to stderr."""
    from mixbit.engine.convert.output import check_output
    from mixbit.engine.synth import synthesize
    from mixbit.server.console import Steps

    options = _options(args)
    check_output(args.out, args.force)
    with Steps() as steps:
        size = synthesize(args.like, args.out, options, progress=steps.update, force=args.force)
    print(f"written: {size / 1e9:.2f} GB of random weights", file=sys.stderr)
    print(args.out)
    return 0


def _options(args: argparse.Namespace) -> SynthOptions:
    from mixbit.engine.convert.errors import ConvertError
    from mixbit.engine.convert.widths import DEFAULT_GROUP_SIZE, Width, parse_override
    from mixbit.engine.synth import Skew, SynthOptions

    if args.layers is not None and args.layers < 1:
        args.usage_error(f"--layers {args.layers}: expected a number above 0")
    if args.seed < 0:
        args.usage_error(f"--seed {args.seed}: expected a number from 0")
    group_size = args.group_size or DEFAULT_GROUP_SIZE
    try:
        return SynthOptions(
            layers=args.layers,
            width=None if args.bits == 16 else Width(args.bits, group_size),
            overrides=tuple(parse_override(text, group_size) for text in args.override),
            seed=args.seed,
            skew=None if args.skew is None else Skew(*args.skew),
        )
    except ConvertError as error:
        args.usage_error(str(error))
        raise
