"""Log-probabilities in the forms of the two completion endpoints.

A token may be part of a character: `token` shows what can be shown of it, `bytes` has it exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mixbit.engine.protocol import TokenLogprob, TokenLogprobs

_FLOOR = -9999.0  # JSON has no infinity


def _value(token: TokenLogprob) -> float:
    return max(token.logprob, _FLOOR)


def _text(token: TokenLogprob) -> str:
    return token.text.decode("utf-8", "replace")


def _chat_token(token: TokenLogprob) -> dict[str, Any]:
    return {"token": _text(token), "logprob": _value(token), "bytes": list(token.text)}


def chat_logprobs(tokens: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """`logprobs` of a chat choice."""
    content = [{**_chat_token(each.chosen), "top_logprobs": [_chat_token(top) for top in each.top]} for each in tokens]
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Sequence[TokenLogprobs], offset: int, with_top: bool) -> dict[str, Any]:
    """`logprobs` of a plain completion; `offset`: characters of the choice's text before these tokens."""
    texts = [_text(each.chosen) for each in tokens]
    offsets = [offset + sum(map(len, texts[:count])) for count in range(len(texts))]
    # The chosen token is always among those listed.
    tops = [{_text(token): _value(token) for token in [*reversed(each.top), each.chosen]} for each in tokens]
    return {
        "tokens": texts,
        "token_logprobs": [_value(each.chosen) for each in tokens],
        "top_logprobs": tops if with_top else None,
        "text_offset": offsets,
    }
