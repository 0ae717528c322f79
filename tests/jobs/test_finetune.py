"""The whole command: SAEs and transcoders finetuned together, saved, opened, evaluated and converted; equal
seeds; what is refused."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import monosemy
from monosemy.cli import main
from monosemy.lm.model import LanguageModel
from tests.conftest import write_text
from tests.jobs.broken_runs import SMALL, contents

KINDS = ("top_k", "batch_top_k", "jump_relu", "standard")
SITE = "resid_post_layer_1"
PAIR = "mlp_in_layer_1_to_mlp_out_layer_1"
SHORT = ["--num_tokens", "1500", "--sae_batch_size", "96", "--log_steps", "1"]


@pytest.fixture(scope="module")
def run(tiny_model, text_file, tmp_path_factory):
    """A run of autoencoders."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    model = ["--model_name", str(tiny_model), "--dataset", str(text_file), "--layers", "1"]
    assert main(["train", "--save_dir", str(folder), *model, "--architectures", *KINDS, *SMALL]) == 0
    return folder


@pytest.fixture(scope="module")
def transcoders(tiny_model, text_file, tmp_path_factory):
    """A run of transcoders with a skip connection."""
    folder = tmp_path_factory.mktemp("runs") / "set"
    model = ["--model_name", str(tiny_model), "--dataset", str(text_file), "--layers", "1"]
    kind = ["--transcode", "mlp", "--skip_connection", "--architectures", "batch_top_k"]
    assert main(["train", "--save_dir", str(folder), *model, *kind, *SMALL]) == 0
    return folder


@pytest.fixture(scope="module")
def finetuned(run, transcoders, tmp_path_factory):
    """All of both, together."""
    out = tmp_path_factory.mktemp("out") / "finetuned"
    assert main(["finetune", str(run), str(transcoders), "--save_dir", str(out), *SHORT]) == 0
    return out


def folders(out: Path) -> list[Path]:
    return sorted(path.parent for path in out.glob("*/trainer_*/sae.safetensors"))


def test_every_sae_comes_back_as_what_it_was(finetuned, run, transcoders, tiny_model, text_file):
    names = [f"{SITE}/trainer_{i}" for i in range(4)] + [f"{PAIR}/trainer_0"]
    assert [path.relative_to(finetuned).as_posix() for path in folders(finetuned)] == sorted(names)
    for name in names:
        before = monosemy.load((transcoders if name.startswith(PAIR) else run) / name)
        after = monosemy.load(finetuned / name)
        assert type(after) is type(before) and after.settings == before.settings
        changed = {
            key for key, tensor in before.state_dict().items() if not tensor.equal(after.state_dict()[key])
        }
        assert {"W_enc", "W_dec", "b_dec"} <= changed
        assert 0 < (after.W_enc - before.W_enc).norm() < 0.1 * before.W_enc.norm()
        (how,) = after.metadata["finetuned"]
        assert how["kl_weight"] == 1 and how["lr"] == 3e-4 and how["dataset"] == str(text_file)
        assert how["model"] == after.metadata["model"] == str(tiny_model)
        assert how["steps"] == 16 and 1000 < how["tokens"] <= 1500
        kept = ("site", "lr", "tokens", "norm_factor", "seed", "buffer")
        assert {key: before.metadata[key] for key in kept} == {key: after.metadata[key] for key in kept}
    facts = json.loads((finetuned / "finetune.json").read_text())
    assert facts["status"] == "complete" and facts["config"]["paths"] == [str(run), str(transcoders)]


