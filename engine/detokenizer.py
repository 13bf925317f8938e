"""From tokens to text that may be shown, piece by piece.

Bytes of tokens become whole characters, and text waits only as long as it could be the beginning of a
stop string. Joined, the pieces are the full decoding, cut before the first stop string.
"""

from __future__ import annotations

import codecs
from collections import deque
from dataclasses import dataclass, field

from mixbit.engine.protocol import TokenLogprob, TokenLogprobs
from mixbit.engine.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that is released, the number of tokens it completes, and their logprobs if asked for."""

    text: str = ""
    token_count: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    stop: str | None = None  # the stop string that was found: nothing follows


@dataclass(frozen=True, slots=True)
class _Pending:
    """A token whose bytes start .. end of the text are not all released."""

    start: int
    end: int
    logprobs: TokenLogprobs | None


class Detokenizer:
    """The text of one request's output. Special tokens are not shown, but for those with one of the texts `shown`."""

    def __init__(self, tokenizer: Tokenizer, stop: list[str], shown: list[str] | None = None) -> None:
        self._tokenizer = tokenizer
        self._shown = {token for text in shown or () if (token := tokenizer.added_token(text)) is not None}
        self._stop = stop
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # decoded, may begin a stop string
        self._decoded = 0  # UTF-8 bytes of all decoded text, held or released
        self._released = 0
        self._pending: deque[_Pending] = deque()

    def feed(self, token: int, logprob: float | None = None, top: tuple[tuple[int, float], ...] = ()) -> Piece:
        """The text that this token releases. With a logprob, entries are kept for the pieces."""
        tokenizer = self._tokenizer
        data = tokenizer.token_bytes(token) if token in self._shown else tokenizer.visible_bytes(token)
        logprobs = None if logprob is None else self._entry(token, data, logprob, top)
        text = self._decoder.decode(data)
        self._decoded += len(text.encode())
        end = self._decoded + len(self._decoder.getstate()[0])  # an unfinished character counts as it stands
        self._pending.append(_Pending(end - len(data), end, logprobs))
        return self._release(text)

    def entry(self, token: int, logprob: float, top: tuple[tuple[int, float], ...] = ()) -> TokenLogprobs:
        """A token of the prompt with its logprobs."""
        return self._entry(token, self._tokenizer.token_bytes(token), logprob, top)

    def finish(self) -> Piece:
        """What is left at the end of the output. An unfinished character becomes U+FFFD."""
        piece = self._release(self._decoder.decode(b"", final=True))
        if piece.stop is not None:
            return piece
        rest, self._held = self._held, ""
        logprobs = [*piece.logprobs, *(entry.logprobs for entry in self._pending if entry.logprobs)]
        count = piece.token_count + len(self._pending)
        self._pending.clear()
        return Piece(piece.text + rest, count, logprobs)

    def _entry(self, token: int, data: bytes, logprob: float, top: tuple[tuple[int, float], ...]) -> TokenLogprobs:
        alternatives = [TokenLogprob(i, self._tokenizer.token_bytes(i), value) for i, value in top]
        return TokenLogprobs(TokenLogprob(token, data, logprob), alternatives)

    def _release(self, text: str) -> Piece:
        text = self._held + text
        cut, stop = self._find_stop(text)
        if stop is None:
            cut = len(text) - self._could_begin_stop(text)
        text, self._held = text[:cut], text[cut:]
        self._released += len(text.encode())
        logprobs: list[TokenLogprobs] = []
        count = 0
        while self._pending and self._pending[0].end <= self._released:
            entry = self._pending.popleft()
            count += 1
            if entry.logprobs is not None:
                logprobs.append(entry.logprobs)
        if stop is not None and self._pending and (shown := self._released - self._pending[0].start) > 0:
            # A token that reaches into the stop string: its entry ends where the text does.
            count += 1
            if (last := self._pending[0].logprobs) is not None:
                chosen = last.chosen
                logprobs.append(
                    TokenLogprobs(TokenLogprob(chosen.token_id, chosen.text[:shown], chosen.logprob), last.top)
                )
        return Piece(text, count, logprobs, stop)

    def _find_stop(self, text: str) -> tuple[int, str | None]:
        """Where the first stop string begins, and which; the longest if several begin there."""
        found = [(place, -len(stop), stop) for stop in self._stop if (place := text.find(stop)) >= 0]
        if not found:
            return len(text), None
        place, _, stop = min(found)
        return place, stop

    def _could_begin_stop(self, text: str) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
