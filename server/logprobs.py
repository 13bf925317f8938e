"""Log-probabilities in the forms of the two completion endpoints.

A token may be part of a character: `token` shows what can be shown of it, `bytes` has it exactly.
"""

from __future__ import annotations

import itertools
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


def completion_logprobs(
    tokens: Sequence[TokenLogprobs], offset: int, *, with_top: bool, first: bool = False
) -> dict[str, Any]:
    """`logprobs` of a plain completion; `offset`: characters of the choice's text before these tokens.

    first: nothing stands before the first of them, so that it has no probability.
    """
    texts = [_text(each.chosen) for each in tokens]
    values: list[float | None] = [_value(each.chosen) for each in tokens]
    # The chosen token is always among those listed.
    tops: list[dict[str, float] | None] = [
        {_text(token): _value(token) for token in [*reversed(each.top), each.chosen]} for each in tokens
    ]
    if first and tokens:
        values[0] = tops[0] = None
    return {
        "tokens": texts,
        "token_logprobs": values,
        "top_logprobs": tops if with_top else None,
        "text_offset": list(itertools.accumulate(map(len, texts), initial=offset))[:-1],
    }


def of_prompt(tokens: Sequence[TokenLogprobs], text: str) -> tuple[Sequence[TokenLogprobs], bool]:
    """Those tokens of a prompt that make up its text, and whether nothing stands before the first of them.

    A tokenizer may put a token of its own at the beginning, which is no part of the text.
    """
    wanted, pieces = text.encode(), [each.chosen.text for each in tokens]
    if b"".join(pieces) != wanted and b"".join(pieces[1:]) == wanted:
        return tokens[1:], False
    return tokens, True
