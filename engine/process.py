"""The worker as the server holds it: a process and the socket to it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from dataclasses import dataclass

import msgspec

from mixbit.engine.config import EngineConfig
from mixbit.engine.protocol import FromWorker, Shutdown, ToWorker
from mixbit.engine.transport import encode, read_from_worker

_STDERR = 2

# What Python runs as the worker. -P: the working directory may hold a folder named like one of ours.
PROGRAM = ("-P", "-m", "mixbit.engine.worker")


@dataclass(frozen=True, eq=False)
class WorkerProcess:
    """A running worker."""

    process: asyncio.subprocess.Process
    _reader: asyncio.StreamReader
    _writer: asyncio.StreamWriter

    @classmethod
    async def start(cls, config: EngineConfig) -> WorkerProcess:
        """Start `python -m mixbit.engine.worker`. What it prints goes to our stderr."""
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=ours)
        try:
            # Last, so that nothing can be cancelled between the start of the process and its keeper.
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *PROGRAM,
                str(theirs.fileno()),
                msgspec.json.encode(config).decode(),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=_STDERR,
                start_new_session=True,  # Ctrl-C is for the server, which tells the worker when to end
            )
        except BaseException:
            writer.close()
            raise
        finally:
            theirs.close()
        return cls(process, reader, writer)

    async def read(self) -> FromWorker | None:
        """The next message, or None when the worker has ended. Raises ProtocolError."""
        return await read_from_worker(self._reader)

    def send(self, message: ToWorker) -> None:
        """Send a message; nothing happens if the worker has ended. Raises as `encode` does."""
        frame = encode(message)
        if not self._writer.is_closing():
            self._writer.write(frame)

    async def drain(self) -> None:
        """Wait until the worker has taken most of what was sent."""
        with contextlib.suppress(ConnectionError):
            await self._writer.drain()

    async def end(self, grace: float) -> str:
        """Ask the worker to end, kill it after `grace` seconds, and say how it ended."""
        if self.process.returncode is None:
            self.send(Shutdown())
        try:
            await asyncio.wait_for(self.process.wait(), grace)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
        finally:
            self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()
        return describe_exit(await self.process.wait())


def describe_exit(status: int) -> str:
    """How a process ended, in words. Negative numbers are signals, as in subprocess."""
    if status >= 0:
        return f"exited with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"was killed by {name}" + (" (out of memory?)" if -status == signal.SIGKILL else "")
