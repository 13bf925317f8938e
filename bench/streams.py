"""A streaming client that costs little: it runs beside the servers that it measures, on their cores."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import msgspec


class StreamError(Exception):
    """The server refused, or broke off."""


@dataclass
class Streamed:
    """What came of a request. sent: when it was. times: of each piece of text (time.perf_counter)."""

    sent: float = 0.0
    times: list[float] = field(default_factory=list)
    text: str = ""
    prompt: int = 0  # tokens
    cached: int = 0  # of them
    output: int = 0

    @property
    def first(self) -> float:
        """Seconds to the first piece. Raises StreamError if none came."""
        if not self.times:
            raise StreamError("an answer without text")
        return self.times[0] - self.sent


async def stream(port: int, path: str, body: dict[str, Any]) -> AsyncIterator[Streamed]:
    """The same object again for every piece of text, and once more at the end."""
    answer = Streamed()
    data = msgspec.json.encode({**body, "stream": True, "stream_options": {"include_usage": True}})
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    answer.sent = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    try:
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        status = (await reader.readline()).decode().strip()
        if " 200" not in status:
            raise StreamError(f"{status}: {(await reader.read(2000)).decode(errors='replace')}")
        # Sizes of HTTP chunks and empty lines lie between the lines of events, which servers do not split.
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                if _read(answer, msgspec.json.decode(line[6:])):
                    yield answer
            elif line.startswith(b"data: [DONE]"):
                break
        yield answer
    finally:
        writer.close()


async def whole(port: int, path: str, body: dict[str, Any]) -> Streamed:
    """The answer when it is complete."""
    *_, last = [answer async for answer in stream(port, path, body)]
    return last


def _read(answer: Streamed, event: dict[str, Any]) -> bool:
    """Note an event; whether it has text."""
    if "error" in event:
        raise StreamError(str(event["error"]))
    if usage := event.get("usage"):
        answer.prompt, answer.output = usage["prompt_tokens"], usage["completion_tokens"]
        details = usage.get("prompt_tokens_details") or {}
        answer.cached = details.get("cached_tokens") or (event.get("timings") or {}).get("cache_n") or 0
    for choice in event.get("choices", ()):
        piece = choice.get("text") or (choice.get("delta") or {}).get("content")
        if piece:
            answer.times.append(time.perf_counter())
            answer.text += piece
            return True
    return False
