"""A hub on this machine, whose answers may be faults, and programs that speak to it."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

REPO = "me/saes"


TOKEN = "hf_" + "canary" * 5


class FakeHub(ThreadingHTTPServer):
    """Repositories in memory.

    `faults` maps a piece of a path to what its next requests get: a status, "drop" or "garbage".
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: dict[str, list[int | str]] = {}
        self.requests: Counter[str] = Counter()
        self.tokens: set[str | None] = set()
        self.messages: list[str] = []
        self.commits = 0


class Handler(BaseHTTPRequestHandler):
    server: FakeHub
    disable_nagle_algorithm = True
    protocol_version = "HTTP/1.1"

    def answer(self, body: Any, status: int = 200, **headers: str) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def fail(self, fault: int | str) -> None:
        if isinstance(fault, int):
            return self.answer({"error": "as told"}, fault)
        if fault == "garbage":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>")
        self.close_connection = True  # without a word, for "drop"

    def handle_request(self) -> None:
        hub, path = self.server, self.path
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests[path] += 1
        if not path.startswith("/blob/"):
            hub.tokens.add(self.headers.get("Authorization"))
        for piece, statuses in hub.faults.items():
            if piece in path and statuses:
                return self.fail(statuses.pop(0))
        if path == "/api/repos/create":
            name = f"me/{json.loads(body)['name']}"
            known = name in hub.repositories
            hub.repositories.setdefault(name, {})
            return self.answer({"url": f"{hub.url}/{name}"}, 409 if known else 200)
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path.endswith("/preupload/main"):
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith((".safetensors", ".pt")) else "regular" for path in paths}
            return self.answer(
                {
                    "files": [
                        {"path": path, "uploadMode": mode, "shouldIgnore": False}
                        for path, mode in modes.items()
                    ]
                }
            )
        if path.endswith("/info/lfs/objects/batch"):
            objects = [{"oid": item["oid"], "size": item["size"]} for item in json.loads(body)["objects"]]
            for item in objects:
                if item["oid"] not in hub.blobs:
                    item["actions"] = {"upload": {"href": f"{hub.url}/blob/{item['oid']}"}}
            return self.answer({"transfer": "basic", "objects": objects})
        if path.startswith("/blob/"):
            hub.blobs[path.removeprefix("/blob/")] = body
            return self.answer({})
        if path.endswith("/commit/main"):
            files = hub.repositories[REPO]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    hub.messages.append(value["summary"])
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.blobs[value["oid"]]
            hub.commits += 1
            return self.answer(
                {
                    "commitUrl": f"{hub.url}/{REPO}/commit/c{hub.commits}",
                    "commitOid": f"c{hub.commits}",
                    "success": True,
                }
            )
        return self.answer({"error": "not found"}, 404)

    do_GET = do_POST = do_PUT = handle_request

    def log_message(self, *_: Any) -> None:
        pass


def artifacts(run: Path) -> dict[str, bytes]:
    left = ("checkpoints", "wandb", ".env")
    paths = [
        path for path in run.rglob("*") if path.is_file() and not set(path.relative_to(run).parts) & set(left)
    ]
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in paths}


def program(
    endpoint: str, code: str, *, token: str | None = TOKEN, home: Path
) -> subprocess.CompletedProcess[str]:
    """Run code that sees `hub` and `UploadFailed` in a process whose hub is ours: the hub library reads the
    environment when imported."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    if token:
        environment["HF_TOKEN"] = token
    head = (
        "import time, logging\nfrom monosemy.jobs import hub\nfrom monosemy.jobs.hub import "
        "UploadFailed\nlogging.basicConfig(level='WARNING')\n"
    )
    return subprocess.run(
        [sys.executable, "-c", head + code], env=environment, capture_output=True, text=True, timeout=60
    )


FAST = "(0.01, 0.01, 0.01)"
