"""A hub of our own: repositories at commits, served as the Hugging Face hub serves them, that fail as they
are told."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

import pytest

from tests.jobs.hub_server import FakeHub, Handler

SIGNATURE = "signed-by-the-store"
STALL = 2.0  # seconds without a byte, where a fault is "stall"
LARGE = (".safetensors", ".npz", ".pt", ".pth")  # kept in LFS, with a sha256 that the hub tells


class LocalHub(FakeHub):
    """Besides what `FakeHub` takes in, repositories that were published. The newest commit of each is its
    branch main.

    What it says of a repository has `listed` files at most; a page of its tree, two.
    """

    def __init__(self) -> None:
        super().__init__()
        self.RequestHandlerClass = Reading
        self.published: dict[str, dict[str, dict[str, bytes]]] = {}
        self.gated: set[str] = set()
        self.listed = 1000
        self.fetched: list[tuple[str, str]] = []  # (commit, path) of every file that was sent

    def publish(self, repo: str, files: dict[str, bytes]) -> str:
        """Add a commit; returns its name."""
        commits = self.published.setdefault(repo, {})
        commit = hashlib.sha1(f"{repo} {len(commits)}".encode()).hexdigest()
        commits[commit] = dict(files)
        return commit

    def commits_of(self, repo: str) -> dict[str, dict[str, bytes]]:
        """What was published, or else pushed."""
        pushed = self.repositories.get(repo)
        return self.published.get(repo) or ({f"{self.commits:040x}": pushed} if pushed else {})

    def everything(self) -> Iterator[dict[str, dict[str, bytes]]]:
        return (self.commits_of(repo) for repo in [*self.published, *self.repositories])

    def at(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.commits_of(repo)
        commit = list(commits)[-1] if commits and revision == "main" else revision
        return (commit, commits[commit]) if commit in commits else None


class Reading(Handler):
    server: LocalHub

    def handle_request(self) -> None:
        path = unquote(urlparse(self.path).path).strip("/")
        parts = path.split("/")
        if (
            parts[:2] == ["api", "models"]
            and len(parts) >= 4
            and "commit" not in parts
            and "preupload" not in parts
        ):
            return self.tell("/".join(parts[2:4]), parts[4:])
        if parts[0] == "cdn":
            return self.store(parts[1], "/".join(parts[2:]))
        if len(parts) > 4 and parts[2] == "resolve":
            return self.send("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        return super().handle_request()

    do_GET = do_POST = do_PUT = do_HEAD = handle_request

    def refused(self, repo: str, revision: str) -> bool:
        """Answer with the hub's refusal, if there is one."""
        hub = self.server
        if self.faulty():
            return True
        if repo in hub.gated:
            return self.error(403, "GatedRepo")
        if hub.at(repo, "main") is None:
            return self.error(404, "RepoNotFound")
        return hub.at(repo, revision) is None and self.error(404, "RevisionNotFound")

    def faulty(self) -> bool:
        """Count the request, and fail it as it was told: with a status, or at first without a word."""
        self.server.requests[self.path] += 1
        for piece, faults in self.server.faults.items():
            if piece in self.path and faults and faults[0] == "stall":
                time.sleep(STALL)
            elif piece in self.path and faults and isinstance(faults[0], int):
                return self.error(faults.pop(0))
        return False

    def error(self, status: int, code: str = "") -> bool:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()
        return True

    def tell(self, repo: str, rest: list[str]) -> None:
        """What the repository is at a revision, with the sizes and digests of its files where they are asked
        for."""
        revision = rest[1] if len(rest) > 1 else "main"
        if self.refused(repo, revision):
            return
        commit, files = self.server.at(repo, revision) or ("", {})
        if rest[:1] == ["tree"]:
            return self.tree(self.path.partition("?")[0], files)
        with_sizes = "blobs" in urlparse(self.path).query
        siblings = [
            {"rfilename": name} | (described(name, data) if with_sizes else {})
            for name, data in files.items()
        ]
        siblings = siblings[: self.server.listed]
        self.answer(
            {
                "id": repo,
                "modelId": repo,
                "sha": commit,
                "private": False,
                "tags": [],
                "downloads": 0,
                "siblings": siblings,
            }
        )

    def tree(self, path: str, files: dict[str, bytes]) -> None:
        """A page of all files, which names the next one."""
        start = int(parse_qs(urlparse(self.path).query).get("cursor", ["0"])[0])
        page = [
            {"type": "file", "path": name} | described(name, files[name])
            for name in list(files)[start : start + 2]
        ]
        following = f'<{self.server.url}{path}?recursive=true&cursor={start + 2}>; rel="next"'
        self.answer(page, Link=following if start + 2 < len(files) else "")

    def send(self, repo: str, revision: str, name: str) -> None:
        """A file, whole or as the next of its faults has it: "half" of it, "other" bytes, or a status."""
        hub = self.server
        if self.refused(repo, revision):
            return
        commit, files = hub.at(repo, revision) or ("", {})
        if name not in files:
            self.error(404, "EntryNotFound")
            return
        about = described(name, files[name])
        large = "lfs" in about
        self.send_response(302 if large else 200)
        self.send_header(
            "X-Linked-Etag" if large else "ETag", f'"{about["lfs"]["oid"] if large else about["oid"]}"'
        )
        self.send_header("X-Repo-Commit", commit)
        if large:
            self.send_header("X-Linked-Size", str(about["size"]))
            self.send_header(
                "Location",
                f"http://localhost:{hub.server_port}/cdn/{commit}/{name}?Expires=1&Signature={SIGNATURE}",
            )
        self.send_header("Content-Length", "0" if large else str(about["size"]))
        self.end_headers()
        if not large:
            self.send_body(commit, name, files[name])

    def store(self, commit: str, name: str) -> None:
        """A large file, from the address that was signed for it."""
        data = next(commits[commit][name] for commits in self.server.everything() if commit in commits)
        if self.faulty():
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.send_body(commit, name, data)

    def send_body(self, commit: str, name: str, data: bytes) -> None:
        if self.command != "GET":
            return
        hub = self.server
        hub.fetched.append((commit, name))
        faults = next((faults for piece, faults in hub.faults.items() if piece in name and faults), [])
        fault = faults.pop(0) if faults else None
        if fault == "half":
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        else:
            self.wfile.write(bytes(b ^ 1 for b in data) if fault == "other" else data)


def described(name: str, data: bytes) -> dict[str, Any]:
    """Its size and digests: git's own of a small file, and the sha256 of a large one."""
    if not name.endswith(LARGE):
        oid = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
        return {"size": len(data), "oid": oid, "blobId": oid}
    digest = hashlib.sha256(data).hexdigest()
    oid = hashlib.sha1(digest.encode()).hexdigest()  # of the pointer that git has in its place
    lfs = {"size": len(data), "oid": digest, "sha256": digest, "pointerSize": 130}
    return {"size": len(data), "oid": oid, "blobId": oid, "lfs": lfs}


def stand_in(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the hub at `url` in the place of huggingface.co, with an empty cache of files.

    An earlier hub may have had the same port, so nothing of it is kept: huggingface_hub holds on to file
    systems with their listings by address, and to connections that the earlier hub's threads still answer.
    """
    from huggingface_hub import HfFileSystem, close_session, constants

    HfFileSystem.clear_instance_cache()
    close_session()
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


@contextmanager
def serving(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """The hub, in the place of huggingface.co, with an empty cache."""
    server = LocalHub()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    stand_in(server.url, cache, monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
