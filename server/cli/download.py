"""`mixbit download`: a model from the hub into the local cache."""

from __future__ import annotations

import argparse
from typing import Any

_EPILOG = """examples:
  mixbit download mlx-community/Qwen3-Coder-Next-4bit
  mixbit download mlx-community/Qwen3-0.6B-4bit --revision main
  mixbit serve --model "$(mixbit download mlx-community/Qwen3-0.6B-4bit)"

Only weights, settings and tokenizer are fetched, into the cache of
huggingface_hub (HF_HOME). A broken transfer is resumed, and complete files are
kept. HF_TOKEN or `hf auth login` give access to restricted models;
HF_ENDPOINT names another hub."""


def add_parser(commands: Any) -> None:
    """Add `download` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "download",
        usage="mixbit download ID [--revision REV]",
        help="fetch a model from the hub",
        description="Fetch a model, or what is new of it, from the hub, and print its directory.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="ID", help="hub id ORG/NAME, or `demo`")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit (default: main)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the directory on stdout; progress goes to stderr."""
    from mixbit.engine.download import resolve_model
    from mixbit.server.console import Steps

    with Steps() as steps:
        path = resolve_model(args.model, revision=args.revision, progress=steps.update, refresh=True)
    print(path)
    return 0
