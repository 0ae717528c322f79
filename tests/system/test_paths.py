"""Names that try to be paths: what users, folders and repositories call things stays where it belongs, or is
refused."""

from __future__ import annotations

import json
import os
import shutil
import unicodedata
from pathlib import Path

import pytest

from monosemy.cli import main
from monosemy.data.sources import local_files
from monosemy.jobs import hub
from monosemy.lm.info import Site
from monosemy.lm.model import LanguageModel

LONG = "x" * 300
FLAGS = (
    "--layers 1 --architectures top_k --dictionary_widths 48 --target_l0s 4 --num_tokens 6400 "
    "--sae_batch_size 64 --dry_run"
)


def everything(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.fixture
def plan(tiny_model, text_file, tmp_path, monkeypatch, capsys):
    """Plans a run from inside an empty folder; its exit code, what it says, and that nothing was written."""
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def plan(**changed):
        named = {"save_dir": "saes", "model_name": str(tiny_model), "dataset": str(text_file)} | changed
        before = everything(tmp_path)
        code = main(["train", *FLAGS.split(), *(f"--{name}={value}" for name, value in named.items())])
        assert everything(tmp_path) == before
        said = capsys.readouterr()
        return code, said.out + said.err

    return plan


REFUSED = [
    ("save_dir", "a\0b"),
    ("save_dir", LONG),
    ("save_dir", "~nobody_of_this_name/saes"),
    ("save_dir", "{file}"),
    ("save_dir", "{file}/inside"),
    ("save_dir", "{loop}"),
    ("save_dir", "{nowhere}"),
    ("save_dir", "\udcff"),
    ("dataset", "a\0b.jsonl"),
    ("dataset", f"{LONG}.jsonl"),
    ("dataset", "../../etc/passwd"),
    ("dataset", "/etc/passwd"),
    ("dataset", "~nobody_of_this_name/a.jsonl"),
    ("dataset", "{loop}"),
    ("dataset", "owner/../name"),
    ("model_name", "../../etc"),
    ("model_name", "a\0b"),
    ("model_name", LONG * 20),
    ("model_name", "/dev/null"),
    ("init_from", "a\0b"),
    ("hf_repo_id", "../.."),
    ("hf_repo_id", "me/.."),
    ("hf_repo_id", "me/\uff53aes"),  # a full-width s
    ("hf_repo_id", "me/saes/../x"),
    ("revision", "../refs/heads/main"),
    ("sites", "model..layers"),
    ("sites", "../model"),
]


@pytest.mark.parametrize(
    ("field", "value"), REFUSED, ids=[f"{field}={value[:24]!r}" for field, value in REFUSED]
)
def test_a_name_that_cannot_be_is_refused(plan, tmp_path, field, value):
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "nowhere").symlink_to(tmp_path / "no" / "such" / "folder")
    value = value.format(**{name: tmp_path / name for name in ("file", "loop", "nowhere")})
    code, said = plan(**{field: value})
    assert code == 2 and f"{field.rstrip('s')}" in said and "Traceback" not in said, said


@pytest.mark.parametrize(
    "name", ["..", "%2e%2e%2fx", "\uff0e\uff0e\uff0fx", "a b;rm -rf", "-rf", "naïve/résumé", "saes/../saes2"]
)
def test_a_run_goes_to_the_folder_that_was_named_and_to_no_other(plan, name, tmp_path):
    code, said = plan(save_dir=name)
    if name == "..":  # which holds other files
        assert code == 2 and "other files" in said
    else:
        folder = next(line for line in said.splitlines() if line.startswith("folder: "))
        assert code == 0 and unicodedata.normalize("NFC", folder) == f"folder: {Path(name)}"


@pytest.mark.parametrize("kept", ["../../escaped", "/abs/olute", "a/../../b", "x" * 150])
def test_a_run_beside_another_is_beside_it_whatever_the_names(plan, tmp_path, kept):
    """The folder's name is made of this run's model and architectures; the other's names are only told."""
    (tmp_path / "home" / "saes").mkdir()
    (tmp_path / "home" / "saes" / "run.json").write_text(
        json.dumps({"config": {"model_name": kept, "architectures": [kept]}})
    )
    code, said = plan()
    folder = Path(
        next(line for line in said.splitlines() if line.startswith("folder: ")).removeprefix("folder: ")
    )
    assert (
        code == 0
        and folder.parent == Path(".")
        and folder.name.startswith("saes_")
        and "/" not in folder.name
    )


