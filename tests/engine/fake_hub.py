"""A small hub on 127.0.0.1: what huggingface_hub asks for, and the faults a download meets."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """repos: files of each id. Faults may be changed between requests.

    gated: ids that need a login. break_after: the next download of a weight file stops after so many bytes,
    and if fail_after_break, weight files cannot be had from then on. failing: nothing can.
    requests: "METHOD path [range]" of every request.
    """

    repos: Mapping[str, Mapping[str, bytes]]
    gated: set[str] = field(default_factory=set)
    break_after: int | None = None
    fail_after_break: bool = False
    broken: bool = False
    failing: bool = False
    claimed_size: int | None = None
    requests: list[str] = field(default_factory=list)
    url: str = ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        self.hub.requests.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)", path)
        latest = re.fullmatch(r"/api/models/([^/]+/[^/]+)", path)
        resolve = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = api or latest or resolve
        if self.hub.failing or match is None:
            return self._send(500 if self.hub.failing else 404, b"{}")
        name = match[1]
        if name not in self.hub.repos:
            return self._send(404, b'{"error": "not found"}', {"X-Error-Code": "RepoNotFound"})
        if name in self.hub.gated:
            return self._send(403, b'{"error": "gated"}', {"X-Error-Code": "GatedRepo"})
        files = self.hub.repos[name]
        if resolve:
            return self._send_file(match[3], files[match[3]], body=body)
        if api and api[3] not in ("main", COMMIT):
            return self._send(404, b'{"error": "no revision"}', {"X-Error-Code": "RevisionNotFound"})
        if api and api[2] == "tree":
            return self._send(200, json.dumps([self._entry(*item) for item in files.items()]).encode())
        siblings = [self._entry(*item) | {"rfilename": item[0]} for item in files.items()]
        return self._send(200, json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode())

    def _entry(self, path: str, data: bytes) -> dict[str, object]:
        size = self.hub.claimed_size or len(data)
        entry: dict[str, object] = {"type": "file", "path": path, "size": size, "oid": _etag(path, data)}
        entry["blobId"] = entry["oid"]
        if path.endswith(".safetensors"):
            entry["lfs"] = {"oid": _etag(path, data), "sha256": _etag(path, data), "size": size, "pointerSize": 100}
        return entry

    def _send_file(self, path: str, data: bytes, *, body: bool) -> None:
        headers = {"ETag": f'"{_etag(path, data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        stop = int(wanted[2]) + 1 if wanted and wanted[2] else len(data)
        part = data[start:stop]
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{start + len(part) - 1}/{len(data)}"
        if self.hub.broken and self.command == "GET" and path.endswith(".safetensors"):
            return self._send(500, b"{}")
        limit = self.hub.break_after
        if body and limit is not None and path.endswith(".safetensors"):
            self.hub.break_after = None
            self.hub.broken = self.hub.fail_after_break
            self._send(206 if wanted else 200, part, headers, sent=limit)
            self.close_connection = True
            return None
        return self._send(206 if wanted else 200, part, headers, body=body)

    def _send(
        self,
        status: int,
        data: bytes,
        headers: Mapping[str, str] | None = None,
        *,
        body: bool = True,
        sent: int | None = None,
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(data[:sent])


def _etag(path: str, data: bytes) -> str:
    """LFS files are known by SHA-256, others by SHA-1."""
    return (hashlib.sha256 if path.endswith(".safetensors") else hashlib.sha1)(data).hexdigest()


@contextmanager
def fake_hub(repos: Mapping[str, Mapping[str, bytes]]) -> Iterator[FakeHub]:
    """Serve `repos` until the block ends."""
    hub = FakeHub(repos)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
