"""`mixbit convert`: a GGUF file or a safetensors directory to MLX format."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixbit.engine.convert.requantize import ConvertOptions

_EPILOG = """examples:
  mixbit convert model.gguf OUT/                     as it is, losslessly
  mixbit convert Qwen/Qwen3-30B-A3B OUT/ --bits 4    4 bits, routers at 8
  mixbit convert IN/ OUT/ --bits 4 --override '*.switch_mlp.*=2:32'
  mixbit convert IN/ OUT/ --override 'lm_head=none' --dtype bfloat16

A GGUF file is imported without loss: Q4_0, Q4_1, Q8_0, F16, BF16 and F32
tensors of llama, qwen2, qwen3 and qwen3moe. A directory or hub id may be in
the format of MLX or of transformers.

Without --bits every matrix keeps its width unless an override names it. With
--bits the routers of mixture-of-experts models stay at 8 bits, as usual. GLOB
is matched against module paths such as model.layers.0.mlp.gate; the last
override that matches counts. `mixbit inspect OUT` shows the result."""


def add_parser(commands: Any) -> None:
    """Add `convert` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "convert",
        usage="mixbit convert IN OUT [options]",
        help="make an MLX checkpoint of a GGUF file or another checkpoint",
        description="Make an MLX checkpoint of a GGUF file or of another checkpoint.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="IN", help="a .gguf file, a model directory or a hub id")
    parser.add_argument("out", metavar="OUT", type=Path, help="directory to be made")
    parser.add_argument("--bits", metavar="N", type=int, help="bits of every matrix: 1, 2, 3, 4, 5, 6 or 8")
    parser.add_argument(
        "--group-size", metavar="N", type=int, help="weights that share a scale: 32, 64 or 128 (default: 64)"
    )
    parser.add_argument(
        "--override",
        metavar="GLOB=BITS[:GROUP]",
        action="append",
        default=[],
        help="another width for some modules, or GLOB=none for none; repeatable",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="of unquantized tensors and scales (default: theirs)",
    )
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    parser.add_argument("--force", action="store_true", help="replace OUT if it is a model")
    parser.set_defaults(run=run, usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    """Convert, then print OUT on stdout; progress goes to stderr."""
    from mixbit.engine.convert.errors import ConvertError
    from mixbit.engine.convert.output import check_output
    from mixbit.server.console import Steps

    source = Path(args.source).expanduser()
    options = _options(args)
    check_output(args.out, args.force)  # before hours of work
    with Steps() as steps:
        if source.suffix == ".gguf":
            if args.bits is not None or args.override or args.dtype is not None:
                args.usage_error("a GGUF file is imported as it is; use these options on the result")
            if not source.is_file():
                raise ConvertError(f"{source}: no such file")
            from mixbit.engine.convert.gguf_import import import_gguf

            import_gguf(source, args.out, progress=steps.update, force=args.force)
        else:
            from mixbit.engine.convert.requantize import convert_checkpoint
            from mixbit.engine.download import resolve_model

            path = resolve_model(args.source, revision=args.revision, progress=steps.update)
            convert_checkpoint(path, args.out, options, progress=steps.update, force=args.force)
    print(f"written; look at it with: mixbit inspect {args.out}", file=sys.stderr)
    print(args.out)
    return 0


def _options(args: argparse.Namespace) -> ConvertOptions:
    """The widths that the arguments ask for; exits with a usage error for one that there is not."""
    from mixbit.engine.convert.errors import ConvertError
    from mixbit.engine.convert.requantize import ConvertOptions
    from mixbit.engine.convert.widths import DEFAULT_GROUP_SIZE, Width, parse_override

    if args.group_size is not None and args.bits is None and not args.override:
        args.usage_error("--group-size has no effect without --bits or --override")
    group_size = args.group_size or DEFAULT_GROUP_SIZE
    try:
        return ConvertOptions(
            width=None if args.bits is None else Width(args.bits, group_size),
            overrides=tuple(parse_override(text, group_size) for text in args.override),
            dtype=args.dtype,
        )
    except ConvertError as error:
        args.usage_error(str(error))
        raise
