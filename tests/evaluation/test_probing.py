"""The parts of sparse probing that are ours; peers/test_sae_probes.py has the whole."""

import importlib.util
import json

import pytest
import torch

from monosemy import cli
from monosemy.evaluation import probing
from monosemy.lm.info import Site
from monosemy.lm.model import LanguageModel, load_tokenizer


def test_a_text_is_read_at_its_last_token_whatever_is_beside_it(tiny_model, monkeypatch):
    monkeypatch.setattr(probing, "LENGTH", 9)
    sites = (Site.parse("resid_post.1"), Site.parse("mlp_out.2"))
    lm, tokenizer = LanguageModel.load(str(tiny_model), sites, device="cpu"), load_tokenizer(str(tiny_model))
    texts = ["the cat", "to have and have not", "a", " ".join(["one", "had", "the", "by"] * 5)]
    found = probing._last_tokens(lm, sites, tokenizer, texts, batch_size=3)
    for i, text in enumerate(texts):
        ids = tokenizer.convert_tokens_to_ids(["<bos>", *text.split()[-8:]])
        alone = lm.activations(torch.tensor([ids]))
        for site in sites:
            assert torch.allclose(found[site][i], alone[site][0, -1], atol=1e-5)
    assert not torch.allclose(found[sites[0]][0], found[sites[0]][2], atol=1e-2)


def test_means_are_over_the_pairs_of_classes(tmp_path):
    for i, name in enumerate(("a", "b")):
        entries = [
            {"k": k, "test_acc": 0.5 + i / 10, "test_auc": k / 10 + i / 10, "test_f1": 0.25} for k in (1, 5)
        ]
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.json").write_text(json.dumps(entries))
    means = probing._means(tmp_path, {1: "top_1", 5: "top_5"})
    assert means["probing_auc_top_1"] == pytest.approx(0.15) and means["probing_auc_top_5"] == pytest.approx(
        0.55
    )
    assert means["probing_accuracy_top_5"] == pytest.approx(0.55) and len(means) == 6


@pytest.mark.skipif(importlib.util.find_spec("sae_probes") is not None, reason="sae-probes is installed")
def test_without_its_package_it_says_which(tmp_path, capsys):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text("")
    assert cli.main(["eval", str(tmp_path), "--sparse_probing"]) == 2
    assert "pip install 'monosemy[probing]'" in capsys.readouterr().err


def test_it_is_for_one_run(tmp_path, capsys):
    assert cli.main(["eval", str(tmp_path), "--sparse_probing"]) == 2
    assert "sparse_probing" in capsys.readouterr().err
