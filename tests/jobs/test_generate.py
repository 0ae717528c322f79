"""`monosemy generate`: both texts, told apart by the edit alone; the file for lm_eval; refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import monosemy
from monosemy import edit
from monosemy.cli import main
from tests.use.conftest import sae_of


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SAE of random weights that belongs to the tiny model."""
    path = tmp_path_factory.mktemp("sae") / "sae"
    sae_of("batch_top_k", 24).save_pretrained(path, {"model": str(tiny_model)})
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["generate", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def texts(out: str) -> tuple[str, str]:
    _, plain, edited = out.split("--- ")
    return plain.partition("\n")[2].strip(), edited.partition("\n")[2].strip()


def test_both_texts(folder: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = (folder, "--prompt", "the one that", "--tokens", 12, "--latent", "17=400", "--latent", "3+=80")
    code, out, _ = run(capsys, *how)
    plain, edited = texts(out)
    assert code == 0 and plain != edited and all(t.startswith("the one that ") for t in (plain, edited))
    assert "--- 17=400, 3+=80 (activations changed on 14 of 15 tokens)" in out
    assert run(capsys, *how)[1] == out and texts(run(capsys, *how, "--seed", 1)[1])[0] != plain
    # by hand
    lm = monosemy.LanguageModel.load(str(tiny_model), [], device="cpu", whole=True)
    tokenizer = monosemy.load_tokenizer(str(tiny_model))
    ids = monosemy.to_tokens(tokenizer, "the one that")
    edits = {monosemy.load(folder): {17: edit.set(400.0), 3: edit.add(80.0)}}
    before = torch.get_rng_state()
    greedy = texts(run(capsys, *how, "--temperature", 0)[1])
    assert torch.equal(torch.get_rng_state(), before)
    with monosemy.attached(lm, edits):
        out_ids = lm.model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=1)
    assert greedy[1] == tokenizer.decode(out_ids[0], skip_special_tokens=True)


def test_an_edit_that_changes_nothing_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    code, out, _ = run(capsys, folder, "--prompt", "the one", "--latent", "17*=1", "--tokens", 5)
    assert (
        code == 0
        and out.endswith("The texts are the same.\n")
        and len(set(texts(out.rpartition("\n\n")[0]))) == 1
    )
    assert "changed on 0 of 7 tokens" in out and "changed none of 7 tokens" in caplog.text
    code, out, _ = run(capsys, folder, "--prompt", "the one", "--latent", "17*=1", "--no-error", "--chat")
    assert code == 0 and "The texts are the same" not in out


def test_the_file_for_lm_eval(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "steer.pt"
    code, out, _ = run(capsys, folder, "--latent", "17+=4", "--lm_eval", file)
    assert code == 0 and f"{file}: add at layers.1\nlm_eval --model steered" in out
    entry = torch.load(file, weights_only=True)["layers.1"]
    assert torch.equal(entry["steering_vector"], 4 * monosemy.load(folder).W_dec[17].detach())
    assert "component" in run(capsys, folder, "--latent", "17=4", "--lm_eval", file)[1]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--latent 17 --prompt the", "LATENT=VALUE"),
        ("--latent 64=3 --prompt the", "0 to 63"),
        ("--latent 3=1 --latent 3=2 --prompt the", "one edit for each latent"),
        ("--latent 3=1", "--lm_eval FILE"),
        ("--latent 3=1 --prompt the --lm_eval x.pt", "--lm_eval FILE"),
        ("--latent 3=1 --prompt the --site resid_post.2", "resid_post.1, which"),
        ("--latent 3=1 --prompt the --model_name no/such/model", "a name on the hub"),
        ("--latent 3=1 --prompt the --tokens 0", "1 or more"),
        ("--latent 3=1 --prompt the --temperature -1", "0 for the likeliest token"),
        ("--latent 3*=2 --lm_eval steer.pt", "for lm_eval"),
    ],
)
def test_refusals(flags: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, folder, *flags.split())
    assert code == 2 and said in err and not out


def test_a_folder_that_does_not_say_where_it_belongs(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sae_of("top_k", 24, site=None).save_pretrained(tmp_path / "sae")
    how = (tmp_path / "sae", "--prompt", "the", "--latent", "3=9")
    code, _, err = run(capsys, *how)
    assert code == 2 and "a place that its folder or you name" in err
    code, _, err = run(capsys, *how, "--site", "resid_post.1")
    assert code == 2 and "--model_name NAME" in err
    code, _, err = run(capsys, *how, "--site", "resid_post.7", "--model_name", tiny_model)
    assert code == 2 and "0 to 2" in err
    assert run(capsys, *how, "--site", "resid_post.1", "--model_name", tiny_model)[0] == 0
