"""SAEs on activations that no language model made: rows equal a recount, whatever the batches, and a page
without text."""

import base64
import gzip
import json
import re

import numpy as np
import pytest
import torch

import monosemy
from monosemy.architectures.batch_top_k import BatchTopK
from monosemy.architectures.standard import Standard
from monosemy.cli import main
from monosemy.evaluation import metrics
from monosemy.evaluation.on_model import evaluate_on_model
from monosemy.lm.info import Site
from monosemy.lm.model import LanguageModel
from monosemy.report import of_batches

D, F, N = 12, 40, 5000


@pytest.fixture(scope="module")
def x_ND():
    draw = torch.Generator().manual_seed(0)
    return 300 + torch.randn(N, D, generator=draw) * torch.linspace(0.1, 3, D)


@pytest.fixture(scope="module")
def saes():
    made = {"a": BatchTopK(D, F, k=5), "b": Standard(D, 2 * F)}
    for sae in made.values():
        sae.reset(torch.Generator().manual_seed(1))
        sae.requires_grad_(False)
    made["a"].threshold.fill_(0.5)
    for sae in made.values():
        list(sae.parameters())[-1].fill_(300.0)
    return made


def test_a_row_equals_a_recount(saes, x_ND):
    rows = monosemy.evaluate(saes, x_ND.split(700))
    assert [row["sae"] for row in rows] == ["a", "b"] and json.loads(
        json.dumps(rows, allow_nan=False)
    ) == rows
    for row, sae in zip(rows, saes.values(), strict=True):
        f, x = sae.encode(x_ND).double(), x_ND.double()
        hat = sae.decode(sae.encode(x_ND)).double()
        squares = (x - x.mean(0)).square().sum()
        expected = {
            "tokens": N,
            "l0": (f != 0).sum(1).double().mean(),
            "fvu": (x - hat).square().sum() / squares,
            "mse": (x - hat).square().sum(1).mean(),
            "frac_variance_explained": 1 - (x - hat).var(0).sum() / x.var(0).sum(),
            "cossim": torch.cosine_similarity(x, hat).mean(),
            "frac_alive": (f != 0).any(0).double().mean(),
            "never_fired": (~(f != 0).any(0)).sum(),
        }
        for key, value in expected.items():
            assert row[key] == pytest.approx(float(value), rel=1e-4), key
        assert (
            row["unit"] == "rows"
            and row["site"] == "activations"
            and sum(row["firing_counts"]) == sae.d_sae - row["never_fired"]
        )
        assert {"near_copies", "copies", "encoder_decoder_cosine", "sparsity"} <= row.keys()
        assert not {"kl", "ce_diff", "loss_recovered_zero"} & row.keys()
    assert (
        rows[0]["top_k_l0"] == pytest.approx(5, abs=0.01)
        and "top_k_l0" not in rows[1]
        and rows[0]["sparsity"] == 5
    )


def test_the_size_of_batches_does_not_show(saes, x_ND):
    rows = [
        monosemy.evaluate(saes, batches)
        for batches in (x_ND.split(64), [x_ND], iter(x_ND.split(999)), (x for x in x_ND.split(2048)))
    ]
    assert all(row == rows[0] for row in rows)


def test_saes_come_alone_in_a_list_or_by_name(saes, x_ND):
    (alone,) = monosemy.evaluate(saes["b"], [x_ND])
    first, second = monosemy.evaluate(list(saes.values()), [x_ND], site="layer 3 of a ViT")
    assert (alone["sae"], first["sae"], second["sae"]) == ("sae_0", "sae_0", "sae_1") and second[
        "site"
    ] == "layer 3 of a ViT"
    assert second | {"sae": "sae_0", "site": "activations"} == alone


def test_columns_are_those_of_a_language_model_s_rows_without_losses(tiny_model):
    site = Site("resid_post", 1)
    lm = LanguageModel.load(str(tiny_model), [site], whole=True)
    contexts_CL = torch.randint(3, 30, (40, 16), generator=torch.Generator().manual_seed(0))
    sae = BatchTopK(24, 48, k=4)
    sae.reset(torch.Generator().manual_seed(0))
    sae.threshold.fill_(0.1)
    (through,) = evaluate_on_model(lm, {"sae_0": (site, sae)}, contexts_CL, ignore_ids=torch.tensor([0]))
    (own,) = monosemy.evaluate(sae, [lm.activations(contexts_CL)[site][:, 1:].flatten(0, 1)], site=str(site))
    shared = through.keys() & own.keys()
    assert {"l0", "fvu", "cossim", "frac_alive", "firing_counts", "threshold_flag", "top_k_fvu"} <= shared
    for key in shared - {"layer"}:
        close = isinstance(own[key], float) and not isinstance(own[key], bool)
        assert own[key] == (pytest.approx(through[key], rel=1e-4) if close else through[key]), key
    losses = re.compile(r"loss_(original|reconstructed|zero|recovered.*)|frac_recovered|(ce|kl)(_.*)?")
    assert all(
        losses.fullmatch(key.removeprefix("top_k_"))
        for key in through.keys() - shared - {"n_inputs", "context_length", "spliced_tokens"}
    )


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ([], "batches is 'empty'"),
        ([torch.zeros(3, D + 1)], r"batches\[0\] is \(3, 13\); allowed: a tensor \[B, 12\]"),
        ([torch.zeros(2, 3, D)], "Flatten leading dimensions"),
        ([torch.zeros(3, D), np.zeros((3, D))], r"batches\[1\]"),
        ([torch.full((3, D), torch.nan)], "not finite"),
    ],
)
def test_batches_that_cannot_be(saes, batches, said):
    with pytest.raises(ValueError, match=said):
        monosemy.evaluate(saes, batches)


