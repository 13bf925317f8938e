"""A request as the scheduler sees it: counts, tokens and the cache it holds. Integers only."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field


@dataclass(eq=False, slots=True)
class Request:
    """One sequence from arrival to end.

    Set by whoever makes it: request_id, prompt_tokens (count), tokens (the prompt), max_length (tokens of
    prompt and output at most). Appended to by the engine: tokens. All else is the scheduler's.
    """

    request_id: str
    tokens: list[int]
    prompt_tokens: int
    max_length: int
    arrival: int = -1  # place in the order of arrival
    computed: int = 0  # leading tokens whose KV and recurrent state are in the cache
    cached_tokens: int = 0  # prompt tokens that were found in the cache and never computed
    blocks: array[int] = field(default_factory=lambda: array("i"))  # int32: the runner copies them as they are
    slot: int = -1  # of the recurrent state; -1 while not running
    isolate_until: int = 0  # runs alone while fewer tokens than this are computed
    ended: bool = False

    @property
    def pending(self) -> int:
        """Tokens to compute before the next one can be sampled: 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def output_tokens(self) -> int:
        """Tokens sampled so far."""
        return len(self.tokens) - self.prompt_tokens


@dataclass(frozen=True, slots=True)
class Chunk:
    """Part of a step: the request's tokens start .. start + count."""

    request: Request
    start: int
    count: int

    @property
    def samples(self) -> bool:
        """Whether the next token is sampled after this chunk."""
        return self.start + self.count == len(self.request.tokens)
