"""Kept activations on S3: written and read by s3fs against moto's server, whose answers are spoiled. Run by
peers/run; s3fs and moto are in environments of their own."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from peers.s3_faults import Proxy, before
from tests.conftest import text_file, tiny_model  # noqa: F401  (fixtures)
from tests.jobs.broken_runs import contents
from tests.jobs.test_cache import ROWS, SAES, SHARDS, files

PEERS = Path(__file__).parents[1] / ".venv-peers"
URL, PAUSES = "s3://bucket/some/cache", ["--retry_seconds", "0.1", "0.1", "0.1"]


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open(tmp_path_factory.mktemp("moto") / "log", "w") as log:
        server = subprocess.Popen([PEERS / "moto/bin/moto_server", "-p", str(port)], stdout=log, stderr=log)
    try:
        with before(port) as proxy:
            for _ in range(300):
                try:
                    ask(proxy, "PUT", "")
                    break
                except (OSError, urllib.error.URLError):
                    time.sleep(0.2)
            yield proxy
    finally:
        server.terminate()
        server.wait()


def ask(proxy: Proxy, method: str, key: str, body: bytes = b"") -> bytes:
    """Speak to moto past the faults."""
    url = f"http://127.0.0.1:{proxy.behind}/bucket/{key}"
    # moto asks for a signature, and looks at none
    signed = (
        "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
    )
    headers = {"Authorization": signed, "Content-Type": "application/octet-stream"}
    request = urllib.request.Request(url, body or None, headers, method=method)
    with urllib.request.urlopen(request) as answer:
        data: bytes = answer.read()
    return data


def monosemy(proxy: Proxy, *arguments: object) -> subprocess.CompletedProcess[str]:
    settings = {
        "AWS_ENDPOINT_URL": proxy.url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "canary-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "OMP_NUM_THREADS": "1",
    }
    command = [PEERS / "s3fs/bin/python", "-m", "monosemy", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | settings)
    assert "canary-secret" not in done.stdout + done.stderr and "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture(scope="module")
def rows(tiny_model: Path, text_file: Path) -> list[str]:  # noqa: F811
    return ["--model_name", str(tiny_model), "--dataset", str(text_file), *ROWS]


@pytest.fixture(scope="module")
def local(proxy: Proxy, rows: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same cache on a disk, and a run from it."""
    folder = tmp_path_factory.mktemp("local")
    assert monosemy(proxy, "cache", "--to", folder / "cache", *rows, *SHARDS).returncode == 0
    run = ["train", "--save_dir", folder / "run", *rows, *SAES, "--activations", folder / "cache"]
    assert monosemy(proxy, *run).returncode == 0
    return folder


@pytest.fixture(scope="module")
def kept(proxy: Proxy, local: Path, rows: list[str]) -> dict[str, bytes]:
    """What lies on S3 after writes that were refused and dropped on the way: the bytes of the disk."""
    proxy.faults = {("PUT", "shard-000001"): ["503", "503"], ("PUT", "manifest"): ["500"]}
    proxy.faults |= {("PUT", "shard-000002"): ["drop"]}
    done = monosemy(proxy, "cache", "--to", URL, *rows, *SHARDS, *PAUSES)
    assert done.returncode == 0, done.stderr
    assert not any(proxy.faults.values())
    wanted = files(local / "cache")
    found = {name: ask(proxy, "GET", f"some/cache/{name}") for name in wanted}
    assert found == wanted
    with pytest.raises(urllib.error.HTTPError):
        ask(proxy, "GET", "some/cache/writing.json")
    return found


def train(proxy: Proxy, folder: Path, rows: list[str]) -> subprocess.CompletedProcess[str]:
    return monosemy(proxy, "train", "--save_dir", folder, *rows, *SAES, "--activations", URL, *PAUSES)


def test_a_run_through_faults_that_pass(
    proxy: Proxy, kept: dict[str, bytes], local: Path, rows: list[str], tmp_path: Path
) -> None:
    """503, reads that are cut, a byte that flips, no answer: SAEs and records as from the disk."""
    proxy.faults = {
        ("GET", "layer_0/shard-000000"): ["503", "cut"],
        ("GET", "layer_2/shard-000001"): ["flip"],
        ("GET", "layer_0/shard-000002"): ["cut", "drop"],
        ("HEAD", "layer_2/shard-000002"): ["503"],
        ("GET", "manifest"): ["503", "cut"],
    }
    done = train(proxy, tmp_path / "run", rows)
    assert done.returncode == 0, done.stderr
    assert not any(proxy.faults.values()), proxy.faults
    assert contents(tmp_path / "run") == contents(local / "run")


def test_a_store_that_stays_away(
    proxy: Proxy, kept: dict[str, bytes], local: Path, rows: list[str], tmp_path: Path
) -> None:
    proxy.faults = {("GET", "layer_0/shard-000001"): ["503!"]}
    done = train(proxy, tmp_path / "run", rows)
    assert done.returncode == 75 and "shard-000001.safetensors could not be read" in done.stderr, done.stderr
    proxy.faults = {}
    assert train(proxy, tmp_path / "run", rows).returncode == 0
    assert contents(tmp_path / "run") == contents(local / "run")


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing", "no permission"])
def test_what_is_damaged_there_is_refused(
    proxy: Proxy, kept: dict[str, bytes], rows: list[str], tmp_path: Path, damage: str
) -> None:
    name = "resid_post_layer_2/shard-000001.safetensors"
    data = kept[name]
    proxy.faults = {("HEAD", name): ["403!"]} if damage == "no permission" else {}
    if damage == "missing":
        ask(proxy, "DELETE", f"some/cache/{name}")
    elif damage in ("flipped", "cut"):
        ask(proxy, "PUT", f"some/cache/{name}", flipped(data) if damage == "flipped" else data[:-9])
    try:
        done = train(proxy, tmp_path / "run", rows)
    finally:
        ask(proxy, "PUT", f"some/cache/{name}", data)
        proxy.faults = {}
    assert done.returncode == 2 and f"{URL}/{name}" in done.stderr, done.stderr


def test_a_cache_that_is_not_whole_and_goes_on(
    proxy: Proxy, kept: dict[str, bytes], local: Path, rows: list[str]
) -> None:
    """Broken off by a store that refuses, it is read by nobody, goes on, and ends as the other did."""
    other = URL.replace("some", "other")
    proxy.faults = {("PUT", "layer_0/shard-000002"): ["503!"]}
    done = monosemy(proxy, "cache", "--to", other, *rows, *SHARDS, *PAUSES)
    assert done.returncode == 75 and "could not be written" in done.stderr, done.stderr
    run = ["train", "--save_dir", "nowhere", *rows, *SAES, "--activations", other, *PAUSES, "--dry_run"]
    done = monosemy(proxy, *run)
    assert done.returncode == 2 and "It was not written to its end" in done.stderr, done.stderr
    proxy.faults = {}
    done = monosemy(proxy, "cache", "--to", other, *rows, *SHARDS, *PAUSES)
    assert done.returncode == 0 and "going on after" in done.stderr, done.stderr
    manifest = ask(proxy, "GET", "other/cache/manifest.json")
    assert manifest == kept["manifest.json"]
    for site, of in json.loads(manifest)["sites"].items():
        for number, shard in enumerate(of["shards"]):
            key = f"other/cache/{site.replace('.', '_layer_')}/shard-{number:06d}.safetensors"
            assert hashlib.sha256(ask(proxy, "GET", key)).hexdigest() == shard["sha256"]
