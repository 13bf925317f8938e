"""Chat templates: the model's own Jinja, in a sandbox, with limits on time and size.

Names and filters that templates may use are those of transformers' `apply_chat_template`. Templates come from the
model's directory or the operator, never from a client.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError

from mixbit.engine.errors import UserError
from mixbit.server.sandbox import Environment, Limit
from mixbit.server.settings import TEMPLATE, TemplateLimits


class ChatTemplateError(UserError):
    """A template that cannot be compiled; the message says where and why."""


class RenderError(Exception):
    """A template that does not take these messages; the message is for the client."""


_pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="template")


@dataclass(frozen=True)
class Compiled:
    """One template of a model."""

    source: str
    template: Template
    environment: Environment


class ChatTemplate:
    """A model's templates: `default`, and perhaps `tool_use` for requests with tools.

    constants: variables of every rendering, such as bos_token.
    """

    def __init__(
        self, sources: Mapping[str, str], constants: Mapping[str, str], limits: TemplateLimits = TEMPLATE
    ) -> None:
        self.constants = dict(constants)
        self._limits = limits
        self._compiled = {name: _compile(name, source, limits) for name, source in sources.items()}
        self.control_names = frozenset(
            {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "tokenize"}
            | {"chat_template", "return_dict", "return_tensors", "return_assistant_tokens_mask", "self", "loop"}
            | {"bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"}
            | set(next(iter(self._compiled.values())).environment.globals)
        )

    @property
    def source(self) -> str:
        """The text of the default template."""
        return self._compiled["default"].source

    def knows(self, word: str) -> bool:
        """Whether a template of the model mentions `word`, such as a role."""
        return any(word in each.source for each in self._compiled.values())

    async def render(self, variables: Mapping[str, Any], *, has_tools: bool) -> str:
        """The prompt's text, made off the event loop. Raises RenderError."""
        name = "tool_use" if has_tools and "tool_use" in self._compiled else "default"
        work = asyncio.get_running_loop().run_in_executor(
            _pool, self._render, self._compiled[name], {**variables, **self.constants}
        )
        try:
            return await asyncio.wait_for(work, 2 * self._limits.seconds)
        except TimeoutError:
            raise RenderError(f"The chat template took longer than {self._limits.seconds:g} s.") from None

    def _render(self, compiled: Compiled, variables: Mapping[str, Any]) -> str:
        compiled.environment.begin()
        pieces, size = [], 0
        try:
            for piece in compiled.template.generate(variables):
                pieces.append(piece)
                size += len(piece)
                if size > self._limits.max_chars:
                    raise Limit(f"it wrote more than {self._limits.max_chars} characters")
                compiled.environment.tick()
        except Limit as error:
            raise RenderError(f"The chat template was stopped: {error}.") from None
        except TemplateError as error:
            raise RenderError(f"The model's chat template refuses these messages: {str(error)[:500]}") from None
        except Exception as error:
            text = f"{type(error).__name__}: {error}"[:500]
            raise RenderError(f"The model's chat template failed on these messages: {text}") from None
        return "".join(pieces)


def _compile(name: str, source: str, limits: TemplateLimits) -> Compiled:
    environment = Environment(limits)
    try:
        return Compiled(source, environment.from_source(source), environment)
    except TemplateSyntaxError as error:
        raise ChatTemplateError(f"the chat template {name!r} has an error in line {error.lineno}: {error}") from None
