"""Faults against the real server process: each harms nobody but the request it happens to."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import httpx
import pytest

from mixbit.engine.disk_store import entries
from tests.server import faulty
from tests.server.conftest import CONTEXT
from tests.server.running import RunningServer, start, until
from tests.server.support import error_of

TEXT = "/v1/completions"
STEP = 0.05  # seconds
LONG: dict[str, Any] = {"prompt": [5, 6], "max_tokens": 3000, "ignore_eos": True, "stream": True}
SHORT: dict[str, Any] = {"prompt": [5, 6], "max_tokens": 4, "ignore_eos": True, "temperature": 0}
Start = Callable[..., Any]
UNSHARE = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")
MOUNT = 'mount -t tmpfs -o size=1m tmpfs "$0" && exec "$@"'  # seen by this process and its children alone


def _may_mount() -> bool:
    with tempfile.TemporaryDirectory() as directory, contextlib.suppress(OSError):
        return subprocess.run([*UNSHARE, MOUNT, directory, "true"], capture_output=True, check=False).returncode == 0
    return False


@pytest.fixture(scope="module")
def servers() -> Iterator[ExitStack]:
    """Ends at the end what tests have shared."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def serve(tiny_checkpoint: Path, servers: ExitStack, shared: dict[str, RunningServer]) -> Start:
    """Starts servers of which, after the test, nothing may be left over."""

    @contextmanager
    def serve(*arguments: str, step: float = 0.0, share: bool = False, **options: Any) -> Iterator[RunningServer]:
        if step:
            options |= {"program": ("-P", faulty.__file__), "STEP_SECONDS": str(step)}
        made = start("--model", str(tiny_checkpoint), "--threads", "1", *arguments, **options)
        key = str((arguments, options))
        if share and key not in shared:
            shared[key] = servers.enter_context(made)
        with nullcontext(shared[key]) if share else made as server:
            yield server
            if server.process.poll() is None:
                server.settled()

    return serve


@pytest.fixture(scope="module")
def shared() -> dict[str, RunningServer]:
    """Running servers by their options, for tests that leave them as they were."""
    return {}


