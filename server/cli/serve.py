"""`mixbit serve`: the OpenAI-compatible server."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixbit.engine import logs
from mixbit.engine.errors import UserError
from mixbit.engine.shipped import default_models
from mixbit.server.cli.memory import add_memory_options, parse_size

if TYPE_CHECKING:
    from mixbit.engine.logs import LogFormat
    from mixbit.server.serving import ModelPlan
    from mixbit.server.settings import Access

_EPILOG = """examples:
  mixbit serve
  mixbit serve --model mlx-community/Qwen3-Coder-Next-4bit --context-length 65536
  mixbit serve --model ./my-model --alias gpt-4o --alias local
  mixbit serve --model ./chat-model --model ./code-model=autocomplete
  MIXBIT_API_KEY=secret mixbit serve --host 0.0.0.0

Without a key the server listens on this machine only and answers requests that name it by a local name."""


class ServeError(UserError):
    """An option that cannot be honoured, or a port that is taken."""


def add_parser(commands: Any) -> None:
    """Add `serve` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "serve",
        help="serve a model over HTTP",
        usage="mixbit serve [--model PATH_OR_HUB_ID] [options]",
        description="Serve a model over HTTP.",
        epilog=_EPILOG,
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        metavar="PATH_OR_HUB_ID[=NAME]",
        dest="models",
        action="append",
        help="directory or hub id, and a further name; repeatable, for several models (default: those that come "
        "with Mixbit: the demo to chat with and, where it is there, tiny-coder)",
    )
    model.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    model.add_argument("--served-name", metavar="NAME", help="the model's name (default: its hub id or directory)")
    model.add_argument("--alias", metavar="NAME", action="append", default=[], help="a further name; repeatable")
    model.add_argument("--chat-template", metavar="FILE", type=Path, help="a Jinja file instead of the model's own")

    engine = parser.add_argument_group("engine")
    engine.add_argument("--device", metavar="NAME", default="auto", help="see mixbit doctor (default: auto)")
    engine.add_argument("--threads", metavar="N", type=int, default=0, help="CPU threads (default: one a core)")
    engine.add_argument("--context-length", metavar="N", type=int, help="tokens (default: the model's own)")
    engine.add_argument("--max-running", metavar="N", type=int, default=16, help="requests in a batch (default: 16)")
    engine.add_argument("--max-queue", metavar="N", type=int, default=256, help="requests waiting (default: 256)")
    add_memory_options(engine)
    engine.add_argument(
        "--cache-memory",
        metavar="SIZE",
        type=parse_size,
        help="for KV caches, all models together, such as 2G (default: from what is free)",
    )
    engine.add_argument(
        "--unload-after",
        metavar="SECONDS",
        type=_seconds,
        help="unload a model that no request has asked for so long; the next one loads it again (default: never)",
    )
    engine.add_argument(
        "--request-timeout", metavar="SECONDS", type=_seconds, help="for one request, waiting included (default: none)"
    )
    engine.add_argument(
        "--shutdown-timeout",
        metavar="SECONDS",
        type=_seconds,
        help="what running requests get to finish after Ctrl-C or SIGTERM (default: 3); a second signal ends at once",
    )
    engine.add_argument("--no-disk-cache", action="store_true", help="keep no prefixes of prompts on disk")
    engine.add_argument(
        "--disk-cache", metavar="DIR", type=Path, help="where to keep them (default: prefixes in the user's cache)"
    )
    engine.add_argument(
        "--disk-cache-size", metavar="SIZE", type=parse_size, default=8 << 30, help="for prefixes on disk (default: 8G)"
    )
    engine.add_argument("--k", metavar="K", type=int, help="active experts per token (default: the model's own)")
    engine.add_argument("--dtype", metavar="NAME", help="activations of GPU backends (default: the checkpoint's)")
    engine.add_argument("--kernels", choices=["auto", "stock"], default="auto", help="on GPUs: ours, or MLX's own")
    engine.add_argument("--isa", metavar="NAME", help="force a CPU instruction set (default: the best)")
    engine.add_argument(
        "--precision",
        choices=["fast", "exact"],
        default="fast",
        help="fast: on CPUs, quantized matrices take their inputs rounded to 8 bits (default); exact: as float32",
    )

    network = parser.add_argument_group("network and access")
    network.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    network.add_argument("--port", type=_port, default=8080, help="port, 0 for any (default: 8080)")
    network.add_argument(
        "--api-key", metavar="KEY", action="append", default=[], help="a key to ask for; also MIXBIT_API_KEY"
    )
    network.add_argument("--api-key-file", metavar="FILE", type=Path, help="keys, one in a line")
    network.add_argument(
        "--allow-unauthenticated", action="store_true", help="let other machines in without a key: be sure"
    )
    network.add_argument(
        "--allow-host", metavar="NAME", action="append", default=[], help="a further Host name; repeatable"
    )
    network.add_argument(
        "--allow-origin", metavar="URL", action="append", default=[], help="a web origin whose pages may call"
    )

    output = parser.add_argument_group("output")
    output.add_argument(
        "--log-level",
        choices=["debug", "info", "warning", "error"],
        help="info: one line for each request (default: warning; info if the format is json)",
    )
    output.add_argument(
        "--log-format", choices=["text", "json"], default="text", help="json: one object a line (default: text)"
    )
    parser.set_defaults(run=run)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to 65535")
    return int(text)


