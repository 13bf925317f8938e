"""Which tool format and reasoning markers a model has: by its preset, else by what its template mentions."""

from __future__ import annotations

from collections.abc import Callable

from mixbit.server.parsing.glm import GLM
from mixbit.server.parsing.harmony import HARMONY
from mixbit.server.parsing.hermes import HERMES
from mixbit.server.parsing.machine import ReasoningMarkers
from mixbit.server.parsing.minimax import MINIMAX
from mixbit.server.parsing.mistral import MISTRAL, MISTRAL_LIST
from mixbit.server.parsing.pythonic import PYTHONIC, PYTHONIC_LFM, PYTHONIC_LLAMA
from mixbit.server.parsing.qwen3_coder import QWEN3_CODER
from mixbit.server.parsing.tools import ToolFormat

FORMATS = {
    each.name: each
    for each in (
        QWEN3_CODER,
        GLM,
        MINIMAX,
        HARMONY,
        MISTRAL,
        MISTRAL_LIST,
        PYTHONIC,
        PYTHONIC_LFM,
        PYTHONIC_LLAMA,
        HERMES,
    )
}

# Words of a template that give its format away, the telling ones first.
_SIGNS = (
    ("<|channel|>", HARMONY),
    ("<minimax:tool_call>", MINIMAX),
    ("<arg_key>", GLM),
    ("<function=", QWEN3_CODER),
    ("[ARGS]", MISTRAL),
    ("[TOOL_CALLS]", MISTRAL_LIST),
    ("<|tool_call_start|>", PYTHONIC_LFM),
    ("<|python_start|>", PYTHONIC_LLAMA),
)
_THINK = ReasoningMarkers("<think>", "</think>")
_MISTRAL_THINK = ReasoningMarkers("[THINK]", "[/THINK]")


def tool_format(knows: Callable[[str], bool], preset: str | None = None) -> ToolFormat:
    """The preset's format, else the template's, else Hermes. Raises KeyError for an unknown name."""
    if preset is not None:
        return FORMATS[preset]
    return next((found for sign, found in _SIGNS if knows(sign)), HERMES)


def reasoning_markers(knows: Callable[[str], bool], preset: ReasoningMarkers | None = None) -> ReasoningMarkers | None:
    """The preset's markers, else the template's; None if the model does not think."""
    if preset is not None:
        return preset
    return next((each for each in (_THINK, _MISTRAL_THINK) if knows(each.open) or knows(each.close)), None)


def opens_reasoning(prompt: str, markers: ReasoningMarkers, prefill: str | None = None) -> bool:
    """Whether a prompt ends inside of thinking. prefill: the part that begins the answer, if the client gave one."""
    if prefill is None:
        return prompt.rstrip().endswith(markers.open)
    before = prompt[: len(prompt) - len(prefill)]
    opened, closed = prefill.rfind(markers.open), prefill.rfind(markers.close)
    return opened > closed or (closed < 0 and before.rstrip().endswith(markers.open))
