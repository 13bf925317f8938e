"""A request as the scheduler sees it: counts, tokens and the cache it holds. Integers only."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from mixbit.engine.prefix_cache import Checkpoint, Node

_STOP_SPACING = 128  # tokens
_TAIL = 32  # tokens


@dataclass(eq=False, slots=True)
class Request:
    """One sequence from arrival to end.

    Set by whoever makes it: request_id, prompt_tokens (count), tokens (the prompt), max_length (tokens of
    prompt and output at most), stops (ascending; see prompt_stops), scored, embeds. The engine's: tokens are appended
    to, scored is raised. All else is the scheduler's.
    """

    request_id: str
    tokens: list[int]
    prompt_tokens: int
    max_length: int
    stops: tuple[int, ...] = ()  # lengths at which the recurrent state is worth keeping
    scored: int | None = None  # leading prompt tokens whose probability has been told; None: nobody asks
    embeds: bool = False  # wants the hidden state of every token and no text; leaves nothing in the cache
    arrival: int = -1  # place in the order of arrival
    computed: int = 0  # leading tokens whose KV and recurrent state are in the cache
    cached_tokens: int = 0  # prompt tokens that were found in the cache and never computed
    blocks: array[int] = field(default_factory=lambda: array("i"))  # int32: the runner copies them as they are
    node: Node | None = None  # the deepest of the cached prefix, to which the first blocks belong
    checkpoints: dict[int, Checkpoint] = field(default_factory=dict)  # within the block that is being filled
    kept: int = 0  # tokens when the recurrent state was last kept, or was taken from the cache
    slot: int = -1  # of the recurrent state; -1 while not running
    isolate_until: int = 0  # runs alone while fewer tokens than this are computed
    leader: Request | None = None  # an older one that computes the same; this one waits
    shared: int = 0  # tokens that the leader will have computed for both
    ended: bool = False

    @property
    def pending(self) -> int:
        """Tokens to compute before the next one can be sampled: 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def scoring(self) -> bool:
        """Whether logits of the prompt are still wanted."""
        return self.scored is not None and self.scored < self.prompt_tokens

    @property
    def reusable(self) -> int:
        """Leading tokens that may come from the cache: all but the last, and those of which more is wanted."""
        if self.embeds:
            return 0
        last = len(self.tokens) - 1
        return last if self.scored is None or not self.scoring else max(0, min(last, self.scored - 1))

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

    @property
    def decodes(self) -> bool:
        """Whether this is one sequence's next token, and no part of a prefill."""
        return self.count == 1 and self.samples

    @property
    def rows(self) -> range:
        """Positions whose logits are wanted: the last if it samples; with scoring, each before a token to be scored.

        Of a request that embeds: all, whose hidden states are wanted.
        """
        end = self.start + self.count
        if self.request.embeds:
            return range(self.start, end)
        if self.request.scoring:
            assert self.request.scored is not None
            return range(max(self.start, self.request.scored - 1), end)
        return range(end - 1 if self.samples else end, end)


@dataclass(frozen=True, slots=True)
class CopyBlock:
    """Make block `target` equal to block `source`."""

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class CopyState:
    """Make the recurrent state in slot `target` equal to that in slot `source`."""

    source: int
    target: int


Move = CopyBlock | CopyState


def prompt_stops(tokens: Sequence[int], end_tokens: Collection[int]) -> tuple[int, ...]:
    """Where later prompts are likely to part from this one: after the tokens that end messages, not too
    close to each other but always the first and the last; and before the last token, unless that is near.

    The same prompt again computes one token at least, hence before. Chat templates end every message with a
    token that also ends the model's own, so that no more need be known of the template.
    """
    ends = [place + 1 for place, token in enumerate(tokens[:-1]) if token in end_tokens]
    stops = ends[:1]
    for place, end in enumerate(ends[1:], 2):
        if end - stops[-1] >= _STOP_SPACING or place == len(ends):
            stops.append(end)
    last = len(tokens) - 1
    if last > 0 and last - (stops[-1] if stops else 0) >= _TAIL:
        stops.append(last)
    return tuple(stops)
