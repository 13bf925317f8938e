"""The life of a server process: port, models, workers, HTTP, and a good end.

The workers, one for each model, are started before the web stack is imported: they load meanwhile.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mixbit.engine.client import EngineClient, EngineFailed, EngineState
from mixbit.engine.config import EngineConfig
from mixbit.engine.errors import UserError
from mixbit.server.console import Steps, show_panel
from mixbit.server.settings import Access

if TYPE_CHECKING:
    from mixbit.engine.protocol import Ready
    from mixbit.server.model import ServedModel
    from mixbit.server.web import Server


class PortError(UserError):
    """The address cannot be listened on."""


@dataclass(frozen=True)
class ModelPlan:
    """One model to serve. names: the served name and its aliases."""

    engine: EngineConfig
    names: tuple[str, ...]
    chat_template: Path | None = None


@dataclass(frozen=True)
class Serving:
    """What to serve, where, and to whom.

    request_timeout: seconds, None for no limit. unload_after: seconds without a request after which a model is
    unloaded until the next, None: never. shutdown_seconds: what running requests get to finish. local: a loopback
    address.
    """

    models: tuple[ModelPlan, ...]
    request_timeout: float | None
    unload_after: float | None
    shutdown_seconds: float
    host: str
    port: int
    local: bool
    access: Access


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 takes any. Raises PortError saying what to do."""
    bare = host.strip("[]")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(bare, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise PortError(f"--host {host} is not an address of this machine: {error.strerror}") from None
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
        sock.listen(1024)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            free = port + 1 if port < 65535 else 8080
            text = f"port {port} on {host} is in use, perhaps by another server; stop that, or choose --port {free}"
        elif error.errno == errno.EACCES:
            text = f"port {port} may not be used without privileges; choose one above 1023"
        else:
            text = f"cannot listen on {host} port {port}: {error.strerror}"
        raise PortError(text) from None
    sock.setblocking(False)
    return sock


def run(serving: Serving, steps: Steps) -> int:
    """Serve until Ctrl-C or SIGTERM; the exit status. Raises UserError if the model cannot be loaded."""
    with listen(serving.host, serving.port) as sock:
        try:
            return asyncio.run(_Process(serving, sock, steps).main())
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done: a late Ctrl-C has nothing to break off


class _Process:
    """One run of the server."""

    def __init__(self, serving: Serving, sock: socket.socket, steps: Steps) -> None:
        self._serving, self._sock, self._steps = serving, sock, steps
        self._engines = [
            EngineClient(plan.engine, request_timeout=serving.request_timeout, idle_timeout=serving.unload_after)
            for plan in serving.models
        ]
        self._stop = asyncio.Event()

    async def main(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        try:
            for engine in self._engines:
                await engine.start()
            await self._serve()
        finally:
            self._steps.close()
            await self._close()
        return 0

    async def _close(self) -> None:
        await asyncio.gather(*(engine.close() for engine in self._engines))

    def _on_signal(self) -> None:
        if self._stop.is_set():
            os._exit(130)  # asked twice; workers end when their sockets close
        self._stop.set()

    def _build(self) -> tuple[Server, list[ServedModel]]:
        from mixbit.server.app import create_app
        from mixbit.server.model import describe_model
        from mixbit.server.service import Service, Services
        from mixbit.server.web import make_server

        serving = self._serving
        models = [describe_model(Path(plan.engine.model), plan.names, plan.chat_template) for plan in serving.models]
        services = Services(tuple(map(Service, self._engines, models)))
        return make_server(create_app(services, serving.access), serving.shutdown_seconds), models

    async def _serve(self) -> None:
        server, models = await asyncio.to_thread(self._build)  # the loop starts the workers meanwhile
        serving = self._serving
        http = asyncio.create_task(server.serve(sockets=[self._sock]))
        stop = asyncio.create_task(self._stop.wait())
        try:
            if ready := await self._until_ready(stop):
                self._steps.close()
                served = list(zip(models, ready, strict=True))
                show_panel(self._url(), served, with_key=bool(serving.access.keys), local=serving.local)
                await self._until_over(stop, http)
        finally:
            # Running requests get some time; closing the engine then ends their streams with an error event.
            server.should_exit = True
            await asyncio.wait({http}, timeout=serving.shutdown_seconds)
            await self._close()
            await http
            stop.cancel()

    async def _until_ready(self, stop: asyncio.Task[bool]) -> list[Ready] | None:
        """Show progress until all models are loaded; None if told to stop. Raises EngineFailed."""
        ready = asyncio.create_task(self._all_ready())
        try:
            while not (ready.done() or stop.done()):
                self._show_progress()
                await asyncio.wait({ready, stop}, timeout=0.1, return_when=asyncio.FIRST_COMPLETED)
            return None if stop.done() else ready.result()
        finally:
            ready.cancel()

    async def _all_ready(self) -> list[Ready]:
        return await asyncio.gather(*(engine.wait_ready() for engine in self._engines))

    def _show_progress(self) -> None:
        for plan, engine in zip(self._serving.models, self._engines, strict=True):
            if step := engine.progress:
                several = f"{plan.names[0]}: " if len(self._engines) > 1 else ""
                self._steps.update(several + step.stage, step.done, step.total)
                return

    async def _until_over(self, stop: asyncio.Task[bool], http: asyncio.Task[None]) -> None:
        """Wait for the end. Raises EngineFailed if every engine has given up."""
        while not (stop.done() or http.done()):
            if all(engine.state is EngineState.FAILED for engine in self._engines):
                raise EngineFailed(self._engines[0].message or "the engine has failed")
            await asyncio.wait({stop, http}, timeout=0.5, return_when=asyncio.FIRST_COMPLETED)

    def _url(self) -> str:
        host, port = self._sock.getsockname()[:2]
        return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"
