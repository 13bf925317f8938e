"""What has arrived of a completion and has not been read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from mixbit.engine.interface import RequestFailed
from mixbit.engine.protocol import Delta, Finished

_JOIN_AT = 64  # deltas that wait for a reader before they become one


class Stream:
    """A `Completion`. `abort` is called with the id if the reader gives up before the end."""

    def __init__(self, request_id: str, abort: Callable[[str], None]) -> None:
        self.request_id = request_id
        self._abort = abort
        self.prompt_tokens = 0
        self._deltas: list[Delta] = []
        self._end: Finished | RequestFailed | None = None
        self._ended = False  # nothing more will be pushed
        self._changed = asyncio.Event()
        self._at_end: list[Callable[[], None]] = []

    def on_end(self, call: Callable[[], None]) -> None:
        """Call this when the request has ended, one way or another."""
        self._at_end.append(call)

    def push(self, delta: Delta) -> None:
        """Add text that has arrived."""
        self._deltas.append(delta)
        if len(self._deltas) >= _JOIN_AT:
            self._deltas = [_join(self._deltas)]
        self._changed.set()

    def end(self, event: Finished | RequestFailed | None) -> None:
        """Note how the request ended; None if the reader gave it up."""
        self._end, self._ended = event, True
        self._changed.set()
        for call in self._at_end:
            call()

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Delta | Finished:
        while not self._deltas and not self._ended:
            self._changed.clear()
            await self._changed.wait()
        if self._deltas:
            deltas, self._deltas = self._deltas, []
            return _join(deltas)
        event, self._end = self._end, None
        if isinstance(event, RequestFailed):
            raise event
        if event is None:
            raise StopAsyncIteration
        return event

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Abort the request if it still runs."""
        if not self._ended:
            self._deltas.clear()
            self.end(None)
            self._abort(self.request_id)


def _join(deltas: list[Delta]) -> Delta:
    if len(deltas) == 1:
        return deltas[0]
    return Delta(
        request_id=deltas[0].request_id,
        text="".join(delta.text for delta in deltas),
        token_count=sum(delta.token_count for delta in deltas),
        logprobs=[entry for delta in deltas for entry in delta.logprobs],
    )
