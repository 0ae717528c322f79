"""Weights & Biases for real: offline files read back, and every way in which the service can fail a run."""

from __future__ import annotations

import json
import logging
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from monosemy.jobs.trackers import Wandb
from monosemy.system.redact import without_secrets
from tests.jobs.mirrors import KEY, MEMBERS, mirror, warnings

pytestmark = pytest.mark.usefixtures("environment")


def read_back(path: Path) -> dict[str, Any]:
    """What wandb wrote: 7 bytes, then protobuf messages in LevelDB's log format (blocks of 32 KiB, pieces
    with crc, length and kind)."""
    from wandb.proto.wandb_internal_pb2 import Record

    found: dict[str, Any] = {"history": [], "axes": {}, "summary": {}}
    data, place, message = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        message += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or its last piece
            record, message = Record.FromString(message), b""
            if record.HasField("run"):
                found["name"], found["group"] = record.run.display_name, record.run.run_group
                found["config"] = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif record.HasField("history"):
                items = {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                    for item in record.history.item
                }
                found["history"].append(items)
            elif record.HasField("metric"):
                found["axes"][record.metric.name or record.metric.glob_name] = record.metric.step_metric
            elif record.HasField("summary"):
                found["summary"] |= {
                    item.key: json.loads(item.value_json) for item in record.summary.update if item.key
                }
    return found


def test_offline_files_hold_every_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker, _ = mirror(tmp_path)
    assert tracker.unsent == 0
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    runs = sorted(
        (read_back(path) for path in tmp_path.glob("wandb/offline-run-*/*.wandb")),
        key=lambda run: run["config"]["layer"],
    )
    assert [run["name"] for run in runs] == [f"saes/{member['name']}" for member in MEMBERS]
    for place, run in enumerate(runs):
        assert run["group"] == "saes"
        assert run["config"]["k"] == 32 and run["config"]["run"] == {"model_name": "m", "num_tokens": 100}
        assert run["axes"] == {"step": "", "tokens": "", "*": "step"}
        assert [item["_step"] for item in run["history"]] == [0, 10, 20, 30, 40]
        for item in run["history"]:
            assert item["step"] == item["_step"] and item["tokens"] == 2048 * item["step"]
            assert item["loss"] == item["step"] + place / 4
            assert item["run/tokens_per_second"] == 1000 + item["step"]
        assert run["summary"]["status"] == "complete"
    assert runs[0]["summary"]["fvu"] == 0.25
    assert not any(b"canarycanary" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_disabled_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker, _ = mirror(tmp_path / "run")
    assert tracker.unsent == 0 and not caplog.records
    assert not list(tmp_path.rglob("*.wandb"))


def test_without_a_key_there_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker, seconds = mirror(tmp_path)
    assert seconds < 15
    assert len(warnings(caplog)) == 1 and "API key" in warnings(caplog)[0]
    assert tracker.unsent == 20


def test_a_server_that_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        tracker, seconds = mirror(tmp_path, patience=3)
    assert seconds < 30
    assert len(warnings(caplog)) == 1 and "refused" in warnings(caplog)[0]
    assert tracker.unsent == 20


def test_a_server_that_never_answers_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        tracker, seconds = mirror(tmp_path, finish=3.0, capacity=8)
    assert seconds < 6
    assert len(warnings(caplog)) == 1 and "no answer within 3 seconds" in warnings(caplog)[0]
    assert tracker.unsent == 20


def test_a_process_that_is_killed_costs_only_the_mirror(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = Wandb("project", group="saes", folder=tmp_path)
    tracker.start({}, MEMBERS[:1])
    while not list(tmp_path.glob("wandb/offline-run-*/*.wandb")):
        time.sleep(0.05)
    tracker._kill()
    for step in range(100):
        tracker.log({"step": step, "tokens": step, "sae": MEMBERS[0]["name"], "loss": 1.0})
    tracker.finish("complete")
    assert len(warnings(caplog)) == 1
    assert tracker.unsent == 100


def test_the_interpreter_exits_at_once_after_finish(tmp_path: Path) -> None:
    """In the trainer's own process nothing of wandb is loaded, so nothing of it can wait at exit."""
    program = (
        "import sys; from monosemy.jobs.trackers import Wandb\n"
        f"t = Wandb('p', group='g', folder={str(tmp_path)!r})\n"
        "t.start({}, [{'name': 'a/trainer_0', 'config': {}}])\n"
        "t.log({'step': 0, 'tokens': 0, 'sae': 'a/trainer_0', 'loss': 1.0})\n"
        "t.finish('failed', timeout=2)\n"
        "assert 'wandb' not in sys.modules\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environment = os.environ | {
            "WANDB_API_KEY": KEY,
            "WANDB_BASE_URL": f"http://127.0.0.1:{silent.getsockname()[1]}",
        }
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=30)
    assert time.monotonic() - began < 15


def test_finish_without_start_is_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Wandb("project", group="saes", folder=tmp_path).finish("failed")
    assert not caplog.records and threading.active_count() < 50


def test_secrets_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICE_API_KEY", "canary-0123456789")
    config = {
        "hf_token": "x",
        "api_key": "x",
        "num_tokens": 5,
        "text_key": "text",
        "revision": "a" * 40,
        "layers": (3, 9),
        "nested": [
            {
                "password": "x",
                "url": "https://me:pw@host/a",
                "command": "run hf_abcdefghijklmnopqrst canary-0123456789",
            }
        ],
    }
    assert without_secrets(config) == {
        "num_tokens": 5,
        "text_key": "text",
        "revision": "a" * 40,
        "layers": [3, 9],
        "nested": [{"url": "https://***@host/a", "command": "run *** ***"}],
    }
