"""The worker process: `python -m mixbit.engine.worker FD CONFIG`, started by engine/client.py.

The main thread owns the device and runs the steps. A reader thread takes messages from the socket,
tokenizes and answers Accepted or Refused at once, even while a long step runs. The process ends when
asked to, or when the server has gone.
"""

from __future__ import annotations

import ctypes
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator

import msgspec

from mixbit.engine.admission import Admission, Embedding, Generation, RefusedError, Work
from mixbit.engine.build import LOAD_ERRORS, BuiltEngine, build
from mixbit.engine.config import EngineConfig
from mixbit.engine.core import EngineCore
from mixbit.engine.logs import start_logging
from mixbit.engine.protocol import (
    Abort,
    Accepted,
    Detokenize,
    Detokenized,
    Embed,
    FromWorker,
    Generate,
    LoadFailed,
    Progress,
    Refused,
    Shutdown,
    Stats,
    Tokenize,
    Tokenized,
    ToWorker,
)
from mixbit.engine.transport import ProtocolError, Unreadable, WorkerSocket

Item = Work | Abort | Shutdown  # what the reader thread hands to the main thread

log = logging.getLogger("mixbit.engine")

_FLUSH_SECONDS = 1.0
_CONGESTION_SECONDS = 0.05
_STATS_SECONDS = 0.25


class Inbox:
    """Takes messages from the socket in a thread of its own, from before the model is loaded."""

    def __init__(self, connection: WorkerSocket) -> None:
        self._connection = connection
        self._items: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._admission: Admission | None = None
        self.closing = threading.Event()  # the server asked for the end, or is gone
        threading.Thread(target=self._read, name="reader", daemon=True).start()

    def open(self, admission: Admission) -> None:
        """Take requests from now on."""
        self._admission = admission

    def take(self, timeout: float | None) -> Iterator[Item]:
        """What has arrived; if nothing has, the next item within `timeout` seconds (None: however long)."""
        try:
            yield self._items.get(timeout=timeout) if timeout != 0 else self._items.get_nowait()
            while True:
                yield self._items.get_nowait()
        except queue.Empty:
            return

    def _read(self) -> None:
        try:
            for message in self._connection.receive():
                self._handle(message)
                if isinstance(message, Shutdown):
                    return
        except ProtocolError:
            log.exception("the server sent what cannot be read")
        finally:
            self.closing.set()
            self._items.put(Shutdown())

    def _handle(self, message: ToWorker | Unreadable) -> None:
        match message:
            case Abort():
                if self._admission is not None:
                    self._admission.abort(message.request_id)
                self._items.put(message)
            case Shutdown():
                pass
            case _:
                work, answer = self._answer(message)
                self._connection.send([answer])
                if work is not None:  # after the answer: deltas must not overtake it
                    self._items.put(work)

    def _answer(self, message: Generate | Embed | Tokenize | Detokenize | Unreadable) -> tuple[Work | None, FromWorker]:
        request_id = message.request_id
        try:
            if self._admission is None:
                raise RefusedError("not_ready", "the model is being loaded")
            match message:
                case Generate() | Embed():
                    work = self._admission.admit(message)
                    prompt_tokens = work.request.prompt_tokens
                    return work, Accepted(request_id=request_id, prompt_tokens=prompt_tokens)
                case Tokenize():
                    tokens = self._admission.tokenize(message.text, add_special_tokens=message.add_special_tokens)
                    return None, Tokenized(request_id=request_id, tokens=tokens)
                case Detokenize():
                    text, pieces = self._admission.detokenize(message.tokens)
                    return None, Detokenized(request_id=request_id, text=text, pieces=pieces)
                case Unreadable():
                    raise RefusedError("invalid_value", message.reason)
        except RefusedError as error:
            refused = Refused(request_id=request_id, code=error.code, message=error.message, param=error.param)
        except Exception as error:  # a fault in one message must not end the thread that serves them all
            log.exception("a request could not be prepared")
            reason = f"the request could not be prepared: {type(error).__name__}: {error}"
            refused = Refused(request_id=request_id, code="internal_error", message=reason)
        return None, refused


class Reporter:
    """Says when the server should hear how the engine stands."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._idle = False
        self._next = 0.0

    def due(self) -> list[Stats]:
        """Stats if work has begun or ended since the last time, or has gone on for a while."""
        idle, now = self._core.idle, time.monotonic()
        if idle == self._idle and (idle or now < self._next):
            return []
        self._idle, self._next = idle, now + _STATS_SECONDS
        return [self._core.stats()]


def serve(core: EngineCore, inbox: Inbox, connection: WorkerSocket) -> None:
    """Run steps until asked to stop. Pauses while the server does not read."""
    reporter = Reporter(core)
    connection.send(reporter.due())
    while True:
        congested = connection.congested
        timeout = core.tidy() if core.idle else _CONGESTION_SECONDS if congested else 0.0
        for item in inbox.take(timeout):
            match item:
                case Generation() | Embedding():
                    core.add(item)
                case Abort():
                    core.abort(item.request_id)
                case Shutdown():
                    return
        messages = [] if core.idle or congested else core.step()
        connection.send([*messages, *reporter.due()])


def _load(config: EngineConfig, inbox: Inbox, connection: WorkerSocket) -> BuiltEngine:
    """Build the engine, reporting progress. Exits if the server goes away meanwhile, or if it fails."""

    def progress(stage: str, done: int, total: int) -> None:
        if inbox.closing.is_set():
            raise SystemExit(0)
        connection.send([Progress(stage=stage, done=done, total=total)])

    try:
        return build(config, progress)
    except LOAD_ERRORS as error:
        message = str(error) or "not enough memory to load the model"
    except Exception as error:
        log.exception("the model could not be loaded")
        message = f"the model could not be loaded: {type(error).__name__}: {error}"
    connection.send([LoadFailed(message=message)])
    connection.flush(_FLUSH_SECONDS)
    raise SystemExit(1)


def _follow_parent() -> None:
    """Leave signals to the server, and die with it, even if it is killed."""
    # Ctrl-C and a service manager signal the whole group; the server tells when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL, 0, 0, 0)


def main(arguments: list[str]) -> int:
    """Serve the socket at file descriptor arguments[0] with the configuration arguments[1], in JSON."""
    _follow_parent()
    config = msgspec.json.decode(arguments[1], type=EngineConfig)
    start_logging("info", config.log_format, "%(message)s")
    connection = WorkerSocket(socket.socket(fileno=int(arguments[0])))
    inbox = Inbox(connection)
    built = _load(config, inbox, connection)
    inbox.open(built.core.admission)
    connection.send([built.ready])
    built.core.admission.prepare()
    serve(built.core, inbox, connection)
    connection.flush(_FLUSH_SECONDS)
    built.core.close(_FLUSH_SECONDS)
    return 0


if __name__ == "__main__":
    try:
        status = main(sys.argv[1:])
    except SystemExit as ending:
        status = int(ending.code or 0)
    sys.stderr.flush()
    os._exit(status)  # not the usual way out: threads may be inside native code
