"""The server's side of the engine: starts the worker, speaks to it, restarts it when it dies.

    async with EngineClient(config) as engine:  # or: await engine.start(); ...; await engine.close()
        await engine.wait_ready()
        async with await engine.generate(Generate(...)) as completion:
            async for event in completion:  # Delta, Delta, ..., Finished
                ...

Everything here runs on one event loop. Nothing here imports the model code: the worker is a program.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from dataclasses import dataclass

import msgspec

from mixbit.engine.config import EngineConfig
from mixbit.engine.interface import (
    Completion,
    Engine,
    EngineFailed,
    EngineState,
    RequestError,
    RequestFailed,
    RequestRefused,
)
from mixbit.engine.process import WorkerProcess
from mixbit.engine.protocol import (
    Abort,
    Accepted,
    Delta,
    Detokenize,
    Detokenized,
    Embed,
    Failed,
    Finished,
    FromWorker,
    Generate,
    LoadFailed,
    Progress,
    Ready,
    Refused,
    Stats,
    Tokenize,
    Tokenized,
)
from mixbit.engine.stream import Stream
from mixbit.engine.transport import ProtocolError

__all__ = [
    "Completion",
    "Engine",
    "EngineClient",
    "EngineFailed",
    "EngineState",
    "RequestError",
    "RequestFailed",
    "RequestRefused",
    "RestartPolicy",
]

log = logging.getLogger("mixbit.engine")

Answer = Accepted | Refused | Tokenized | Detokenized


@dataclass(frozen=True)
class RestartPolicy:
    """When a dead worker is started again. Seconds.

    The wait doubles from `first` to `longest`. After `attempts` deaths in a row, each before the worker was
    ready for `stable`, the engine gives up.
    """

    first: float = 0.1
    longest: float = 30.0
    stable: float = 10.0
    attempts: int = 5

    def delay(self, deaths: int) -> float:
        """Seconds to wait after that many deaths in a row."""
        return min(self.longest, self.first * 2.0 ** (deaths - 1))


class EngineClient:
    """The `Engine` that runs in a worker process."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        restart: RestartPolicy | None = None,
        grace: float = 5.0,
        request_timeout: float | None = None,
        idle_timeout: float | None = None,
    ) -> None:
        self._config = config
        self._restart = restart or RestartPolicy()
        self._grace = grace  # seconds for the worker to end by itself
        self._timeout = request_timeout  # seconds for one request, waiting included
        self._idle = idle_timeout  # seconds without a request after which the worker is ended; None: never
        self._idle_timer: asyncio.TimerHandle | None = None
        self._unloading: asyncio.Task[None] | None = None
        self._worker: WorkerProcess | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[str] | None = None
        self._settled = asyncio.Event()  # READY, UNLOADED, FAILED or CLOSED
        self._answers: dict[str, asyncio.Future[Answer]] = {}
        self._streams: dict[str, Stream] = {}
        self._numbers = itertools.count()
        self._ready_at: float | None = None
        self.state = EngineState.STARTING
        self.progress: Progress | None = None
        self.ready: Ready | None = None
        self.stats: Stats | None = None
        self.restarts = 0
        self.message: str | None = None

    @property
    def pid(self) -> int | None:
        """The worker's process id, while there is one."""
        return None if self._worker is None else self._worker.process.pid

    @property
    def on_demand(self) -> bool:
        """See Engine."""
        return self._idle is not None

    async def __aenter__(self) -> EngineClient:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Start the worker and return at once; the state tells the rest."""
        if self._supervisor is None:
            self._supervisor = asyncio.create_task(self._supervise(), name="engine supervisor")

    async def wait_ready(self) -> Ready:
        """See Engine."""
        await self._settled.wait()
        if self.ready is None:
            raise EngineFailed(self.message or f"the engine is {self.state}")
        return self.ready

    async def generate(self, request: Generate | Embed) -> Completion:
        """See Engine. Raises ValueError if the id is that of a running request."""
        if request.request_id in self._streams:
            raise ValueError(f"request id {request.request_id!r} is in use")
        await self._wake()
        stream = Stream(request.request_id, self.abort)
        self._streams[request.request_id] = stream
        stream.on_end(self._rest)
        if self._timeout is not None:
            timer = asyncio.get_running_loop().call_later(self._timeout, self._expire, stream)
            stream.on_end(timer.cancel)
        try:
            answer = await self._ask(request, param="prompt")
        except RequestRefused:
            self._streams.pop(request.request_id, None)
            stream.end(None)
            raise
        except BaseException:
            await stream.aclose()
            raise
        assert isinstance(answer, Accepted)
        stream.prompt_tokens = answer.prompt_tokens
        return stream

    async def tokenize(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """See Engine."""
        request_id = f"client:{next(self._numbers)}"
        message = Tokenize(request_id=request_id, text=text, add_special_tokens=add_special_tokens)
        answer = await self._ask(message, param="text")
        assert isinstance(answer, Tokenized)
        return answer.tokens

    async def detokenize(self, tokens: list[int]) -> str:
        """See Engine."""
        return (await self._detokenized(tokens)).text

    async def pieces(self, tokens: list[int]) -> list[bytes]:
        """See Engine."""
        return (await self._detokenized(tokens)).pieces

    async def _detokenized(self, tokens: list[int]) -> Detokenized:
        message = Detokenize(request_id=f"client:{next(self._numbers)}", tokens=tokens)
        answer = await self._ask(message, param="tokens")
        assert isinstance(answer, Detokenized)
        return answer

    async def close(self) -> None:
        """See Engine."""
        self._enter(EngineState.CLOSED, "the engine has been closed")
        if self._unloading is not None:
            await asyncio.wait([self._unloading])
        await self._end_worker()

    async def _end_worker(self) -> None:
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait([self._supervisor])
            self._supervisor = None
        if self._ending is not None:
            await self._ending

    def abort(self, request_id: str) -> None:
        """Forget a request and tell the worker to drop it. Unknown ids are ignored."""
        if self._streams.pop(request_id, None) is not None and self._worker is not None:
            self._worker.send(Abort(request_id=request_id))
            self._rest()

    def _expire(self, stream: Stream) -> None:
        """A request has taken too long."""
        if self._streams.get(stream.request_id) is not stream:
            return
        self.abort(stream.request_id)
        text = f"the request did not end within {self._timeout:g} s, which is what this server allows"
        stream.end(RequestFailed("timeout", text))
        future = self._answers.get(stream.request_id)
        if future is not None and not future.done():
            future.set_exception(RequestRefused("timeout", text))

    async def _ask(self, message: Generate | Embed | Tokenize | Detokenize, param: str) -> Answer:
        """Send a message and wait for its answer. Raises RequestRefused."""
        await self._wake()
        worker = self._worker
        if self.state is not EngineState.READY or worker is None:
            raise RequestRefused("not_ready", self.message or f"the engine is {self.state}")
        future = asyncio.get_running_loop().create_future()
        self._answers[message.request_id] = future
        try:
            worker.send(message)
            await worker.drain()
            answer: Answer = await future
        except UnicodeEncodeError:
            raise RequestRefused("invalid_value", "the text holds half of a surrogate pair", param) from None
        except (OverflowError, msgspec.MsgspecError) as error:
            raise RequestRefused("invalid_value", f"a value cannot be sent to the engine: {error}", param) from None
        finally:
            del self._answers[message.request_id]
            self._rest()
        if isinstance(answer, Refused):
            raise RequestRefused(answer.code, answer.message, answer.param)
        return answer

    # --- unloading an idle model ---

    async def _wake(self) -> None:
        """Bring an unloaded model back, or wait while it comes. Raises RequestRefused."""
        if not self.on_demand:
            return
        if self._unloading is not None:
            await asyncio.wait([self._unloading])
        if self.state is EngineState.UNLOADED:
            self._enter(EngineState.STARTING)
            await self.start()
        if self.state in {EngineState.STARTING, EngineState.LOADING}:
            try:
                await self.wait_ready()
            except EngineFailed as error:
                raise RequestRefused("not_ready", str(error)) from None
        if self._idle_timer is not None:
            self._idle_timer.cancel()

    def _rest(self) -> None:
        """Something has ended: count the idle time from now, if nothing else is going on."""
        if self._idle is None or self._streams or self._answers:
            return
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        self._idle_timer = asyncio.get_running_loop().call_later(self._idle, self._unload)

    def _unload(self) -> None:
        if self.state is EngineState.READY and not self._streams and not self._answers:
            log.info("idle for %g s: the model is unloaded until the next request", self._idle)
            self._enter(EngineState.UNLOADED, "the model is unloaded; the next request loads it")
            self._unloading = asyncio.create_task(self._finish_unloading(), name="engine unloading")

    async def _finish_unloading(self) -> None:
        await self._end_worker()
        self._unloading = None

    # --- the life of the worker ---

    def _enter(self, state: EngineState, message: str | None = None) -> None:
        self.state, self.message = state, message
        if state is not EngineState.READY:
            self.stats = None
        if state not in {EngineState.READY, EngineState.UNLOADED}:
            self.ready = None
        if state in {EngineState.READY, EngineState.UNLOADED, EngineState.FAILED, EngineState.CLOSED}:
            self.progress = None
            self._settled.set()
        else:
            self._settled.clear()

    async def _supervise(self) -> None:
        """Run workers, one after another, until one says that the model cannot be loaded, or too many die."""
        deaths = 0
        clock = asyncio.get_running_loop().time
        while True:
            self._ready_at = None
            ending = await self._run_worker()
            if self.state in {EngineState.UNLOADED, EngineState.FAILED, EngineState.CLOSED}:
                return
            lasted = 0.0 if self._ready_at is None else clock() - self._ready_at
            deaths = 1 if lasted >= self._restart.stable else deaths + 1
            message = f"the engine worker {ending}"
            if deaths > self._restart.attempts:
                self._enter(EngineState.FAILED, f"{message}; it died {deaths} times in a row and is not started again")
                log.error("%s", self.message)
                return
            self._enter(EngineState.RESTARTING, f"{message}; it is being started again")
            log.error("%s", self.message)
            self.restarts += 1
            await asyncio.sleep(self._restart.delay(deaths))

    async def _run_worker(self) -> str:
        """Start a worker and receive until it ends; returns how it ended. All its requests fail then."""
        try:
            worker = await WorkerProcess.start(self._config)
        except OSError as error:
            return f"could not be started: {error}"
        self._worker = worker
        grace = self._grace
        try:
            while (message := await worker.read()) is not None:
                self._receive(message)
            self._fail_requests()  # at once: how the worker ended may take a moment to learn
        except ProtocolError as error:
            log.error("%s", error)
            grace = 0.0
        finally:
            self._worker = None
            if self.state is EngineState.READY:
                self._enter(EngineState.RESTARTING, "the engine worker ended")
            self._fail_requests()
            # Not to be cancelled: a process must be waited for.
            self._ending = asyncio.create_task(worker.end(grace), name="engine worker's end")
            ending = await asyncio.shield(self._ending)
        return ending

    def _fail_requests(self) -> None:
        text = self.message if self.state is EngineState.CLOSED else None
        text = text or "the engine worker died while it worked on this request"
        for future in self._answers.values():
            if not future.done():
                future.set_exception(RequestRefused("worker_died", text))
        for stream in self._streams.values():
            stream.end(RequestFailed("worker_died", text))
        self._streams.clear()

    def _receive(self, message: FromWorker) -> None:
        match message:
            case Delta():
                if (stream := self._streams.get(message.request_id)) is not None:
                    stream.push(message)
            case Finished():
                if (stream := self._streams.pop(message.request_id, None)) is not None:
                    stream.end(message)
            case Failed():
                if (stream := self._streams.pop(message.request_id, None)) is not None:
                    stream.end(RequestFailed(message.code, message.message))
            case Accepted() | Refused() | Tokenized() | Detokenized():
                future = self._answers.get(message.request_id)
                if future is not None and not future.done():
                    future.set_result(message)
            case Progress():
                self.progress = message
                if self.state is EngineState.STARTING:
                    self._enter(EngineState.LOADING)
            case Stats():
                self.stats = message
            case Ready():
                self._ready_at = asyncio.get_running_loop().time()
                self.ready = message
                self._enter(EngineState.READY)
                self._rest()
            case LoadFailed():
                self._enter(EngineState.FAILED, message.message)
