"""Fixtures of jobs: a hub that answers here, a small run, a disk that can be filled, wandb without its
server."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import Faulty
from tests.jobs.broken_runs import SMALL, contents, mounted, train
from tests.jobs.hub_server import TOKEN, FakeHub
from tests.made_run import EIGHT


@pytest.fixture
def server() -> Iterator[FakeHub]:
    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run, with what must stay at home beside what is uploaded."""
    folder = tmp_path / "my run"
    rows = []
    for place, name in enumerate(("top_k", "gated")):
        sae = folder / "resid_post_layer_3" / f"trainer_{place}"
        (sae / "checkpoints").mkdir(parents=True)
        (sae / "sae.safetensors").write_bytes(os.urandom(4096))
        (sae / "ae.pt").write_bytes(os.urandom(4096))
        (sae / "config.json").write_text('{"trainer": {}}')
        (sae / "eval_results.json").write_text('{"l0": 32.0}')
        (sae / "checkpoints" / "ae_10.pt").write_bytes(b"not for the hub")
        numbers = {
            "l0": 32.04,
            "kl": 0.0412,
            "fvu": 0.1123,
            "frac_alive": 0.988,
            "tokens": 8192,
            "loss_recovered_zero": 0.97312,
        }
        interval = {"loss_recovered_zero_low": 0.9718, "loss_recovered_zero_high": 0.9744}
        about = {
            "sae": f"resid_post_layer_3/trainer_{place}",
            "site": "resid_post.3",
            "architecture": name,
            "d_sae": 4096,
        }
        rows.append(about | numbers | interval)
    rows[1] |= {"fvu": None}
    for extra in ("plots", "wandb/run-1/files", "checkpoints/step-5"):
        (folder / extra).mkdir(parents=True)
    (folder / "plots" / "loss_recovered.png").write_bytes(b"\x89PNG")
    (folder / "wandb/run-1/files/config.json").write_text("{}")
    (folder / "checkpoints/step-5/sae.safetensors").write_bytes(b"x")
    (folder / ".env").write_text("HF_TOKEN=x")
    config = {
        "model_name": "smollm2-135m",
        "num_tokens": 614400,
        "dataset": "sotu",
        "layers": [3],
        "hf_token": TOKEN,
    }
    provenance = {
        "config": config,
        "versions": {"monosemy": "0.1", "torch": "2.13"},
        "command": ["monosemy", "train", "--x", TOKEN],
    }
    (folder / "run.json").write_text(json.dumps(provenance))
    (folder / "status.json").write_text('{"status": "complete"}')
    (folder / "metrics.jsonl").write_text('{"step": 0}\n')
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def small(tiny_model, text_file):
    return [
        "--model_name",
        str(tiny_model),
        "--dataset",
        str(text_file),
        "--layers",
        "1",
        "--architectures",
        "top_k",
        *SMALL,
    ]


@pytest.fixture
def disk(tmp_path):
    """A file system of 16 MiB."""
    folder = tmp_path / "disk"
    with mounted(folder, "16m"):
        yield folder


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings, keys or caches but the test's own."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    for name, folder in (
        ("HOME", "home"),
        ("WANDB_CACHE_DIR", "cache"),
        ("WANDB_CONFIG_DIR", "config"),
        ("WANDB_DATA_DIR", "data"),
    ):
        monkeypatch.setenv(name, str(tmp_path / folder))


@pytest.fixture(scope="module")
def base(tiny_model: Path, text_file: Path) -> list[str]:
    """The flags of a small run."""
    return ["--model_name", str(tiny_model), "--dataset", str(text_file), *SMALL]


@pytest.fixture(scope="module")
def mixed(base: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Eight architectures at two layers, on text with chat mixed in."""
    chat = tmp_path_factory.mktemp("chat") / "chat.jsonl"
    turn = [{"role": "user", "content": "what was it for"}, {"role": "assistant", "content": "it was all"}]
    chat.write_text("".join(json.dumps({"conversation": turn}) + "\n" for _ in range(4000)))
    data = ["--mixed_dataset", "--chat_dataset", str(chat), "--pretrain_frac", "0.7"]
    return [*base, *data, "--layers", "0", "2", "--architectures", *EIGHT]


@pytest.fixture(scope="module")
def whole(faulty: Faulty, mixed: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the mixed run ends with on one process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(faulty, folder, mixed).code == 0
    return contents(folder)
