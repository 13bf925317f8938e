"""The application over a fake engine, on a real port, for a browser that runs beside it."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mixbit.server.app import create_app
from mixbit.server.model import ServedModel
from mixbit.server.service import Service, Services
from mixbit.server.settings import Access
from mixbit.server.web import make_server
from tests.fakes import FakeEngine
from tests.server.support import LOCAL, served_model


@dataclass
class Site:
    """A server in a thread. engine: its script, which a test may change at any time."""

    url: str
    engine: FakeEngine

    def last_request(self) -> Any:
        """What reached the engine last."""
        return self.engine.requests[-1]


@contextmanager
def serve(engine: FakeEngine, model: ServedModel | None = None, access: Access = LOCAL) -> Iterator[Site]:
    """Serve until the context ends."""
    server = make_server(create_app(Services((Service(engine, model or served_model()),)), access), shutdown_seconds=1)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])), daemon=True)
        thread.start()
        try:
            yield Site(f"http://127.0.0.1:{sock.getsockname()[1]}", engine)
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive(), "the server does not end"
