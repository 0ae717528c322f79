"""Configurations that cannot be, in one process: from Python, from a file and from flags.

Each is refused before weights load.
"""

from __future__ import annotations

import json

import pytest

import monosemy
from monosemy.cli import main
from monosemy.config import TrainConfig

# setting, value as JSON has it, what the error says is allowed, a word of the remedy
BAD = [
    ("num_tokens", "many", "a whole number", "type"),
    ("num_tokens", 6400.5, "a whole number", "type"),
    ("num_tokens", True, "a whole number", "type"),
    ("num_tokens", None, "a whole number", "type"),
    ("layers", 1, "a list, each a whole number", "type"),
    ("layers", ["1"], "a list, each a whole number", "type"),
    ("layers", [[1]], "a list, each a whole number", "type"),
    ("layers", [10**30], "0 to 2", "from 0"),
    ("architectures", "top_k", "a list, each text", "type"),
    ("architectures", [], "at least one", "name one"),
    ("architectures", ["../top_k"], "batch_top_k", "correct"),
    ("architectures", ["__init__"], "batch_top_k", "correct"),
    ("dictionary_widths", [48.0], "a list, each a whole number", "type"),
    ("dictionary_widths", [48, 48], "different values", "repeated"),
    ("learning_rates", ["1e-3"], "a list, each a number", "type"),
    ("learning_rates", [-1e-3], "a number above 0", "raise"),
    ("random_seeds", [], "at least one", "name one"),
    ("target_l0s", [], "at least one", "name one"),
    ("dtype", "int8", "auto or float32", "type"),
    ("precision", 16, "auto or float32", "type"),
    ("recipe", "mine", "monosemy or dictionary_learning", "type"),
    ("on_nonfinite", "", "stop or skip", "type"),
    ("use_wandb", "yes", "true or false", "type"),
    ("use_wandb", 1, "true or false", "type"),
    ("save_dir", "", "a folder's path", "name one"),
    ("save_dir", None, "text", "type"),
    ("device", "cuda:x", "cuda:N", "correct"),
    ("device", "mps", "kernels are made for these", "cpu"),
    ("device", "xpu:0", "cuda:N", "cpu"),
    ("revision", "../../main", "a branch, tag or commit", "correct"),
    ("text_key", "", "the name of a field", "holds the text"),
    ("chat_key", "", "the name of a field", "holds the text"),
    ("context_length", -3, "2 or more", "raise"),
    ("eval_spliced_inputs", 0, "1 or more", "raise"),
    ("checkpoint_every", 0, "1 or more", "raise"),
    ("retry_seconds", [1, -1], "0 or more", "correct"),
    ("retry_seconds", [float("inf")], "0 or more", "correct"),
    ("auxk_alpha", float("nan"), "0 or more", "lower"),
    ("max_activation_norm_multiple", float("inf"), "0 or more", "lower"),
    ("sparsity_penalty", float("nan"), "a number above 0", "raise"),
    ("held_out_fraction", float("nan"), "0 to 1", "share"),
    ("dataset", "https://me:hunter2hunter2@host/a.jsonl", "a file or folder that exists", "check the path"),
    ("sites", ["../../etc/passwd"], "a module's path", "resid_post.3"),
    ("init_from", "/proc/self", "the folder of a trained SAE", "name one"),
]
TOGETHER = [
    (
        {"architectures": ["matryoshka_batch_top_k"], "group_fractions": [0.5, 0.4]},
        "group_fractions",
        "sum to 1",
    ),
    (
        {"architectures": ["matryoshka_batch_top_k"], "group_fractions": [0.001, 0.999]},
        "group_fractions",
        "widen",
    ),
    ({"architectures": ["matryoshka_batch_top_k"], "group_fractions": []}, "group_fractions", "()"),
    ({"mixed_dataset": True, "pretrain_frac": 1.0}, "pretrain_frac", "1.0"),
    ({"mixed_dataset": True, "pretrain_frac": 0}, "pretrain_frac", "below 1"),
    ({"use_wandb": True, "wandb_project": "a/b"}, "wandb_project", "a/b"),
    ({"no_such_setting": 1}, "config", "no_such_setting"),
]


@pytest.fixture
def settings(tiny_model, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "transformers.PreTrainedModel.from_pretrained", lambda *a, **k: pytest.fail("weights were loaded")
    )
    base = {
        "save_dir": str(tmp_path / "run"),
        "model_name": str(tiny_model),
        "dataset": str(text_file),
        "layers": [1],
    }
    return base | {
        "architectures": ["top_k"],
        "dictionary_widths": [48],
        "target_l0s": [4],
        "num_tokens": 6400,
        "sae_batch_size": 64,
    }


def refused_from_a_file(settings, tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"config": settings}))
    assert main(["train", "--config", str(path)]) == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run.json"]
    return capsys.readouterr().err


@pytest.mark.parametrize(("field", "value", "allowed", "remedy"), BAD, ids=[f"{b[0]}={b[1]!r}" for b in BAD])
def test_a_setting_that_cannot_be(settings, tmp_path, capsys, field, value, allowed, remedy):
    with pytest.raises(ValueError) as error:
        monosemy.train(TrainConfig(**(settings | {field: value})))
    said = str(error.value)
    assert field.rstrip("s") in said and allowed in said and remedy in said.lower(), said
    shown = str(value[-1] if value else "()") if isinstance(value, list) else str(value)
    assert "hunter2" not in said and shown.rpartition("@")[2] in said, said
    assert refused_from_a_file(settings | {field: value}, tmp_path, capsys).startswith(f"error: {said}")


@pytest.mark.parametrize(("changes", "field", "word"), TOGETHER, ids=lambda v: str(v)[:60])
def test_settings_that_cannot_be_together(settings, tmp_path, capsys, changes, field, word):
    said = refused_from_a_file(settings | changes, tmp_path, capsys)
    assert said.startswith(f"error: {field} is ") and word in said


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"{", b"\xff\xfe", b'{"config": []}', b"[" * 100_000, b'{"layers": [1]}']
)
def test_a_file_that_is_no_configuration(tmp_path, capsys, content):
    path = tmp_path / "run.json"
    path.write_bytes(content)
    assert main(["train", "--config", str(path), "--save_dir", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert (
        said.startswith("error: config is ")
        and "a run.json that an earlier run wrote" in said
        and "Traceback" not in said
    )


def test_paths_from_python_are_taken(settings, tmp_path):
    assert TrainConfig(**(settings | {"save_dir": tmp_path / "run"})).save_dir == str(tmp_path / "run")
