"""Frames on the socket between server and worker: 4-byte little-endian length, then msgpack."""

from __future__ import annotations

import asyncio
import select
import socket
import struct
import threading
from collections.abc import Iterable, Iterator

import msgspec

from mixbit.engine.protocol import FromWorker, ToWorker

MAX_FRAME = 1 << 28
_LENGTH = struct.Struct("<I")


class Unreadable(msgspec.Struct):
    """A message that names its request but has a value of a wrong type: that request alone is at fault."""

    request_id: str
    reason: str = ""


class ProtocolError(Exception):
    """Bytes on the socket that are no frame: the other side is not what it should be."""


_encoder = msgspec.msgpack.Encoder()
_to_worker = msgspec.msgpack.Decoder(ToWorker)
_only_id = msgspec.msgpack.Decoder(Unreadable)
_from_worker = msgspec.msgpack.Decoder(FromWorker)


def encode(message: ToWorker | FromWorker) -> bytes:
    """One frame. Raises UnicodeEncodeError if a text holds a lone surrogate."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


def _decode(body: bytes) -> ToWorker | Unreadable:
    message: ToWorker | Unreadable
    try:
        message = _to_worker.decode(body)
    except msgspec.DecodeError as error:
        try:
            message = Unreadable(_only_id.decode(body).request_id, str(error))
        except msgspec.DecodeError:
            raise ProtocolError(f"a message from the server cannot be read: {error}") from error
    return message


async def read_from_worker(reader: asyncio.StreamReader) -> FromWorker | None:
    """The next message, or None at the end of the stream. Raises ProtocolError."""
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        if length > MAX_FRAME:
            raise ProtocolError(f"a frame of {length} bytes from the worker")
        message: FromWorker = _from_worker.decode(await reader.readexactly(length))
        return message
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    except msgspec.DecodeError as error:
        raise ProtocolError(f"a message from the worker cannot be read: {error}") from error


class WorkerSocket:
    """The worker's end. Sending never waits: what the socket does not take is kept for a thread to write.

    One thread receives; any thread may send. `backlog` grows while the server does not read, so whoever
    produces much looks at `congested` first.
    """

    def __init__(self, sock: socket.socket, *, congested_bytes: int = 1 << 24) -> None:
        self._socket = sock
        self._congested_bytes = congested_bytes
        self._backlog = bytearray()
        self._lock = threading.Condition()
        threading.Thread(target=self._write_backlog, name="writer", daemon=True).start()

    @property
    def congested(self) -> bool:
        """Whether more is waiting than a server that reads would ever leave."""
        return len(self._backlog) > self._congested_bytes

    def send(self, messages: Iterable[FromWorker]) -> None:
        """Queue messages, in order. Nothing is raised if the server is gone: receiving tells that."""
        data = b"".join(map(encode, messages))
        if not data:
            return
        with self._lock:
            sent = 0
            if not self._backlog:
                try:
                    sent = self._socket.send(data, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    pass
                except OSError:
                    return
            if sent < len(data):
                self._backlog += data[sent:]
                self._lock.notify()

    def receive(self) -> Iterator[ToWorker | Unreadable]:
        """Messages until the server closes its end. Raises ProtocolError."""
        stream = self._socket.makefile("rb")
        while True:
            try:
                head = stream.read(_LENGTH.size)
                if len(head) < _LENGTH.size:
                    return
                (length,) = _LENGTH.unpack(head)
                if length > MAX_FRAME:
                    raise ProtocolError(f"a frame of {length} bytes from the server")
                body = stream.read(length)
            except OSError:
                return
            if len(body) < length:
                return
            yield _decode(body)

    def flush(self, timeout: float) -> None:
        """Wait until the backlog is written, at the end of the process."""
        with self._lock:
            self._lock.wait_for(lambda: not self._backlog, timeout)

    def _write_backlog(self) -> None:
        writable = select.poll()  # not select: the descriptor may be above 1,023
        writable.register(self._socket, select.POLLOUT)
        while True:
            with self._lock:
                self._lock.wait_for(lambda: bool(self._backlog))
            writable.poll()
            with self._lock:
                try:
                    del self._backlog[: self._socket.send(self._backlog[: 1 << 18], socket.MSG_DONTWAIT)]
                except BlockingIOError:
                    continue
                except OSError:
                    self._backlog.clear()
                    return
                finally:
                    self._lock.notify_all()
