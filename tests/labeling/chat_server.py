"""A server of OpenAI's chat-completions protocol on this machine, with a model that knows words: it labels a
latent by the word that is marked most often, and judges by whether that word is there."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from monosemy.labeling import prompts

Fault = Callable[[int, dict[str, Any]], "tuple[int, dict[str, str], bytes] | None"]


def words_judge(body: dict[str, Any]) -> str:
    """Answer a request as a model would that sees words and nothing else."""
    system, user = (message["content"] for message in body["messages"])
    if system == prompts.LABEL:
        marked = Counter(word for run in re.findall(r"<<(.*?)>>", user) for word in run.split())
        return json.dumps({"label": f"the word '{marked.most_common(1)[0][0]}'"})
    word = re.search(r"Description: the word '(\w+)'", user)[1]
    excerpts = re.findall(r"^\d+\. (.*)$", user, re.M)
    if system == prompts.DETECT:
        return json.dumps([int(word in re.findall(r"\w+", text)) for text in excerpts])
    assert system == prompts.FUZZ
    marked = [{word for run in re.findall(r"<<(.*?)>>", text) for word in run.split()} for text in excerpts]
    return json.dumps([int(words == {word}) for words in marked])


def completion(text: str | None, **more: Any) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text} | more, "finish_reason": "stop"}
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return json.dumps({"object": "chat.completion", "choices": [choice], "usage": usage}).encode()


class ChatServer(ThreadingHTTPServer):
    """Counts requests. `fault(n, body)` may answer the n-th one, from 0, in the judge's place, by status,
    headers and body; or return None."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, fault: Fault | None = None, delay: float = 0.0, key: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.fault, self.delay, self.key = fault, delay, key
        self.bodies: list[dict[str, Any]] = []  # as they came
        self.answered: list[dict[str, Any]] = []  # by the judge, in full
        self.at: list[float] = []
        self.spans: list[tuple[float, float]] = []  # from when an answer was begun to its end
        self.lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: ChatServer

    def do_POST(self) -> None:
        began = time.monotonic()
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            n = len(server.bodies)
            server.bodies.append(body)
            server.at.append(began)
        if self.path != "/v1/chat/completions":
            return self._send(404, {}, b'{"error": {"message": "no such path"}}')
        if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
            given = self.headers.get("Authorization", "nothing")
            return self._send(401, {}, json.dumps({"error": {"message": f"wrong key: {given}"}}).encode())
        time.sleep(server.delay)
        if server.fault is not None and (made := server.fault(n, body)) is not None:
            return self._send(*made)
        self._send(200, {}, completion(words_judge(body)))
        with server.lock:
            server.answered.append(body)
            server.spans.append((began, time.monotonic()))

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        length = headers.pop("Content-Length", str(len(body)))
        for name, value in ({"Content-Type": "application/json", "Content-Length": length} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        if int(length) != len(body):
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass
