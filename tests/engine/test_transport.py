"""Frames between server and worker."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import msgspec
import pytest

from mixbit.engine.protocol import Abort, Delta, FromWorker, Generate, Sampling, Shutdown, ToWorker
from mixbit.engine.transport import ProtocolError, Unreadable, WorkerSocket, encode

GENERATE = Generate(
    request_id="a", prompt="é" * 100_000, add_special_tokens=True, sampling=Sampling(logit_bias={3: 1.5}), max_tokens=3
)


@pytest.fixture
def pair() -> Iterator[tuple[WorkerSocket, socket.socket]]:
    ours, theirs = socket.socketpair()
    yield WorkerSocket(theirs, congested_bytes=1000), ours
    ours.close()


def delta(number: int) -> Delta:
    return Delta(request_id=str(number), text="x" * 100, token_count=1)


def read_all(sock: socket.socket, count: int) -> list[FromWorker]:
    stream = sock.makefile("rb")
    messages = []
    for _ in range(count):
        length = int.from_bytes(stream.read(4), "little")
        messages.append(msgspec.msgpack.decode(stream.read(length), type=FromWorker))
    return messages


def test_messages_arrive_whole_and_in_order(pair: tuple[WorkerSocket, socket.socket]) -> None:
    worker, server = pair
    sent: list[ToWorker] = [GENERATE, Abort(request_id="a"), Shutdown()]
    threading.Thread(target=server.sendall, args=(b"".join(map(encode, sent)),), daemon=True).start()
    received = worker.receive()
    assert [next(received) for _ in sent] == sent


def test_receiving_ends_when_the_server_is_gone(pair: tuple[WorkerSocket, socket.socket]) -> None:
    worker, server = pair
    server.sendall(encode(Abort(request_id="a")) + encode(GENERATE)[:50])
    server.close()
    assert list(worker.receive()) == [Abort(request_id="a")]
    worker.send([delta(1)])  # nobody hears it; nothing is raised


def test_sending_never_waits_for_a_server_that_does_not_read(pair: tuple[WorkerSocket, socket.socket]) -> None:
    worker, server = pair
    start = time.monotonic()
    for number in range(20_000):
        worker.send([delta(number)])
    assert worker.congested
    assert time.monotonic() - start < 30  # it would be for ever
    received = read_all(server, 20_000)
    assert [message.request_id for message in received if isinstance(message, Delta)] == [*map(str, range(20_000))]
    worker.flush(5)
    assert not worker.congested


def test_a_value_of_a_wrong_type_is_the_fault_of_that_message_alone(pair: tuple[WorkerSocket, socket.socket]) -> None:
    worker, server = pair
    wrong = msgspec.msgpack.encode({"type": "Generate", "request_id": "bad", "prompt": 3.5})
    server.sendall(len(wrong).to_bytes(4, "little") + wrong + encode(Abort(request_id="a")))
    received = worker.receive()
    first = next(received)
    assert isinstance(first, Unreadable)
    assert first.request_id == "bad"
    assert next(received) == Abort(request_id="a")


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\x03\x00\x00\x00\xc1\xc1\xc1"])
def test_what_is_no_frame_is_an_error(pair: tuple[WorkerSocket, socket.socket], data: bytes) -> None:
    worker, server = pair
    server.sendall(data)
    with pytest.raises(ProtocolError):
        next(worker.receive())


def test_half_of_a_surrogate_pair_cannot_be_sent() -> None:
    with pytest.raises(UnicodeEncodeError):
        encode(Abort(request_id="\ud800"))
