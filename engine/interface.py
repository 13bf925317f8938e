"""What the server sees of an engine: its state, its errors, and the shape of its client."""

from __future__ import annotations

from collections.abc import AsyncIterator
from enum import StrEnum
from typing import Protocol

from mixbit.engine.errors import UserError
from mixbit.engine.protocol import Delta, Embed, ErrorCode, Finished, Generate, Progress, Ready, Stats


class EngineState(StrEnum):
    """What the engine is doing. Requests are taken in READY, and where they bring it back, in UNLOADED."""

    STARTING = "starting"  # the worker process is coming up
    LOADING = "loading"  # it loads the model: see `progress`
    READY = "ready"
    RESTARTING = "restarting"  # it died and is started again: see `message`
    UNLOADED = "unloaded"  # idle for long: no worker; the next request starts one and waits for it
    FAILED = "failed"  # it will not be started again: see `message`
    CLOSED = "closed"


class RequestError(Exception):
    """A request that did not run to its end. `param` names the field at fault, where there is one."""

    def __init__(self, code: ErrorCode, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param


class RequestRefused(RequestError):  # noqa: N818
    """Raised by `generate`, `tokenize` and `detokenize` before anything has streamed."""


class RequestFailed(RequestError):  # noqa: N818
    """Raised while iterating over a completion: the stream has begun and ends here."""


class EngineFailed(UserError):  # noqa: N818
    """The engine cannot be used: the model cannot be loaded, or the worker keeps dying."""


class Completion(Protocol):
    """One running request: an async iterator and an async context manager.

    Yields Deltas and, last, one Finished. Deltas that arrive while nobody reads are joined, so a slow
    reader costs the memory of its text and no more. Raises RequestFailed if the request or the worker
    dies. Leaving the context (or `aclose`) before the end aborts the request; afterwards it does nothing.
    """

    @property
    def request_id(self) -> str:
        """The id given in Generate."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt, known before the first delta."""

    def __aiter__(self) -> AsyncIterator[Delta | Finished]: ...

    async def __aenter__(self) -> Completion: ...

    async def __aexit__(self, *exc_info: object) -> None: ...

    async def aclose(self) -> None:
        """Abort the request if it still runs. Never raises; may be called twice."""


class Engine(Protocol):
    """What the server needs of an engine. `EngineClient` is the real one, `tests.fakes.FakeEngine` the other."""

    @property
    def state(self) -> EngineState:
        """What the engine is doing now."""

    @property
    def on_demand(self) -> bool:
        """Whether requests wait while the model is loaded, instead of being refused."""

    @property
    def progress(self) -> Progress | None:
        """How far the loading is, while LOADING."""

    @property
    def ready(self) -> Ready | None:
        """What the worker said of the model: context length, vocabulary, backend, bytes. None unless READY or
        UNLOADED."""

    @property
    def stats(self) -> Stats | None:
        """What the worker said last of its load. None unless READY."""

    @property
    def restarts(self) -> int:
        """How many times a worker has died and was followed by another."""

    @property
    def message(self) -> str | None:
        """Why the state is RESTARTING or FAILED, for people."""

    async def start(self) -> None:
        """Start the worker and return at once; the state tells the rest."""

    async def wait_ready(self) -> Ready:
        """Wait until the model has been loaded. Raises EngineFailed if it cannot be, or if the engine is closed."""

    async def generate(self, request: Generate | Embed) -> Completion:
        """Submit a request and wait until its prompt is tokenized and within the limits. An Embed has no Deltas.

        `request.request_id` is unique among the running ones. Raises RequestRefused: "not_ready" if the
        state is not READY, "context_length_exceeded", "invalid_value", "queue_full",
        "insufficient_memory", "worker_died", "timeout". Cancelling this call aborts the request.
        """

    async def tokenize(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Tokens of a text; special tokens in it are parsed. Raises RequestRefused."""

    async def detokenize(self, tokens: list[int]) -> str:
        """Text of tokens, special tokens included. Raises RequestRefused if one is out of range."""

    async def pieces(self, tokens: list[int]) -> list[bytes]:
        """What each token adds to a text; may be part of a UTF-8 character. Raises as `detokenize`."""

    async def close(self) -> None:
        """End the worker: asked first, killed after a grace period. Streams in flight fail."""
