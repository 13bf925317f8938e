"""Chat templates: the model's own Jinja, in a sandbox, with limits on time and size.

Names and filters that templates may use are those of transformers' `apply_chat_template`. Templates come from the
model's directory or the operator, never from a client.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mixbit.engine.errors import UserError
from mixbit.server.settings import TEMPLATE, TemplateLimits


class ChatTemplateError(UserError):
    """A template that cannot be compiled; the message says where and why."""


class RenderError(Exception):
    """A template that does not take these messages; the message is for the client."""


class _Limit(Exception):  # noqa: N818
    """Too much time or text."""


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's tokens for training; here it is plain text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The body alone."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with a deadline that every loop and macro of a template looks at."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, limits: TemplateLimits) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        self.limits = limits
        self.local = threading.local()
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def tick(self) -> str:
        """Called by the template in each turn of a loop."""
        if time.monotonic() > self.local.deadline:
            raise _Limit(f"it took longer than {self.limits.seconds:g} s")
        return ""

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Bound what one multiplication can make."""
        size = max((len(side) for side in (left, right) if hasattr(side, "__len__")), default=0)
        factor = max((side for side in (left, right) if isinstance(side, int)), default=0)
        if operator == "**" or size * factor > self.limits.max_chars:
            raise _Limit(f"a result of '{operator}' would be too large")
        return super().call_binop(context, operator, left, right)

    def from_source(self, source: str) -> Template:
        """Compile with a tick at the start of each loop body and macro."""
        tree = self.parse(source)
        loops: list[nodes.For | nodes.Macro | nodes.CallBlock] = [
            *tree.find_all(nodes.For),
            *tree.find_all(nodes.Macro),
            *tree.find_all(nodes.CallBlock),
        ]
        for node in loops:
            tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
            node.body.insert(0, nodes.ExprStmt(tick).set_environment(self).set_lineno(node.lineno))
        return Template.from_code(self, self.compile(tree), self.make_globals(None))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without HTML's escapes, as models were trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


_pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="template")


@dataclass(frozen=True)
class Compiled:
    """One template of a model."""

    source: str
    template: Template
    environment: _Environment


class ChatTemplate:
    """A model's templates: `default`, and perhaps `tool_use` for requests with tools.

    constants: variables of every rendering, such as bos_token.
    """

    def __init__(
        self, sources: Mapping[str, str], constants: Mapping[str, str], limits: TemplateLimits = TEMPLATE
    ) -> None:
        self._constants = dict(constants)
        self._limits = limits
        self._compiled = {name: _compile(name, source, limits) for name, source in sources.items()}
        self.control_names = frozenset(
            {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "tokenize"}
            | {"chat_template", "return_dict", "return_tensors", "return_assistant_tokens_mask", "self", "loop"}
            | {"bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"}
            | set(next(iter(self._compiled.values())).environment.globals)
        )

    def knows(self, word: str) -> bool:
        """Whether a template of the model mentions `word`, such as a role."""
        return any(word in each.source for each in self._compiled.values())

    async def render(self, variables: Mapping[str, Any], *, has_tools: bool) -> str:
        """The prompt's text, made off the event loop. Raises RenderError."""
        name = "tool_use" if has_tools and "tool_use" in self._compiled else "default"
        work = asyncio.get_running_loop().run_in_executor(
            _pool, self._render, self._compiled[name], {**variables, **self._constants}
        )
        try:
            return await asyncio.wait_for(work, 2 * self._limits.seconds)
        except TimeoutError:
            raise RenderError(f"The chat template took longer than {self._limits.seconds:g} s.") from None

    def _render(self, compiled: Compiled, variables: Mapping[str, Any]) -> str:
        compiled.environment.local.deadline = time.monotonic() + self._limits.seconds
        pieces, size = [], 0
        try:
            for piece in compiled.template.generate(variables):
                pieces.append(piece)
                size += len(piece)
                if size > self._limits.max_chars:
                    raise _Limit(f"it wrote more than {self._limits.max_chars} characters")
                compiled.environment.tick()
        except _Limit as error:
            raise RenderError(f"The chat template was stopped: {error}.") from None
        except TemplateError as error:
            raise RenderError(f"The model's chat template refuses these messages: {str(error)[:500]}") from None
        except Exception as error:
            text = f"{type(error).__name__}: {error}"[:500]
            raise RenderError(f"The model's chat template failed on these messages: {text}") from None
        return "".join(pieces)


def _compile(name: str, source: str, limits: TemplateLimits) -> Compiled:
    environment = _Environment(limits)
    try:
        return Compiled(source, environment.from_source(source), environment)
    except TemplateSyntaxError as error:
        raise ChatTemplateError(f"the chat template {name!r} has an error in line {error.lineno}: {error}") from None
