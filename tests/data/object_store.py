"""An object store on this machine that fails as it is told, and fsspec's way to it: objstore://HOST:PORT/PATH.

Real sockets: fsspec's own HTTP file system needs a package that is not among ours.
"""

from __future__ import annotations

import http.client
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import fsspec
from fsspec.spec import AbstractFileSystem


class ObjectStore(ThreadingHTTPServer):
    """Objects in memory. `faults` maps a piece of a path to what its next reads get: a status, "cut" (half of
    the bytes), "drop" (no answer) or "flip" (a bit is wrong); one that ends in "!" is for all reads."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"objstore://127.0.0.1:{self.server_port}/bucket"
        self.objects: dict[str, bytes] = {}
        self.faults: dict[str, list[int | str]] = {}
        self.reads: Counter[str] = Counter()


class Handler(BaseHTTPRequestHandler):
    server: ObjectStore
    disable_nagle_algorithm = True
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        store = self.server
        data = store.objects.get(self.path)
        store.reads[self.path] += self.command == "GET"
        fault = self.fault() if self.command == "GET" else ""
        if fault == "drop":
            self.close_connection = True
            return
        if data is None or fault.isdecimal():
            return self.say(int(fault or 404), b"")
        if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            data = data[int(asked[1]) : int(asked[2]) + 1]
        self.say(200, data, sent=len(data) // 2 if fault == "cut" else len(data), flip=fault == "flip")

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        fault = self.fault()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if fault.isdecimal():
            return self.say(int(fault), b"")
        self.server.objects[self.path] = body
        self.say(200, b"")

    def do_DELETE(self) -> None:
        self.server.objects.pop(self.path, None)
        self.say(204, b"")

    def fault(self) -> str:
        for piece, faults in self.server.faults.items():
            if piece in self.path and faults:
                last = str(faults[0])
                return last.rstrip("!") if last.endswith("!") else str(faults.pop(0))
        return ""

    def say(self, status: int, body: bytes, sent: int | None = None, flip: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if flip:
            body = body[:-1] + bytes([body[-1] ^ 1])
        self.wfile.write(body[:sent])
        self.close_connection = sent is not None and sent < len(body)

    def log_message(self, *_: Any) -> None:
        pass


class ObjectStoreFiles(AbstractFileSystem):
    """What fsspec asks of a file system, by plain requests."""

    protocol = "objstore"
    cachable = False

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        host, _, name = self._strip_protocol(path).partition("/")
        connection = http.client.HTTPConnection(host, timeout=10)
        try:
            connection.request(method, f"/{name}", body, headers)
            answer = connection.getresponse()
            length, data = int(answer.headers.get("Content-Length", 0)), answer.read()
        finally:
            connection.close()
        if answer.status == 404:
            raise FileNotFoundError(path)
        if answer.status == 403:
            raise PermissionError(path)
        if answer.status >= 400:
            raise OSError(f"{method} {path}: status {answer.status}")
        return length, data

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return {"name": path, "size": self.ask("HEAD", path)[0], "type": "file"}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        headers = {} if start is None or end is None else {"Range": f"bytes={start}-{end - 1}"}
        return self.ask("GET", path, **headers)[1]

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        self.ask("PUT", path, value)

    def rm_file(self, path: str) -> None:
        self.ask("DELETE", path)


fsspec.register_implementation("objstore", ObjectStoreFiles, clobber=True)


@contextmanager
def serving() -> Iterator[ObjectStore]:
    """The store, while it answers."""
    store = ObjectStore()
    threading.Thread(target=store.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield store
    finally:
        store.shutdown()
        store.server_close()
