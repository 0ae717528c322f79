"""SAEBench's rules, computed here once more in the plainest way; peers/test_saebench.py has SAEBench itself.
C contexts, L tokens, V vocabulary."""

import pytest
import torch

from monosemy.evaluation.columns import sae_bench_results
from monosemy.evaluation.on_model import evaluate_on_model
from monosemy.lm.info import Site
from monosemy.lm.model import LanguageModel
from monosemy.sae import architecture

SITE = Site.parse("resid_post.1")


@pytest.fixture(scope="module")
def measured(tiny_model):
    """(the row by SAEBench's rules, the row by ours, the same from whole logits)"""
    lm = LanguageModel.load(str(tiny_model), [SITE], whole=True, device="cpu")
    ids_CL = torch.randint(3, 30, (3, 10), generator=torch.Generator().manual_seed(0))
    ids_CL[:, 0], ids_CL[1, 4] = 0, 1
    ignored = torch.tensor([0, 1])
    sae = architecture("standard")(24, 48)
    sae.reset(torch.Generator().manual_seed(1))
    rows = [
        evaluate_on_model(lm, {"a": (SITE, sae)}, ids_CL, ignore_ids=ignored, sae_bench=rules)[0]
        for rules in (True, False)
    ]

    with torch.inference_mode():
        clean = lm.clean(ids_CL, [SITE])
        x_CLD = clean.activations[SITE]
        kept_CL = ~torch.isin(ids_CL, ignored)
        log_p_CLV = lm.logits(clean.hidden_BLD).log_softmax(-1)

        def losses(replacement_CLD):
            log_q_CLV = lm.spliced(clean, SITE, replacement_CLD).log_softmax(-1)
            ce_CL = -log_q_CLV[:, :-1].gather(2, ids_CL[:, 1:, None])[..., 0]
            kl_CL = (log_p_CLV.exp() * (log_p_CLV - log_q_CLV)).sum(-1)
            return float(ce_CL[kept_CL[:, :-1]].mean()), float(kl_CL[kept_CL].mean())

        plain = {
            "clean": losses(x_CLD),
            "zero": losses(0 * x_CLD),
            "sae": losses(torch.where(kept_CL[..., None], sae(x_CLD), x_CLD)),
        }
    return *rows, plain


def test_losses_and_kl_by_its_rules(measured):
    row, _, plain = measured
    found = {name: value for category in sae_bench_results(row).values() for name, value in category.items()}
    for name, key in (("without_sae", "clean"), ("with_ablation", "zero"), ("with_sae", "sae")):
        assert found[f"ce_loss_{name}"] == pytest.approx(plain[key][0], rel=1e-5)
        if key != "clean":
            assert found[f"kl_div_{name}"] == pytest.approx(plain[key][1], rel=1e-4)
    (clean, _), (zero, kl_zero), (sae, kl) = plain["clean"], plain["zero"], plain["sae"]
    assert found["ce_loss_score"] == pytest.approx((zero - sae) / (zero - clean), rel=1e-4)
    assert found["kl_div_score"] == pytest.approx((kl_zero - kl) / kl_zero, rel=1e-4)


def test_its_rules_change_what_they_should_and_nothing_else(measured):
    row, ours, _ = measured
    changed = {key for key in row if row[key] != ours[key]}
    recovered = {f"loss_recovered_zero{ending}" for ending in ("", "_low", "_high")} | {"frac_recovered"}
    assert changed == {"ce_zero", "loss_zero", "kl", "kl_zero", "kl_mean"} | recovered


def test_every_name_is_there(measured):
    found = sae_bench_results(measured[0])
    assert found.keys() == {
        "model_behavior_preservation",
        "model_performance_preservation",
        "reconstruction_quality",
        "shrinkage",
        "sparsity",
        "misc_metrics",
    }
    assert all(value is not None for category in found.values() for value in category.values())
