"""From a Generate message to a request that can run, or a refusal. Runs beside the steps, in a thread of its own."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Collection
from dataclasses import dataclass

from mixbit.engine.constraint import GrammarCompiler, GrammarError
from mixbit.engine.detokenizer import Detokenizer
from mixbit.engine.pooling import Pooling
from mixbit.engine.protocol import Embed, ErrorCode, Generate, Sampling
from mixbit.engine.request import Request, prompt_stops
from mixbit.engine.sampling import Sampler
from mixbit.engine.tokenizer import Tokenizer

log = logging.getLogger("mixbit.engine")


class RefusedError(Exception):
    """A request that is not taken."""

    def __init__(self, code: ErrorCode, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param


@dataclass(frozen=True, eq=False, slots=True)
class Generation:
    """A request with what turns its logits into text."""

    request: Request
    sampler: Sampler
    detokenizer: Detokenizer
    eos_ids: frozenset[int]


@dataclass(frozen=True, eq=False, slots=True)
class Embedding:
    """A request with what turns its hidden states into a vector."""

    request: Request
    pooling: Pooling


Work = Generation | Embedding


@dataclass(frozen=True)
class Limits:
    """What requests may ask for. Lengths in tokens, prompt and output together."""

    context_length: int
    cache_capacity: int  # tokens that fit in the cache at once
    vocab_size: int
    max_requests: int  # running and waiting
    embedding_size: int | None = None  # None: texts cannot be embedded


class Admission:
    """Tokenizes, checks, and counts the requests that are in the engine. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer, limits: Limits) -> None:
        self._tokenizer = tokenizer
        self._grammars = GrammarCompiler(tokenizer, limits.vocab_size)
        self._limits = limits
        self._inside: dict[str, Work | None] = {}  # None while it is prepared
        self._lock = threading.Lock()

    def prepare(self) -> None:
        """Get ready for the first grammar, in a thread: it would hold up what runs when it comes."""

        def work() -> None:
            try:
                self._grammars.prepare()
            except Exception:
                log.exception("grammars cannot be used with this tokenizer")

        threading.Thread(target=work, name="vocabulary", daemon=True).start()

    def admit(self, message: Generate | Embed) -> Work:
        """The request, ready to run; it counts until `end` or `abort`. Raises RefusedError."""
        with self._lock:
            if message.request_id in self._inside:
                raise RefusedError("invalid_value", f"request {message.request_id!r} is already running", "request_id")
            if len(self._inside) >= self._limits.max_requests:
                raise RefusedError(
                    "queue_full", f"{len(self._inside)} requests are running or waiting; no more are taken, try later"
                )
            self._inside[message.request_id] = None
        try:
            work = self._embedding(message) if isinstance(message, Embed) else self._generation(message)
            self._inside[message.request_id] = work
        except BaseException:
            self.abort(message.request_id)
            raise
        return work

    def end(self, work: Work) -> None:
        """Count a request no more. Another with its id, that came after an abort, still counts."""
        with self._lock:
            if self._inside.get(work.request.request_id) is work:
                del self._inside[work.request.request_id]

    def abort(self, request_id: str) -> None:
        """Make room for the next before the running step is over. The engine hears of the abort by itself."""
        with self._lock:
            self._inside.pop(request_id, None)

    def tokenize(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Tokens of a text."""
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def detokenize(self, tokens: list[int]) -> tuple[str, list[bytes]]:
        """Text of tokens, special ones included, and of each. Raises RefusedError if one is out of range."""
        self._check_tokens(tokens, "tokens")
        return self._tokenizer.decode(tokens), [self._tokenizer.token_bytes(token) for token in tokens]

    def _embedding(self, message: Embed) -> Embedding:
        if self._limits.embedding_size is None:
            raise RefusedError("invalid_value", "the backend that runs this model gives no hidden states", "model")
        tokens = self._prompt(message)
        self._longest(len(tokens))
        request = Request(
            message.request_id,
            tokens,
            prompt_tokens=len(tokens),
            max_length=len(tokens) + 1,
            embeds=True,
        )
        return Embedding(request, Pooling(self._limits.embedding_size))

    def _generation(self, message: Generate) -> Generation:
        _check_sampling(message.sampling)
        self._check_tokens(message.sampling.logit_bias, "logit_bias")
        _check(message.max_tokens is None or message.max_tokens >= 1, "max_tokens", message.max_tokens, "at least 1")
        _check(message.logprobs is None or message.logprobs >= 0, "logprobs", message.logprobs, "at least 0")
        _check(message.logprobs is not None or not message.prompt_logprobs, "prompt_logprobs", True, "logprobs as well")
        _check("" not in message.stop, "stop", "an empty string", "strings with at least one character")
        tokens = self._prompt(message)
        longest = self._longest(len(tokens))
        if message.max_tokens is not None:
            longest = min(longest, len(tokens) + message.max_tokens)
        try:
            constraint = None if message.grammar is None else self._grammars.compile(message.grammar)
        except GrammarError as error:
            raise RefusedError("invalid_value", str(error), error.param) from None
        stops = prompt_stops(tokens, self._tokenizer.eos_ids)
        return Generation(
            Request(
                message.request_id,
                tokens,
                prompt_tokens=len(tokens),
                max_length=longest,
                stops=stops,
                scored=0 if message.prompt_logprobs else None,
            ),
            Sampler(message.sampling, tokens, logprobs=message.logprobs, constraint=constraint),
            Detokenizer(self._tokenizer, message.stop, message.shown_tokens),
            frozenset() if message.ignore_eos else self._tokenizer.eos_ids,
        )

    def _prompt(self, message: Generate | Embed) -> list[int]:
        """Its tokens, all within the vocabulary."""
        tokens = message.prompt
        if isinstance(tokens, str):
            tokens = self.tokenize(tokens, add_special_tokens=message.add_special_tokens)
        self._check_tokens(tokens, "prompt")
        return list(tokens)

    def _longest(self, prompt: int) -> int:
        """How long a request with such a prompt can become. Raises RefusedError if no output would fit."""
        context, capacity = self._limits.context_length, self._limits.cache_capacity
        if prompt == 0:
            raise RefusedError("invalid_value", "the prompt has no tokens", "prompt")
        if prompt >= context:
            raise RefusedError(
                "context_length_exceeded",
                f"This model's maximum context length is {context} tokens. The prompt of {prompt} tokens exceeds the "
                "available context size, which must hold the answer too.",
                "prompt",
            )
        if prompt >= capacity:
            raise RefusedError(
                "insufficient_memory",
                f"The prompt has {prompt} tokens, but the memory for the cache holds {capacity}, the answer included.",
                "prompt",
            )
        return min(context, capacity)

    def _check_tokens(self, tokens: Collection[int], param: str) -> None:
        vocab_size = self._limits.vocab_size
        if tokens and (min(tokens) < 0 or max(tokens) >= vocab_size):
            worst = min(tokens) if min(tokens) < 0 else max(tokens)
            raise RefusedError(
                "invalid_value", f"{param} holds token {worst}; the model has 0 .. {vocab_size - 1}", param
            )


def _check(valid: bool, param: str, value: object, expected: str) -> None:
    if not valid:
        raise RefusedError("invalid_value", f"{param} is {value}; expected {expected}", param)


def _check_sampling(sampling: Sampling) -> None:
    temperature, top_p, min_p = sampling.temperature, sampling.top_p, sampling.min_p
    repetition = sampling.repetition_penalty
    _check(0 <= temperature < math.inf, "temperature", temperature, "a number not below 0")
    _check(0 <= top_p <= 1, "top_p", top_p, "a number from 0 to 1")
    _check(0 <= min_p <= 1, "min_p", min_p, "a number from 0 to 1")
    _check(sampling.top_k >= 0, "top_k", sampling.top_k, "an integer not below 0")
    _check(1e-3 <= repetition <= 1e3, "repetition_penalty", repetition, "a number from 0.001 to 1000")
    for name in ("presence_penalty", "frequency_penalty"):
        _check(math.isfinite(getattr(sampling, name)), name, getattr(sampling, name), "a finite number")
    for token, bias in sampling.logit_bias.items():
        _check(math.isfinite(bias), "logit_bias", f"{bias} for token {token}", "finite numbers")
