"""`mixbit COMMAND`. Commands are modules beside this one; only what a command line needs is imported."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from mixbit.engine.errors import UserError

COMMANDS = ("serve", "generate", "inspect", "convert", "synth", "bench", "download", "doctor", "cache")

_EXAMPLES = """examples:
  mixbit serve                                              the demo model on http://127.0.0.1:8080
  mixbit serve --model mlx-community/Qwen3-Coder-Next-4bit  a model from the Hugging Face hub
  mixbit inspect PATH_OR_HUB_ID                             how many bits each tensor has
  mixbit convert MODEL.gguf OUT/                            a GGUF file to MLX format, losslessly
  mixbit generate --prompt "Hello" --tokens 64 --timing     without a server

`mixbit COMMAND --help` tells more of each."""


class _Parser(argparse.ArgumentParser):
    """Wrong usage is answered with the nearest right word."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Usage and message on stderr; exit 2."""
        self.print_usage(sys.stderr)
        self.exit(2, f"error: {message}\n")

    def refuse_unknown(self, unknown: Sequence[str]) -> NoReturn:
        """Say which argument is not known, and what may have been meant."""
        word = next((each for each in unknown if each.startswith("-")), unknown[0])
        flag = word.partition("=")[0]
        options = [option for action in self._actions for option in action.option_strings]
        near = difflib.get_close_matches(flag, options, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; see {self.prog} --help"
        if not word.startswith("-") and "--model" in options:
            hint = f"; did you mean --model {word}?"
        self.error(f"unknown argument {flag}{hint}")


def _build_parser(prog: str, names: Sequence[str]) -> tuple[_Parser, dict[str, _Parser]]:
    parser = _Parser(
        prog=prog,
        description="Mixbit: a local OpenAI-compatible server for mixed-precision models in MLX format.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", parser_class=_Parser)
    for name in names:
        import_module(f"mixbit.server.cli.{name}").add_parser(commands)
    return parser, commands.choices


def _run(arguments: Sequence[str], prog: str) -> int:
    first = next((word for word in arguments if not word.startswith("-")), None)
    if first is not None and first not in COMMANDS:
        near = difflib.get_close_matches(first, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"commands are: {', '.join(COMMANDS)}"
        print(f"error: unknown command {first!r}; {hint}", file=sys.stderr)
        return 2
    parser, commands = _build_parser(prog, COMMANDS if first is None else (first,))
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        commands.get(args.command, parser).refuse_unknown(unknown)
    if args.version:
        from mixbit.server.version import VERSION

        print(f"mixbit {VERSION}")
        return 0
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    return int(args.run(args))


def main(arguments: Sequence[str] | None = None, prog: str = "mixbit") -> int:
    """Run a command line; the exit status: 0, 1 for an error, 2 for wrong usage, 130 for Ctrl-C."""
    try:
        return _run(sys.argv[1:] if arguments is None else arguments, prog)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as with `mixbit inspect | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        # The kernels' errors are known by name: importing them would import what runs the model.
        if isinstance(error, UserError) or type(error).__name__ in {"SpecError", "BackendError"}:
            print(f"error: {error}", file=sys.stderr)
            return 1
        raise


def serve() -> int:
    """The console script `serve`: `mixbit serve`."""
    return main(["serve", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