def test_saes_that_cannot_be(saes, x_ND):
    for wrong, said in (
        ([], "at least one"),
        (["x"], "an SAE"),
        ([saes["a"], Standard(D + 1, F)], "one d_in"),
    ):
        with pytest.raises(ValueError, match=said):
            monosemy.evaluate(wrong, [x_ND])


def test_variance_survives_a_large_mean():
    x_ND = 1e4 + 1e-2 * torch.randn(6000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spread = metrics._Spread()
    for part in x_ND.split(1000):
        spread.add(part)
    assert spread.variances([3]) == [pytest.approx(float((x_ND - x_ND.mean(0)).square().sum()), rel=1e-9)]


# --- the report


def unpacked(text, name):
    layout = json.loads(
        re.search(r'<script type="application/json" id="layouts">(.*?)</script>', text, re.S)[1]
    )[name]
    raw = gzip.decompress(base64.b64decode(re.search(rf'id="block-{name}">(.*?)</script>', text, re.S)[1]))
    columns = {}
    for column, kind, shape, first in layout:
        size, count = int(kind[1]), int(np.prod(shape))
        columns[column] = (
            np.frombuffer(raw, np.uint8, count * size, first)
            .reshape(size, count)
            .T.copy()
            .view(kind)
            .reshape(shape)
        )
    return columns


def test_a_report_has_what_latents_do_and_no_text(saes, x_ND, tmp_path):
    path = monosemy.write_report(tmp_path / "report", saes, x_ND.split(512), site="a simulator", pages=10)
    text = path.read_text()
    rows = [json.loads(line) for line in (path.parent / "rows.jsonl").read_text().splitlines()]
    assert rows == monosemy.evaluate(saes, [x_ND], site="a simulator")
    assert (
        "held-out rows" in text
        and "on activations of your own" in text
        and "Missing from this page" not in text
    )
    packed, f = unpacked(text, "sae0"), saes["a"].encode(x_ND)
    assert (packed["count"] == (f > 0).sum(0).numpy()).all() and len(packed["page_latent"]) == 10
    np.testing.assert_allclose(packed["max"], f.amax(0), rtol=2.0**-12)
    for p, latent in enumerate(packed["page_latent"]):
        strongest = f[:, latent].sort(descending=True, stable=True).indices[:8]
        assert packed["page_rows"][p].tolist() == [int(i) if f[i, latent] > 0 else -1 for i in strongest]
    assert (
        not {"page_at", "page_shade", "peak_token", "page_promotes"} & packed.keys()
        and not unpacked(text, "text0")["token_ids"].size
    )
    assert {p.stem for p in (path.parent / "plots").glob("*.png")} == {"fvu", "alive", "firing_frequencies"}
    assert main(["report", str(path.parent)]) == 0 and path.read_text() == text
    assert monosemy.write_report(path.parent, saes["a"], [x_ND]) == path and "sae_0" in path.read_text()


def test_what_fit_gives_brings_its_curves(x_ND, tmp_path):
    fitted = monosemy.fit(
        x_ND.split(100), [monosemy.SAESpec("top_k", d_sae=24, settings={"k": 3})], log_steps=10
    )
    path = monosemy.write_report(tmp_path / "report", fitted, x_ND.split(100))
    assert (tmp_path / "report" / "plots" / "training_curves.png").is_file()
    assert json.loads(unpacked(path.read_text(), "overview")["json"].tobytes())["saes"][0]["curves"]["loss"]


def test_an_sae_that_fails_costs_no_other(saes, x_ND, tmp_path, caplog):
    class Broken(Standard):
        def activation(self, pre_BF, latents):
            raise RuntimeError("broken on purpose")

    text = monosemy.write_report(tmp_path / "report", saes | {"c": Broken(D, F)}, [x_ND]).read_text()
    assert "row of c (RuntimeError: broken on purpose)" in caplog.text and text.count("<tr data-number") == 2
    assert "Missing from this page: row of c" in text


def test_other_folders_and_names_are_refused(saes, x_ND, tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="nothing else is overwritten"):
        of_batches.write_report(tmp_path, saes, [x_ND])
    with pytest.raises(ValueError, match="names of letters"):
        of_batches.write_report(tmp_path / "new", {"../a": saes["a"]}, [x_ND])
    assert (tmp_path / "thesis.txt").read_text() == "x"