def test_records_are_of_every_step(finetuned):
    records = [json.loads(line) for line in (finetuned / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == sorted(list(range(16)) * 5)
    for record in records:
        assert record["kl"] > 0 and record["alpha"] > 0 and 0 < record["fvu"] < 2


def test_the_tools_take_the_result(finetuned, run, tmp_path):
    saes = [str(path) for path in folders(finetuned)]
    rows = tmp_path / "rows.jsonl"
    text = ["--dataset", json.loads((run / "run.json").read_text())["config"]["dataset"]]
    sizes = ["--context_length", "16", "--eval_num_inputs", "20", "--rows", str(rows)]
    before = str(run / SITE / "trainer_1")
    assert main(["eval", before, *saes, *text, *sizes]) == 0
    found = {row["sae"]: row for row in map(json.loads, rows.read_text().splitlines())}
    assert list(found) == [before, *saes] and all(row["kl"] > 0 for row in found.values())
    for to in ("native", "sae_lens"):
        assert main(["convert", saes[1], str(tmp_path / to), "--to", to]) == 0
        assert (
            monosemy.load(tmp_path / to).metadata["finetuned"] == monosemy.load(saes[1]).metadata["finetuned"]
        )
    again = ["--save_dir", str(tmp_path / "again"), *SHORT, *text, "--context_length", "16"]
    assert main(["finetune", saes[1], *again, "--kl_weight", "0"]) == 0
    twice = monosemy.load(tmp_path / "again" / SITE / "trainer_0").metadata["finetuned"]
    assert [how["kl_weight"] for how in twice] == [1, 0]


def test_a_single_transcoder_of_a_run_is_evaluated(transcoders, tmp_path):
    assert main(["eval", str(transcoders / PAIR / "trainer_0"), "--rows", str(tmp_path / "rows")]) == 0
    assert json.loads((tmp_path / "rows").read_text())["kl"] > 0


def test_equal_seeds_give_equal_bits_whatever_is_beside(run, finetuned, tmp_path):
    for out, more in (("same", []), ("other", ["--data_seed", "1"])):
        flags = ["--save_dir", str(tmp_path / out), *SHORT, *more]
        assert main(["finetune", str(run / SITE / "trainer_1"), *flags]) == 0
    sae, same, other = (
        (folder / SITE / name / "sae.safetensors").read_bytes()
        for folder, name in (
            (finetuned, "trainer_1"),
            (tmp_path / "same", "trainer_0"),
            (tmp_path / "other", "trainer_0"),
        )
    )
    assert sae == same != other


def test_the_size_of_a_forward_changes_rounding_alone(run, finetuned, tmp_path):
    flags = ["--save_dir", str(tmp_path / "out"), *SHORT, "--llm_batch_size", "1"]
    assert main(["finetune", str(run / SITE / "trainer_0"), *flags]) == 0
    for name, tensor in monosemy.load(tmp_path / "out" / SITE / "trainer_0").state_dict().items():
        torch.testing.assert_close(
            tensor, monosemy.load(finetuned / SITE / "trainer_0").state_dict()[name], rtol=1e-3, atol=1e-4
        )


def test_by_squared_error_on_another_model_and_text(run, tiny_model, tmp_path):
    """A fine-tuned model: the folder then says that one."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    other = AutoModelForCausalLM.from_pretrained(model)
    other.model.layers[0].mlp.down_proj.weight.data *= 1.5
    other.save_pretrained(model)
    text = write_text(tmp_path / "chat.jsonl", seed=5)
    flags = ["--model_name", str(model), "--dataset", str(text), "--context_length", "20", "--kl_weight", "0"]
    out = tmp_path / "out"
    assert main(["finetune", str(run / SITE / "trainer_0"), "--save_dir", str(out), *SHORT, *flags]) == 0
    sae = monosemy.load(out / SITE / "trainer_0")
    assert sae.metadata["model"] == str(model) == sae.metadata["finetuned"][0]["model"]
    assert sae.metadata["finetuned"][0]["dataset"] == str(text)
    assert "kl" not in json.loads((out / "metrics.jsonl").read_text().splitlines()[0])


def test_another_tools_sae(run, tmp_path, text_file):
    """Whose folder says neither penalty nor scale; its decoder's rows are not unit vectors."""
    for name in ("trainer_2", "trainer_3"):
        theirs = tmp_path / name
        assert main(["convert", str(run / SITE / name), str(theirs), "--to", "sae_lens"]) == 0
        (theirs / "monosemy.json").unlink()
    text = ["--dataset", str(text_file), "--context_length", "16"]
    model = ["--model_name", json.loads((run / "run.json").read_text())["config"]["model_name"]]
    both = [str(tmp_path / name) for name in ("trainer_2", "trainer_3")]
    assert main(["finetune", *both, "--save_dir", str(tmp_path / "out"), *SHORT, *text, *model]) == 0
    for name, path in zip(("trainer_0", "trainer_1"), both, strict=True):
        before, after = monosemy.load(path), monosemy.load(tmp_path / "out" / SITE / name)
        assert after.metadata["origin"]["format"] == "sae_lens" and after.name == before.name
        assert 0 < (after.W_enc - before.W_enc).norm() < 0.1 * before.W_enc.norm()


def test_text_that_runs_out_saves_what_was_trained(run, tmp_path, capsys):
    text = write_text(tmp_path / "short.jsonl", documents=10)
    flags = [*SHORT, "--num_tokens", "100000", "--dataset", str(text)]
    assert main(["finetune", str(run / SITE / "trainer_0"), "--save_dir", str(tmp_path / "out"), *flags]) == 3
    folder = tmp_path / "out" / SITE / "trainer_0"
    config = json.loads((folder / "config.json").read_text())
    assert config["status"] == "stopped_early" and 0 < config["finetuned"][0]["steps"] < 1000
    with pytest.raises(ValueError, match="stopped_early"):
        monosemy.load(folder)
    assert monosemy.load(folder, unfinished=True).d_sae == 48


@pytest.mark.parametrize(
    ("paths", "more", "said"),
    [
        ([], [], "paths"),
        (["nothing/here/at/all"], [], "name_or_path|folder|hub"),
        (["SAE", "OTHER"], [], "model_name"),
        (["PLACELESS"], [], "site"),
        (["SAE"], ["--site", "mlp_out.1"], "site"),
        (["PLACELESS"], ["--site", "mlp_in.1:mlp_out.1"], "site"),
        (["PLACELESS"], ["--layer", "7"], "layers"),
        (["SAE"], ["--num_tokens", "40"], "num_tokens"),
        (["SAE"], ["--kl_weight", "-1"], "kl_weight"),
        (["SAE"], ["--lr", "0"], "lr"),
        (["SAE"], ["--save_dir", "FULL"], "save_dir"),
        (["SAE"], ["--dataset", "no_such_file.jsonl"], "dataset"),
    ],
)
def test_what_cannot_be_is_told_before_weights_are_loaded(
    run, tmp_path, capsys, monkeypatch, paths, more, said
):
    monkeypatch.setattr(LanguageModel, "load", lambda *_, **__: pytest.fail("weights were loaded"))
    sae = run / SITE / "trainer_0"
    for name, changes in (("OTHER", {"model": "another/model"}), ("PLACELESS", {"site": None})):
        shutil.copytree(sae, tmp_path / name)
        config = json.loads((sae / "config.json").read_text()) | changes
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "file").touch()
    named = {"SAE": str(sae)} | {name: str(tmp_path / name) for name in ("OTHER", "PLACELESS", "FULL")}
    flags = [named.get(word, word) for word in more]
    out = [] if "--save_dir" in more else ["--save_dir", str(tmp_path / "out")]
    size = [] if "--num_tokens" in more else SHORT
    assert main(["finetune", *(named.get(path, path) for path in paths), *out, *size, *flags]) == 2
    assert re.search(said, capsys.readouterr().err) and not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "FULL").iterdir()] == ["file"]


def test_an_sae_of_another_width_is_refused(run, tmp_path, capsys):
    monosemy.fit(
        [torch.randn(64, 16, generator=torch.Generator().manual_seed(0))] * 4,
        [monosemy.SAESpec("top_k", 32, settings={"k": 4})],
    ).saes[0].save_pretrained(tmp_path / "narrow")
    config = json.loads((run / "run.json").read_text())["config"]
    flags = ["--model_name", config["model_name"], "--dataset", config["dataset"], "--context_length", "16"]
    out = ["--save_dir", str(tmp_path / "out"), *SHORT]
    assert main(["finetune", str(tmp_path / "narrow"), *out, *flags, "--layer", "1"]) == 2
    assert "d_in" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_interrupted_finetune_leaves_nothing(faulty, run, tmp_path):
    argv = ["finetune", str(run / SITE / "trainer_0"), "--save_dir", str(tmp_path / "out"), *SHORT]
    end = faulty(argv=argv, at=["open", ".metrics.jsonl.part", 1], signal=signal.SIGTERM)
    # Ctrl-C goes the same way, but a suite that runs in the background would ignore it
    assert end.code == 143 and contents(tmp_path) == {}
