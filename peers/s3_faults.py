"""A proxy before an S3 server, whose answers it spoils as it is told."""

from __future__ import annotations

import http.client
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HOP = {"connection", "transfer-encoding", "content-length", "keep-alive", "date", "server"}


class Proxy(ThreadingHTTPServer):
    """`faults` maps (method, piece of a path) to what its next requests get: a status, "cut" (half of the
    answer's bytes), "drop" (no answer) or "flip" (a bit of it is wrong); one that ends in "!" is for all."""

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behind, self.url = port, f"http://127.0.0.1:{self.server_port}"
        self.faults: dict[tuple[str, str], list[str]] = {}
        self.spoiled: Counter[str] = Counter()


class Handler(BaseHTTPRequestHandler):
    server: Proxy
    protocol_version = "HTTP/1.1"

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.fault()
        if fault == "drop":
            self.close_connection = True
            return
        if fault.isdecimal():
            return self.say(int(fault), [], b"<Error><Code>SlowDown</Code></Error>")
        connection = http.client.HTTPConnection("127.0.0.1", self.server.behind, timeout=60)
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        if fault == "flip" and data:
            data = data[:-1] + bytes([data[-1] ^ 1])
        headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in HOP]
        length = int(answer.headers.get("Content-Length") or len(data))
        cut = len(data) // 2 if fault == "cut" else None
        self.say(answer.status, headers, data, length if self.command == "HEAD" else len(data), cut)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_request

    def fault(self) -> str:
        for (method, piece), faults in self.server.faults.items():
            if method == self.command and piece in self.path and faults:
                fault = faults[0] if faults[0].endswith("!") else faults.pop(0)
                self.server.spoiled[fault] += 1
                return fault.rstrip("!")
        return ""

    def say(
        self,
        status: int,
        headers: list[tuple[str, str]],
        body: bytes,
        length: int | None = None,
        sent: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])
        self.close_connection = sent is not None

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def before(port: int) -> Iterator[Proxy]:
    """The proxy of a server at a port, while it answers."""
    proxy = Proxy(port)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