@pytest.mark.parametrize(
    "kept", ["null", "[]", '{"config": 5}', '{"config": {"architectures": 5}}', "[" * 9000]
)
def test_a_run_json_that_makes_no_sense(plan, tmp_path, kept):
    (tmp_path / "home" / "saes").mkdir()
    (tmp_path / "home" / "saes" / "run.json").write_text(kept)
    code, said = plan()
    assert (code == 2 and "save_dir" in said) or "this run goes to" in said
    assert "Traceback" not in said


def test_sites_are_folders_of_their_own():
    for name in ("resid_post.3", "model.layers.3.mlp.down_proj", "lm_head", "blocks.0.hook_mlp_out"):
        assert Path(Site.parse(name).folder).name == Site.parse(name).folder
    for name in ("..", "a/b", "a\0b", "/abs", "a..b", ".a", "a.", "\u0430/b", ""):
        with pytest.raises(ValueError, match="site is"):
            Site.parse(name)


# ------------------------------------------------------------------------------------------------------- what


def test_a_model_s_own_code_is_not_run(tiny_model, tmp_path):
    """A folder whose config.json and tokenizer name classes in a Python file beside them."""
    folder, canary = tmp_path / "model", tmp_path / "canary"
    shutil.copytree(tiny_model, folder)
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
    for name, entries in (
        ("config.json", ("AutoConfig", "AutoModelForCausalLM")),
        ("tokenizer_config.json", ("AutoTokenizer",)),
    ):
        config = json.loads((folder / name).read_text())
        config["auto_map"] = {
            entry: ["evil.Evil", None] if entry == "AutoTokenizer" else "evil.Evil" for entry in entries
        }
        (folder / name).write_text(json.dumps(config))
    lm = LanguageModel.load(str(folder), [Site("resid_post", 0)])
    assert type(lm.model).__module__.startswith("transformers.") and not canary.exists()
    config["model_type"] = "evil"
    (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | {"model_type": "evil"})
    )
    with pytest.raises(ValueError):
        LanguageModel.load(str(folder), [Site("resid_post", 0)])
    assert not canary.exists()


def test_a_data_set_s_own_code_is_not_run(tmp_path):
    folder, canary = tmp_path / "texts", tmp_path / "canary"
    folder.mkdir()
    (folder / "texts.py").write_text(f"open({str(canary)!r}, 'w')\n")
    with pytest.raises(ValueError, match="dataset is"):
        local_files(str(folder))
    assert not canary.exists()


@pytest.mark.parametrize("link", ["README.md", "plots/x.png", "resid_post_layer_3/trainer_0/ae.pt"])
def test_a_link_out_of_a_run_is_not_uploaded(tmp_path, link):
    (tmp_path / "run" / link).parent.mkdir(parents=True)
    (tmp_path / "secret").write_text("x")
    (tmp_path / "run" / link).symlink_to(tmp_path / "secret")
    with pytest.raises(hub.UploadFailed, match="is a link out of the run's folder.*put a copy in its place"):
        hub.upload(tmp_path / "run", "me/saes", waits=())


def test_a_folder_outside_the_run_is_not_uploaded(tmp_path):
    (tmp_path / "run").mkdir()
    for sae in ("..", "../other", "/etc"):
        (tmp_path / "other").mkdir(exist_ok=True)
        with pytest.raises(hub.UploadFailed, match="is not inside"):
            hub.upload(tmp_path / "run" / sae, "me/saes", run_folder=tmp_path / "run", waits=())


def test_a_card_is_not_written_through_a_link(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run" / "README.md").symlink_to(tmp_path / "precious")
    with pytest.raises(hub.UploadFailed):
        hub.push(tmp_path / "run", "me/saes", waits=())
    assert (tmp_path / "precious").read_text() == "mine" and os.path.islink(tmp_path / "run" / "README.md")
