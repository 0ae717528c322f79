"""Uploads that are dropped, refused, delayed and killed, by a hub of our own: what may pass is tried again,
and nothing is lost."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.jobs.hub_server import REPO, TOKEN, FakeHub, artifacts, program

COMMIT, BLOBS = "/commit/main", "/blob/"


def pushed(
    hub: FakeHub, folder: Path, home: Path, *, token: str | None = TOKEN
) -> subprocess.CompletedProcess[str]:
    arguments = ["push", str(folder), REPO, "--retry_seconds", "0.01", "0.01"]
    lines = (
        "import sys",
        "from monosemy.cli import main",
        f"code = main({arguments!r})",
        "assert 'torch' not in sys.modules, 'an upload begins at once'",
        "sys.exit(code)",
    )
    return program(hub.url, "\n".join(lines), home=home, token=token)


@pytest.mark.parametrize(
    "faults",
    [
        {BLOBS: ["drop", "drop"]},
        {BLOBS: [503]},
        {COMMIT: ["drop"]},
        {COMMIT: [409]},
        {COMMIT: [412, 500]},
        {COMMIT: [429]},
        {"/api/repos/create": ["drop"], "/preupload/": [502]},
    ],
    ids=str,
)
def test_what_passes_is_waited_out(server, run, tmp_path, faults):
    server.faults = faults
    done = pushed(server, run, tmp_path)
    assert done.returncode == 0, done.stderr
    assert server.repositories[REPO] == artifacts(run)
    assert not any(server.faults.values())


@pytest.mark.parametrize(
    ("fault", "code", "word"),
    [
        (503, 75, "HTTP 503"),
        ("drop", 75, "Upload to"),
        (401, 1, "hf auth login"),
        (413, 1, "size"),
        ("garbage", 1, "Upload to"),
    ],
)
def test_what_does_not_pass_ends_with_the_command_that_repeats_it(server, run, tmp_path, fault, code, word):
    """Exit code 75 where the same command may work in a while, 1 where something has to be changed first;
    then the command works."""
    before = {path: data for path, data in artifacts(run).items() if path != "README.md"}
    server.faults = {COMMIT: [fault] * 99}
    done = pushed(server, run, tmp_path)
    assert done.returncode == code and word in done.stderr, done.stderr
    assert done.stderr.endswith(f"    monosemy push '{run}' {REPO}\n") and "Traceback" not in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert {path: data for path, data in artifacts(run).items() if path != "README.md"} == before
    server.faults = {}
    assert pushed(server, run, tmp_path).returncode == 0
    assert server.repositories[REPO] == artifacts(run)


def test_an_upload_that_is_killed_is_repeated(server, run, tmp_path):
    server.faults = {COMMIT: [503] * 99}
    environment = os.environ | {
        "HF_ENDPOINT": server.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path),
        "HF_TOKEN": TOKEN,
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "monosemy", "push", str(run), REPO], env=environment, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not server.requests[f"/api/models/{REPO}{COMMIT}"] and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert server.blobs and server.repositories[REPO] == {}
    server.faults = {}
    assert pushed(server, run, tmp_path).returncode == 0
    assert server.repositories[REPO] == artifacts(run)