def _seconds(text: str) -> float:
    if not re.fullmatch(r"\d{1,9}(\.\d+)?", text) or not float(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return float(text)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def read_keys(args: argparse.Namespace) -> tuple[str, ...]:
    """Keys from flags, file and environment. Raises ServeError if a source that was named has none."""
    keys = [*args.api_key]
    if (key := os.environ.get("MIXBIT_API_KEY")) is not None:
        keys.append(key)
    if args.api_key_file is not None:
        try:
            lines = args.api_key_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ServeError(f"{args.api_key_file}: cannot be read: {error}") from None
        found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            raise ServeError(f"{args.api_key_file}: holds no key; write one in a line")
        keys += found
    if not all(key.strip() for key in keys):
        raise ServeError("an API key is empty; check --api-key and MIXBIT_API_KEY")
    return tuple(key.strip() for key in keys)


def run(args: argparse.Namespace) -> int:
    """Check the options, then serve until Ctrl-C."""
    keys = read_keys(args)
    if not (is_loopback(args.host) or keys or args.allow_unauthenticated):
        raise ServeError(
            f"--host {args.host} lets other machines in, and there is no API key. Set --api-key, --api-key-file or "
            "MIXBIT_API_KEY, or say --allow-unauthenticated."
        )
    import msgspec

    from mixbit.engine.config import EngineConfig
    from mixbit.engine.demo import prefix_directory
    from mixbit.engine.download import resolve_model
    from mixbit.server import serving
    from mixbit.server.console import Steps
    from mixbit.server.settings import HTTP

    start_logging(args.log_level or ("info" if args.log_format == "json" else "warning"), args.log_format)
    if args.port:
        serving.listen(args.host, args.port).close()  # a taken port is said before a long download
    wanted = models_wanted(args)
    with Steps() as steps:
        directories = [resolve_model(given, revision=args.revision, progress=steps.update) for given, _ in wanted]
        common = EngineConfig(
            model=str(directories[0]),
            device=args.device,
            kernels=args.kernels,
            threads=args.threads,
            context_length=args.context_length,
            max_running=args.max_running,
            max_queue=args.max_queue,
            cache_bytes=args.cache_memory and max(1, args.cache_memory // len(wanted)),
            memory_share=1 / len(wanted),
            memory_bytes=args.memory,
            expert_bytes=args.expert_memory and max(1, args.expert_memory // len(wanted)),
            disk_cache=None if args.no_disk_cache else str(args.disk_cache or prefix_directory()),
            disk_cache_bytes=args.disk_cache_size,
            top_k_experts=args.k,
            isa=args.isa,
            dtype=args.dtype,
            precision=args.precision,
            log_format=args.log_format,
        ).check()
        plans = [
            serving.ModelPlan(
                engine=msgspec.structs.replace(common, model=str(directory)),
                names=served_names(given, directory, args.served_name, names),
                chat_template=args.chat_template,
            )
            for (given, names), directory in zip(wanted, directories, strict=True)
        ]
        refuse_shared_names(plans)
        return serving.run(
            serving.Serving(
                models=tuple(plans),
                unload_after=args.unload_after,
                request_timeout=args.request_timeout,
                shutdown_seconds=args.shutdown_timeout or HTTP.shutdown_seconds,
                host=args.host,
                port=args.port,
                local=is_loopback(args.host),
                access=access_rules(args, keys),
            ),
            steps,
        )


def models_wanted(args: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """What --model names, each with its further names. Raises ServeError for options that fit one model alone."""
    for_one = [name for name in ("served_name", "alias", "chat_template", "revision") if getattr(args, name)]
    given = args.models or (["demo"] if for_one else default_models())
    if len(given) > 1 and for_one:
        raise ServeError(
            f"--{for_one[0].replace('_', '-')} is for one model, and {len(given)} are asked for; "
            "name them with --model PATH_OR_HUB_ID=NAME"
        )
    wanted = []
    for text in given:
        path, equals, name = text.rpartition("=")
        split = bool(equals) and not Path(text).exists()
        if split and not (path and name):
            raise ServeError(f"--model {text}: write PATH_OR_HUB_ID=NAME")
        wanted.append((path if split else text, [*args.alias, *([name] if split else [])]))
    return wanted


def served_names(given: str, directory: Path, served_name: str | None, further: list[str]) -> tuple[str, ...]:
    """The hub id as given, or the directory's name, unless another is asked for; then the further ones."""
    own = given if "/" in given and not Path(given).exists() else directory.resolve().name
    return tuple(dict.fromkeys([served_name or own, *further]))


def refuse_shared_names(plans: list[ModelPlan]) -> None:
    """Raise ServeError if one name would mean two models."""
    seen: dict[str, str] = {}
    for plan in plans:
        for name in plan.names:
            if name in seen:
                raise ServeError(
                    f"two models have the name {name!r}: {seen[name]} and {plan.engine.model}; "
                    "give one another with --model PATH_OR_HUB_ID=NAME, or serve it under another directory name"
                )
            seen[name] = plan.engine.model


def access_rules(args: argparse.Namespace, keys: tuple[str, ...]) -> Access:
    """Local names alone on a loopback address; elsewhere any name, unless names are given."""
    from mixbit.server.settings import LOOPBACK_HOSTS, Access

    hosts = LOOPBACK_HOSTS | {host.lower() for host in [_in_url(args.host), *args.allow_host]}
    open_to_any = not is_loopback(args.host) and not args.allow_host
    return Access(keys=keys, hosts=None if open_to_any else hosts, origins=frozenset(args.allow_origin))


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def start_logging(level: str, log_format: LogFormat) -> None:
    """Logs go to stderr; the libraries' own chatter only at debug."""
    logs.start_logging(level, log_format, "%(asctime)s %(levelname)s %(name)s: %(message)s")
    if level == "info":
        for name in ("uvicorn", "httpx", "asyncio"):
            logging.getLogger(name).setLevel(logging.WARNING)
