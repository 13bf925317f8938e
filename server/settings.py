"""What the server is told at start: limits from configs/limits.toml, and the operator's choices."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class HttpLimits:
    """Bounds on a connection. Sizes in bytes, times in seconds."""

    max_body_bytes: int
    max_header_bytes: int
    max_json_depth: int
    header_seconds: float
    body_seconds: float
    keepalive_seconds: float
    shutdown_seconds: float


@dataclass(frozen=True)
class RequestLimits:
    """Bounds on the fields of a request."""

    max_choices: int
    max_messages: int
    max_parts: int
    max_tools: int
    max_stop: int
    max_stop_chars: int
    max_logit_bias: int
    max_top_logprobs: int
    max_template_kwargs: int
    max_inputs: int
    embeddings_at_once: int


@dataclass(frozen=True)
class GrammarLimits:
    """Bounds on what an output may be constrained by."""

    max_schema_depth: int
    max_schema_nodes: int
    max_chars: int
    max_calls: int


@dataclass(frozen=True)
class TemplateLimits:
    """Bounds on rendering one chat template."""

    seconds: float
    max_chars: int


def read_toml(name: str) -> dict[str, Any]:
    """Parse a file that ships in configs/."""
    return tomllib.loads((resources.files("mixbit.configs") / name).read_text(encoding="utf-8"))


_tables = read_toml("limits.toml")
HTTP = HttpLimits(**_tables["http"])
REQUEST = RequestLimits(**_tables["request"])
GRAMMAR = GrammarLimits(**_tables["grammar"])
TEMPLATE = TemplateLimits(**_tables["template"])


LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})


@dataclass(frozen=True)
class Access:
    """Who may talk to the server.

    keys: accepted bearer keys, none means everyone. hosts: accepted Host names without port, lower case; None
    accepts any. origins: web origins (scheme://host[:port]) whose pages may call, besides the server's own.
    """

    keys: tuple[str, ...] = field(default=(), repr=False)
    hosts: frozenset[str] | None = None
    origins: frozenset[str] = frozenset()
