"""Weights & Biases when its server, its process or its folder fail: one warning, no call that waits, the
run's weights untouched."""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from monosemy.jobs.trackers import Wandb
from tests.certify import share
from tests.conftest import write_text
from tests.jobs.mirrors import KEY, MEMBERS, mirror, warnings

pytestmark = pytest.mark.usefixtures("environment")


class Service(ThreadingHTTPServer):
    """Answers every request with `fault`: a status, "garbage", "drop" or "trickle"."""

    daemon_threads = True

    def __init__(self, fault: int | str) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.fault = fault
        self.asked = threading.Event()


class Answers(BaseHTTPRequestHandler):
    server: Service

    def do_POST(self) -> None:
        self.server.asked.set()
        fault = self.server.fault
        if isinstance(fault, int):
            self.send_response(fault)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")
        elif fault == "garbage":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>" * 100)
        elif fault == "trickle":
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            for _ in range(300):
                self.wfile.write(b" ")
                time.sleep(0.1)
        self.close_connection = True

    do_GET = do_PUT = do_POST

    def log_message(self, *_: object) -> None:
        pass


TRAIN = (
    "--layers 1 --architectures top_k --dictionary_widths 48 --target_l0s 4 --context_length 16 "
    "--sae_batch_size 64 --llm_batch_size 4 "
    "--buffer_tokens 2000 --eval_num_inputs 4 --held_out_fraction 0.1 --learning_rates 3e-3"
).split()
STEPS = ("--num_tokens", "3200", "--log_steps", "1")


def begun(folder: Path, model: Path, text: Path, *more: str, **variables: str) -> subprocess.Popen[bytes]:
    """The whole command in a process of its own; what it prints is in a file beside its folder."""
    arguments = ["--save_dir", str(folder), "--model_name", str(model), "--dataset", str(text), *TRAIN, *more]
    command = [sys.executable, "-m", "monosemy", "train", *arguments]
    told = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    with folder.with_suffix(".log").open("wb") as output:
        return subprocess.Popen(command, env=told, stdout=output, stderr=output)


def seconds_of(process: subprocess.Popen[bytes], folder: Path, began: float) -> float:
    assert process.wait(300) == 0, folder.with_suffix(".log").read_text()
    return time.monotonic() - began


def trained(folder: Path, model: Path, text: Path, *more: str, **variables: str) -> tuple[float, dict]:
    """The seconds that the whole command took, and what run.json says of the training."""
    began = time.monotonic()
    seconds = seconds_of(begun(folder, model, text, *more, **variables), folder, began)
    return seconds, json.loads((folder / "run.json").read_text())["training"]


@pytest.fixture(scope="module")
def hanging(tiny_model, text_file, tmp_path_factory) -> Iterator[tuple[Path, Future[float]]]:
    """The folder and the seconds of a run whose wandb hangs, which other tests do not wait for."""
    folder = tmp_path_factory.mktemp("hanging")
    own = dict.fromkeys(("HOME", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"), str(folder))
    with socket.create_server(("127.0.0.1", 0)) as silent, ThreadPoolExecutor(1) as pool:
        told = own | {"WANDB_BASE_URL": f"http://127.0.0.1:{silent.getsockname()[1]}", "WANDB_API_KEY": KEY}
        run, began = folder / "run", time.monotonic()
        process = begun(run, tiny_model, text_file, *STEPS, "--use_wandb", **told)
        yield run, pool.submit(seconds_of, process, run, began)


@pytest.fixture
def service(request, monkeypatch, hanging) -> Iterator[Service]:
    with Service(request.param) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield server
        server.shutdown()


@pytest.mark.parametrize("service", [500, 401, 403, "garbage", "drop", "trickle"], indirect=True)
def test_a_server_that_fails(service, tmp_path, caplog):
    tracker, seconds = mirror(tmp_path, finish=12.0, patience=3)
    assert service.asked.is_set() and seconds < 13
    assert len(warnings(caplog)) == 1 and "metrics.jsonl has every record" in warnings(caplog)[0]
    assert KEY not in caplog.text
    assert tracker.unsent == 20


def test_a_process_that_stands_still(tmp_path, monkeypatch, caplog):
    """Stopped as by a debugger, with more to tell than its pipe holds: nothing waits for it, and it is gone
    in the end."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = Wandb("project", group="saes", folder=tmp_path, capacity=100)
    tracker.start({}, MEMBERS[:1])
    while not list(tmp_path.glob("wandb/offline-run-*/*.wandb")):
        time.sleep(0.05)
    os.kill(tracker._process.pid, signal.SIGSTOP)
    began = time.monotonic()
    for step in range(5000):
        tracker.log({"step": step, "tokens": step, "sae": MEMBERS[0]["name"], "loss": 1.0})
    assert time.monotonic() - began < 1
    tracker.finish("complete", timeout=2)
    assert time.monotonic() - began < 5
    assert len(warnings(caplog)) == 1 and tracker.unsent == 5000
    with pytest.raises(ProcessLookupError):
        os.kill(tracker._process.pid, 0)


def test_without_the_package(tmp_path, monkeypatch, caplog):
    (tmp_path / "wandb.py").write_text("raise ModuleNotFoundError('No module named wandb')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    tracker, seconds = mirror(tmp_path / "run")
    assert seconds < 15 and tracker.unsent == 20
    assert len(warnings(caplog)) == 1 and "No module named wandb" in warnings(caplog)[0]


def test_a_folder_that_is_a_file(tmp_path, monkeypatch, caplog):
    (tmp_path / "run").write_text("x")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    _, seconds = mirror(tmp_path / "run")
    assert seconds < 15 and len(warnings(caplog)) <= 1
    assert (tmp_path / "run").read_text() == "x"


def weights(folder: Path) -> bytes:
    return (folder / "resid_post_layer_1/trainer_0/sae.safetensors").read_bytes()


def test_a_run_whose_wandb_hangs_has_the_same_weights_and_ends_in_time(
    hanging, tiny_model, text_file, tmp_path
):
    without, _ = trained(tmp_path / "run", tiny_model, text_file, *STEPS)
    folder, with_wandb = hanging
    assert with_wandb.result() < without + 30
    assert weights(tmp_path / "run") == weights(folder)
    assert (tmp_path / "run/metrics.jsonl").read_text() == (folder / "metrics.jsonl").read_text()


@pytest.mark.certify
def test_a_hanging_wandb_slows_no_step(tiny_model, tmp_path, certified):
    """Tokens per second with a server that never answers and without wandb, medians of five pairs in turn;
    wants the machine to itself.

    Shorter runs would not show it: the process takes a second of a core to begin, and then nothing.
    """
    text = write_text(tmp_path / "text.jsonl", documents=2000)
    rates: dict[bool, list[float]] = {False: [], True: []}
    steps = ("--num_tokens", "128_000", "--log_steps", "10")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hanging = {"WANDB_BASE_URL": f"http://127.0.0.1:{silent.getsockname()[1]}", "WANDB_API_KEY": KEY}
        for i in range(share(5)):
            for wandb in (False, True) if i % 2 else (True, False):
                more = ("--use_wandb",) if wandb else ()
                _, training = trained(
                    tmp_path / f"{i}{wandb}", tiny_model, text, *steps, *more, **(hanging if wandb else {})
                )
                rates[wandb].append(training["tokens_per_second"])
    slowdown = statistics.median(rates[False]) / statistics.median(rates[True]) - 1
    certified("wandb hanging: slowdown of a step", 1, f"{slowdown:.1%}")
    assert slowdown <= 0.05
