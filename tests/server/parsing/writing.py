"""Calls as each family of models writes them, for any arguments."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

Call = tuple[str, dict[str, Any]]


def bare(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def hermes(calls: list[Call]) -> str:
    return "\n".join(
        f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"
        for name, arguments in calls
    )


def qwen3_coder(calls: list[Call]) -> str:
    blocks = []
    for name, arguments in calls:
        inner = "".join(f"<parameter={key}>\n{bare(value)}\n</parameter>\n" for key, value in arguments.items())
        blocks.append(f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>")
    return "\n".join(blocks)


def glm(calls: list[Call]) -> str:
    blocks = []
    for name, arguments in calls:
        inner = "".join(
            f"<arg_key>{key}</arg_key>\n<arg_value>{bare(value)}</arg_value>\n" for key, value in arguments.items()
        )
        blocks.append(f"<tool_call>{name}\n{inner}</tool_call>")
    return "\n".join(blocks)


def minimax(calls: list[Call]) -> str:
    blocks = []
    for name, arguments in calls:
        inner = "".join(f'<parameter name="{key}">{bare(value)}</parameter>\n' for key, value in arguments.items())
        blocks.append(f'<invoke name="{name}">\n{inner}</invoke>\n')
    return f"<minimax:tool_call>\n{''.join(blocks)}</minimax:tool_call>"


def mistral(calls: list[Call]) -> str:
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{json.dumps(arguments)}" for name, arguments in calls)


def mistral_list(calls: list[Call]) -> str:
    return "[TOOL_CALLS]" + json.dumps([{"name": name, "arguments": arguments} for name, arguments in calls])


def python_list(calls: list[Call]) -> str:
    texts = (
        f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})" for name, arguments in calls
    )
    return f"[{', '.join(texts)}]"


def pythonic_lfm(calls: list[Call]) -> str:
    return f"<|tool_call_start|>{python_list(calls)}<|tool_call_end|>"


def pythonic_llama(calls: list[Call]) -> str:
    return f"<|python_start|>{python_list(calls)}<|python_end|>"


def harmony(calls: list[Call]) -> str:
    return "<|start|>assistant".join(
        f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{json.dumps(arguments)}<|call|>"
        for name, arguments in calls
    )


WRITERS: dict[str, Callable[[list[Call]], str]] = {
    "hermes": hermes,
    "qwen3-coder": qwen3_coder,
    "glm": glm,
    "minimax": minimax,
    "mistral": mistral,
    "mistral-list": mistral_list,
    "pythonic": python_list,
    "pythonic-lfm": pythonic_lfm,
    "pythonic-llama": pythonic_llama,
    "harmony": harmony,
}