def ask(server: RunningServer, **body: Any) -> httpx.Response:
    with server.client() as client:
        return client.post(TEXT, json={**SHORT, **body})


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def request_bytes(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    return head.encode() + b"\r\n\r\n" + data


def connection(server: RunningServer, body: dict[str, Any], receive_buffer: int | None = None) -> socket.socket:
    """A client that sends a request and does with the answer what it wants."""
    url = httpx.URL(server.url)
    sock = socket.socket()
    if receive_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.settimeout(30)
    sock.connect((url.host, url.port or 80))
    sock.sendall(request_bytes(body))
    return sock


def test_a_worker_killed_in_the_middle_of_streams(serve: Start) -> None:
    with serve(step=STEP, share=True) as server, server.client() as client, ThreadPoolExecutor(4) as pool:
        before = server.numbers()
        expected = text_of(ask(server))
        conversation = ask(server, prompt=[5, 9] * 80).json()
        until(lambda: len(list(entries(server.disk))) >= 5)  # nothing else has been asked that fills a block
        begun, ends = threading.Barrier(5), []

        def stream() -> list[str]:
            with server.client() as own, own.stream("POST", TEXT, json=LONG) as response:
                lines = response.iter_lines()
                data = [next(line for line in lines if line.startswith("data: {"))]
                begun.wait()
                data += [line for line in lines if line.startswith("data: ")]
                ends.append(time.monotonic())
            return [line[6:] for line in data]

        streams = [pool.submit(stream) for _ in range(4)]
        begun.wait()
        killed = time.monotonic()
        server.worker().kill()
        until(lambda: client.get("/health").status_code == 503, 2)
        assert client.get("/health").json()["status"] in {"restarting", "loading"}
        for each in streams:
            *_, error, done = each.result()
            assert done == "[DONE]"
            assert json.loads(error)["error"]["code"] == "worker_died"
        assert max(ends) - killed < 2
        until(lambda: client.get("/health").status_code == 200)
        assert text_of(ask(server)) == expected
        again = ask(server, prompt=[5, 9] * 80).json()
        assert again["choices"] == conversation["choices"]
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= 128  # from the disk
        found = server.settled()
        for name, count in (
            ("mixbit_worker_restarts_total", 1),
            ('mixbit_requests_total{outcome="failed"}', 4),
            ('mixbit_requests_total{outcome="completed"}', 4),
        ):
            assert found[name] - before[name] == count


@pytest.mark.parametrize("streamed", [False, True])
def test_a_request_that_makes_the_step_raise_fails_alone(serve: Start, streamed: bool) -> None:
    with serve(step=STEP, share=True) as server, ThreadPoolExecutor(4) as pool:
        pid = server.worker().pid
        alone = [text_of(ask(server, prompt=[9, number], max_tokens=12)) for number in range(3)]
        others = [pool.submit(ask, server, prompt=[9, number], max_tokens=12) for number in range(3)]
        until(lambda: server.numbers()["mixbit_requests_running"] > 0)
        response = ask(server, prompt=[5, faulty.FAULT, 6], stream=streamed)
        if streamed:
            error, done = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")][-2:]
            assert done == "[DONE]"
            code, message = (json.loads(error)["error"][key] for key in ("code", "message"))
        else:
            assert response.status_code == 500
            code, message = (error_of(response)[key] for key in ("code", "message"))
        assert code == "internal_error"
        assert "ArithmeticError" in message
        assert [text_of(each.result()) for each in others] == alone
        assert server.worker().pid == pid


def test_a_device_that_always_fails_is_replaced(serve: Start) -> None:
    with serve(step=STEP, share=True) as server, server.client() as client:
        before = server.numbers()["mixbit_worker_restarts_total"]
        statuses = {ask(server, prompt=[faulty.FAULT]).status_code for _ in range(3)}
        assert statuses <= {500, 503}
        until(lambda: server.numbers()["mixbit_worker_restarts_total"] == before + 1)
        until(lambda: client.get("/health").status_code == 200)
        text_of(ask(server))


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("prompt", [[5, 6], [5, 6] * 1000])
def test_a_client_that_vanishes_frees_its_slot_at_once(serve: Start, prompt: list[int], streamed: bool) -> None:
    """While it decodes, and while its long prompt is computed: 2,000 tokens are four steps."""
    with serve("--max-running", "1", step=0.2, share=True) as server:
        cancelled = server.numbers()['mixbit_requests_total{outcome="cancelled"}']
        gone = connection(server, {**LONG, "prompt": prompt, "stream": streamed})
        until(lambda: server.numbers()["mixbit_requests_running"] == 1)
        before = server.numbers()["mixbit_steps_total"]
        gone.close()
        until(lambda: server.numbers()["mixbit_requests_running"] == 0, 3)
        # The step that ran, and at most one that began before the news came.
        assert server.numbers()["mixbit_steps_total"] - before <= 2
        text_of(ask(server))
        assert server.settled()['mixbit_requests_total{outcome="cancelled"}'] == cancelled + 1


def test_a_client_that_vanishes_from_the_queue(serve: Start) -> None:
    with serve("--max-running", "1", step=0.2, share=True) as server:
        running, waiting = connection(server, LONG), connection(server, LONG)
        until(lambda: server.numbers()["mixbit_requests_waiting"] == 1)
        waiting.close()
        until(lambda: server.numbers()["mixbit_requests_waiting"] == 0, 2)
        assert server.numbers()["mixbit_requests_running"] == 1
        running.close()


def test_a_client_that_reads_a_byte_a_second_holds_up_nobody(serve: Start) -> None:
    with serve(share=True) as server:
        expected = text_of(ask(server, max_tokens=2000))
        memory = server.numbers()["process_resident_memory_bytes"]
        slow = connection(server, {**SHORT, "max_tokens": 2000, "stream": True}, receive_buffer=4096)
        received = bytearray()
        for _ in range(3):
            received += slow.recv(1)
            time.sleep(1)
            assert text_of(ask(server, max_tokens=2000)) == expected
        # Its text waits in the server; its slot does not wait for it.
        until(lambda: server.numbers()["mixbit_requests_running"] == 0)
        assert server.numbers()["process_resident_memory_bytes"] < memory + 32e6
        while not received.endswith(b"0\r\n\r\n"):
            more = slow.recv(1 << 16)
            assert more
            received += more
        slow.close()
        data = [line[6:] for line in received.decode().splitlines() if line.startswith("data: {")]
        assert "".join(json.loads(each)["choices"][0]["text"] for each in data) == expected


def test_a_storm_of_requests_opened_and_dropped(serve: Start) -> None:
    with serve(share=True) as server:
        before = server.numbers()
        expected = text_of(ask(server))

        def drop(number: int) -> None:
            streamed = number % 3 > 0
            body = {**LONG, "prompt": [number % 250 + 1] * (number % 600 + 1), "stream": streamed}
            with connection(server, body) as sock:
                if streamed and number % 5 == 0:
                    sock.recv(1)
                if number % 2:  # a reset, not a farewell
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

        with ThreadPoolExecutor(32) as pool:
            list(pool.map(drop, range(500)))
        until(lambda: ask(server).status_code != 429)
        assert text_of(ask(server)) == expected
        found = server.settled()
        for name in ("mixbit_worker_restarts_total", 'mixbit_requests_total{outcome="failed"}'):
            assert found[name] == before[name]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_lets_streams_end_that_can_end_soon(serve: Start, number: signal.Signals) -> None:
    with serve(step=STEP) as server, server.client() as client:
        with client.stream("POST", TEXT, json={**SHORT, "max_tokens": 15, "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            os.kill(server.process.pid, number)
            with pytest.raises(httpx.TransportError):
                until(lambda: ask(server) is None)  # no new ones
            data = [line[6:] for line in lines if line.startswith("data: ")]
        assert data[-1] == "[DONE]"
        assert json.loads(data[-2])["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(5) == 0


def test_sigterm_ends_streams_that_do_not_end_soon(serve: Start) -> None:
    with serve("--shutdown-timeout", "1", step=STEP) as server, server.client() as client:
        worker = server.worker()
        with client.stream("POST", TEXT, json=LONG) as response:
            lines = response.iter_lines()
            next(lines)
            told = time.monotonic()
            server.process.terminate()
            data = [line[6:] for line in lines if line.startswith("data: ")]
        assert 0.8 < time.monotonic() - told < 4
        assert data[-1] == "[DONE]"
        assert "error" in json.loads(data[-2])
        assert server.process.wait(5) == 0
        assert not worker.is_running()


def test_a_second_sigterm_ends_at_once(serve: Start) -> None:
    with serve("--shutdown-timeout", "60", step=STEP) as server, server.client() as client:
        worker = server.worker()
        with client.stream("POST", TEXT, json=LONG) as response:
            lines = response.iter_lines()  # kept, since the connection is closed with it
            next(lines)
            server.process.terminate()
            time.sleep(0.3)
            assert server.process.poll() is None
            server.process.terminate()
            assert server.process.wait(2) in {143, 130, -signal.SIGTERM}
        until(lambda: not worker.is_running(), 5)


def test_memory_too_small_for_a_request(serve: Start) -> None:
    """40 KB hold 512 tokens here at most. Where a context was asked for, a longer prompt is not the client's fault."""
    with serve(share=True) as server:
        whole = server.numbers()["mixbit_cache_bytes"]
    memory = str(int(whole / 16 * 0.4))
    long = [5] * (CONTEXT - 200)
    for arguments, status, code in (
        (["--context-length", str(CONTEXT)], 503, "insufficient_memory"),
        ([], 400, "context_length_exceeded"),
    ):
        with serve("--cache-memory", memory, *arguments) as server:
            expected = text_of(ask(server, max_tokens=300))
            with ThreadPoolExecutor(2) as pool:
                other = pool.submit(ask, server, max_tokens=300)
                for streamed in (False, True):
                    refused = ask(server, prompt=long, stream=streamed)
                    assert (refused.status_code, error_of(refused)["code"]) == (status, code)
                assert text_of(other.result()) == expected


@pytest.mark.skipif(not _may_mount(), reason="no file system may be mounted here")
def test_a_full_disk_under_the_cache(serve: Start, tmp_path: Path) -> None:
    disk = tmp_path / "small"
    disk.mkdir()
    prompts = [[5 + number] * 1000 for number in range(4)]
    with serve("--disk-cache", str(disk), within=(*UNSHARE, MOUNT, str(disk))) as server:
        answers = [ask(server, prompt=prompt).json() for prompt in prompts]
        until(lambda: "takes no more entries" in server.text())
        for prompt, answer in zip(prompts, answers, strict=True):
            again = ask(server, prompt=prompt).json()
            assert again["choices"] == answer["choices"]
            assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 999
        server.worker().kill()
        with server.client() as client:
            until(lambda: server.numbers()["mixbit_worker_restarts_total"] == 1)
            until(lambda: client.get("/health").status_code == 200)
        again = ask(server, prompt=prompts[0]).json()  # what had its place is there
        assert again["choices"] == answers[0]["choices"]
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_a_request_that_takes_too_long(serve: Start) -> None:
    with serve("--request-timeout", "0.5", step=STEP) as server:
        started = time.monotonic()
        whole = ask(server, max_tokens=1000)
        assert (whole.status_code, error_of(whole)["code"]) == (504, "timeout")
        streamed = ask(server, max_tokens=1000, stream=True)
        error, done = [line[6:] for line in streamed.text.splitlines() if line.startswith("data: ")][-2:]
        assert (json.loads(error)["error"]["code"], done) == ("timeout", "[DONE]")
        assert time.monotonic() - started < 4
        text_of(ask(server, max_tokens=1))
        assert server.settled()['mixbit_requests_total{outcome="timeout"}'] == 2


def test_a_full_queue_says_when_to_come_back(serve: Start) -> None:
    with serve("--max-running", "1", "--max-queue", "1", step=STEP) as server:
        first, second = connection(server, LONG), connection(server, LONG)
        until(lambda: server.numbers()["mixbit_requests_waiting"] == 1)
        refused = ask(server)
        assert (refused.status_code, error_of(refused)["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) > 0
        first.close()
        second.close()
        until(lambda: ask(server).status_code == 200)
