"""Canary secrets in the environment and in addresses: a run, a failing run, an upload; no byte of them in
whatever is written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import pytest

from monosemy.system.redact import Redacted, without_secrets
from tests.jobs.hub_server import REPO, FakeHub
from tests.jobs.test_tracker_faults import TRAIN

CANARIES = {
    "HF_TOKEN": "hf_canaryAAAAAAAAAAAAAAAAAAAAAAAAAA",
    "HUGGING_FACE_HUB_TOKEN": "hf_canaryBBBBBBBBBBBBBBBBBBBBBBBBBB",
    "WANDB_API_KEY": "canaryCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCCC",
    "AWS_SECRET_ACCESS_KEY": "canaryDDDDDDDDDDDD",
    "SERVICE_PASSWORD": "canaryEEEEEEEEEEEE",
}
IN_ADDRESSES = "canaryFFFFFFFFFFFF"


@pytest.fixture
def monosemy(tmp_path):
    """Runs a command among canaries, with a hub of ours; its exit code and all that it printed."""
    with FakeHub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "WANDB"))}
        told = {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "WANDB_MODE": "offline"}
        folders = {"HF_HOME": str(tmp_path / "home"), "HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}

        def run(*arguments: str, code: str = "", **more: str) -> tuple[int, str]:
            program = ["-c", code, *arguments] if code else ["-m", "monosemy", *arguments]
            environment = kept | told | folders | CANARIES | more
            done = subprocess.run(
                [sys.executable, *program],
                env=environment,
                capture_output=True,
                text=True,
                timeout=200,
                check=False,
            )
            return done.returncode, done.stdout + done.stderr

        run.server = server
        yield run
        server.shutdown()
        thread.join()


def test_canaries_are_in_nothing_that_a_run_writes_or_prints(tiny_model, text_file, tmp_path, monosemy):
    folder = tmp_path / "run"
    base = ["--model_name", str(tiny_model), "--dataset", str(text_file), "--num_tokens", "3200", *TRAIN]
    printed = []

    # a whole run with both mirrors: wandb's files, the model card and what the hub was sent
    code, said = monosemy(
        "train",
        "--save_dir",
        str(folder),
        *base,
        "--use_wandb",
        "--hf_repo_id",
        REPO,
        "--retry_seconds",
        "0.01",
    )
    assert code == 0, said
    printed.append(said)
    assert (
        "Uploaded: " in said
        and list(folder.glob("wandb/offline-run-*/*.wandb"))
        and (folder / "README.md").is_file()
    )

    # inputs that are refused, with a secret inside
    addresses = (f"https://me:{IN_ADDRESSES}@host/a.jsonl", f"https://host/a.jsonl?sig={IN_ADDRESSES}")
    both = "import sys\nfrom monosemy.cli import main\n"
    both += "for address in sys.argv[1:3]:\n    assert main([*sys.argv[3:], '--dataset', address]) == 2"
    code, said = monosemy(*addresses, "train", "--save_dir", str(tmp_path / "no"), *base, code=both)
    assert code == 0 and said.count("dataset is") == 2 and said.count("***") >= 2, said
    printed.append(said)

    # an upload and a data set that fail, with the address of the hub in their errors
    monosemy.server.faults = {"": [500] * 99}
    address = {"HF_ENDPOINT": monosemy.server.url.replace("://", f"://me:{IN_ADDRESSES}@")}
    for arguments in (
        ["push", str(folder), REPO, "--retry_seconds", "0.01"],
        ["train", "--save_dir", str(tmp_path / "no"), *base, "--dataset", "a/b"],
    ):
        code, said = monosemy(*arguments, **address)
        assert code == 75, said
        printed.append(said)
    code, said = monosemy(
        "train",
        "--save_dir",
        str(tmp_path / "no"),
        *base,
        "--dataset",
        "a/b",
        HF_ENDPOINT=f"http://me:{IN_ADDRESSES}@127.0.0.1:9",
    )
    assert code == 2 and "cannot reach" in said
    printed.append(said)

    # a run that fails with a traceback
    failing = "import os, sys\nfrom monosemy.jobs.plan import Plan\n"
    failing += "def fail(config): raise RuntimeError(str(dict(os.environ)))\nPlan.from_config = fail\n"
    failing += "from monosemy.cli import main\nsys.exit(main(sys.argv[1:]))"
    code, said = monosemy("train", "--save_dir", str(tmp_path / "no"), *base, code=failing)
    assert code == 1 and "Traceback" in said and "RuntimeError" in said and "HF_TOKEN" in said
    printed.append(said)

    wanted = [value.encode() for value in [*CANARIES.values(), IN_ADDRESSES]]
    files = [path for path in [*folder.rglob("*"), *(tmp_path / "home").rglob("*")] if path.is_file()]
    sent = [data for files_of in monosemy.server.repositories.values() for data in files_of.values()]
    assert len(files) > 10 and len(sent) > 5
    for secret in wanted:
        assert not [text for text in printed if secret.decode() in text]
        assert not [path for path in files if secret in path.read_bytes()], secret
        assert not [data for data in sent if secret in data]
    assert f"Bearer {CANARIES['HF_TOKEN']}" in monosemy.server.tokens  # it was used


def test_what_counts_as_a_secret(monkeypatch):
    monkeypatch.setenv("MY_ACCESS_KEY", "canary-0123")
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    for text, shown in {
        "hf_abcdefghijklmnopqrst": "***",
        "see https://me:pw@host/a and http://token@host": "see https://***@host/a and http://***@host",
        "GET /a?X-Amz-Signature=0a1b&x=2&token=t": "GET /a?X-Amz-Signature=***&x=2&token=***",
        "x canary-0123 abc": "x *** abc",
        "num_tokens=5&k=3 me@host.org https://host/a@b": "num_tokens=5&k=3 me@host.org https://host/a@b",
    }.items():
        assert without_secrets(text) == shown
    data = {
        "hf_token": "x",
        "embed_token": 3.5,
        "nested": [{"private_key": ["x"], "name": "y"}],
        "none_token": None,
    }
    assert without_secrets(data) == {"embed_token": 3.5, "nested": [{"name": "y"}], "none_token": None}


def test_a_stream_without_secrets_is_a_stream(tmp_path):
    with open(tmp_path / "a", "w") as file:
        stream = Redacted(file)
        print("hf_" + "a" * 30, file=stream)
        assert stream.encoding == file.encoding and not stream.isatty()
    assert (tmp_path / "a").read_text() == "***\n"


def test_a_run_started_again_is_the_same_though_its_configuration_held_a_secret(
    tiny_model, text_file, tmp_path, monkeypatch
):
    from monosemy.config import TrainConfig
    from monosemy.jobs.plan import Plan

    folder = tmp_path / "hf_abcdefghijklmnopqrstuvw"
    folder.mkdir()
    (folder / "a.jsonl").write_text(text_file.read_text())
    settings = {
        "layers": (1,),
        "architectures": ("top_k",),
        "dictionary_widths": (48,),
        "target_l0s": (4,),
        "num_tokens": 6400,
    }
    config = TrainConfig(
        str(tmp_path / "run"),
        model_name=str(tiny_model),
        dataset=str(folder / "a.jsonl"),
        sae_batch_size=64,
        **settings,
    )
    written = without_secrets({"config": Plan.from_config(config).config.as_dict()})
    assert "hf_abc" not in json.dumps(written)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps(written))
    assert Plan.from_config(config).folder == tmp_path / "run"
