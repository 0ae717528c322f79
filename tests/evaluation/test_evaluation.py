"""The self-checks of the evaluation, on a tiny random model with SAEs whose figures are known beforehand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from monosemy.evaluation import on_model
from monosemy.evaluation.columns import table
from monosemy.evaluation.metrics import dictionary_learning_results
from monosemy.evaluation.on_model import evaluate_on_model
from monosemy.lm.info import Site
from monosemy.lm.model import LanguageModel

pytestmark = pytest.mark.usefixtures("one_thread")

D, L, C, V = 32, 16, 24, 97
IGNORED = torch.tensor([0, 5])
NAMES = ("resid_post.0", "mlp_out.1", "resid_post.2")
SITES = [Site.parse(name) for name in NAMES]
SITE = SITES[0]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    config = hf.LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LanguageModel(hf.LlamaForCausalLM(config), SITES)


@pytest.fixture(scope="module")
def contexts() -> Tensor:
    ids_CL = torch.randint(1, V, (C, L), generator=torch.Generator().manual_seed(0))
    ids_CL[:, 0] = 0
    ids_CL[3, 7] = ids_CL[11, L - 1] = 5
    return ids_CL


class Stub(nn.Module):
    """What the evaluation asks of an SAE, around two functions."""

    name, d_in, d_out, target_widths, modes = "stub", D, D, (D,), ("default",)

    def __init__(
        self, encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor], d_sae: int = D
    ) -> None:
        super().__init__()
        self.f, self.g, self.d_sae = encode, decode, d_sae

    def encode(self, x: Tensor, mode: str | None = None) -> Tensor:
        assert x.dtype == torch.float32 and x.dim() == 2
        return self.f(x)

    def reconstruct(self, f: Tensor, x: Tensor) -> Tensor:
        return self.g(f)


class BatchTopK(nn.Module):
    """Random directions; k N of them are kept, or those above a threshold."""

    name, d_in, d_out, d_sae, modes = "batch_top_k", D, D, 64, ("threshold", "top_k")
    target_widths = (D,)

    def __init__(self, k: int, threshold: float) -> None:
        super().__init__()
        self.k, self.threshold = k, threshold
        rows_FD = torch.randn(64, D, generator=torch.Generator().manual_seed(1))
        self.W_FD = nn.Parameter(rows_FD / rows_FD.norm(dim=1, keepdim=True))

    def encode(self, x: Tensor, mode: str | None = None) -> Tensor:
        pre = (x @ self.W_FD.T).relu()
        least = pre.flatten().topk(self.k * len(x)).values[-1] if mode == "top_k" else self.threshold
        return pre * (pre >= least)

    def reconstruct(self, f: Tensor, x: Tensor) -> Tensor:
        return f @ self.W_FD


def identity() -> Stub:
    return Stub(lambda x: x, lambda f: f)


def run(
    lm: LanguageModel, contexts: Tensor, saes: dict[str, tuple[Site, nn.Module]], **settings: object
) -> list[dict]:
    return evaluate_on_model(lm, saes, contexts, ignore_ids=IGNORED, **settings)


def counted_activations(lm: LanguageModel, contexts: Tensor, site: Site) -> Tensor:
    keep = ~torch.isin(contexts, IGNORED)
    keep[:, 0] = False
    return lm.activations(contexts)[site][keep]


# --- figures that are known


def test_the_identity_recovers_everything(lm: LanguageModel, contexts: Tensor) -> None:
    for row, site in zip(
        run(lm, contexts, {name: (Site.parse(name), identity()) for name in NAMES}), SITES, strict=True
    ):
        assert row["frac_recovered"] == row["loss_recovered_zero"] == row["loss_recovered_mean"] == 1
        assert row["loss_recovered_zero_low"] == row["loss_recovered_zero_high"] == 1
        assert row["kl"] == row["ce_diff"] == row["mse"] == row["fvu"] == row["l2_loss"] == 0
        assert row["frac_variance_explained"] == 1
        assert row["cossim"] == pytest.approx(1) and row["l2_ratio"] == pytest.approx(1)
        assert row["relative_reconstruction_bias"] == pytest.approx(1)
        assert row["l0"] == D and row["frac_alive"] == 1 and row["never_fired"] == 0
        assert row["firing_counts"][-1] == D and sum(row["firing_counts"]) == D
        assert row["l1_loss"] == pytest.approx(
            counted_activations(lm, contexts, site).abs().sum(1).mean().item()
        )
        assert row["ce_zero"] != row["ce_clean"] and row["ce_mean"] != row["ce_clean"]


def test_a_mean_only_reconstruction_explains_nothing(lm: LanguageModel, contexts: Tensor) -> None:
    saes = {}
    for name, site in zip(NAMES, SITES, strict=True):
        mean_D = counted_activations(lm, contexts, site).double().mean(0).float()
        saes[name] = (
            site,
            Stub(lambda x: torch.zeros(len(x), 8), lambda f, m=mean_D: m.expand(len(f), D), 8),
        )
    for row in run(lm, contexts, saes):
        assert row["fvu"] == pytest.approx(1, abs=1e-6) and row["frac_variance_explained"] == pytest.approx(
            0, abs=1e-6
        )
        assert row["loss_recovered_mean"] == pytest.approx(0, abs=1e-6) and row["kl"] == pytest.approx(
            row["kl_mean"], abs=1e-6
        )
        assert row["l0"] == row["l1_loss"] == row["frac_alive"] == 0
        assert row["never_fired"] == 8 and sum(row["firing_counts"]) == 0


def test_zeros_recover_nothing_and_give_no_nan(lm: LanguageModel, contexts: Tensor) -> None:
    (row,) = run(lm, contexts, {"zeros": (SITE, Stub(lambda x: x * 0, lambda f: f))})
    assert row["frac_recovered"] == row["loss_recovered_zero_high"] == 0 and row["kl"] == row["kl_zero"] > 0
    assert row["cossim"] == row["l2_ratio"] == 0
    assert row["relative_reconstruction_bias"] is None  # 0 / 0
    assert json.loads(json.dumps(row, allow_nan=False)) == row


def test_figures_equal_a_plain_computation(lm: LanguageModel, contexts: Tensor) -> None:
    """Every definition once more, in float64 over all tokens at once, the splice as a hook on the whole
    model."""
    sae = BatchTopK(k=6, threshold=0.8)
    (row,) = run(lm, contexts, {"sae": (SITE, sae)}, batch_size=5)
    keep = ~torch.isin(contexts, IGNORED)
    keep[:, 0] = False
    x = lm.activations(contexts)[SITE][keep]
    with torch.no_grad():
        f, hat = sae.encode(x), sae.reconstruct(sae.encode(x), x)

        def logits(replacement: Tensor | None) -> Tensor:
            def splice(module: nn.Module, args: object, output: Tensor) -> Tensor:
                return output if replacement is None else output.masked_scatter(keep[:, :, None], replacement)

            with lm.layers[0].register_forward_hook(splice):
                return lm.model(contexts, use_cache=False).logits[:, :-1].double().log_softmax(-1)

        mean = x.double().mean(0)
        log_p, log_q, log_zero, log_mean = (logits(y) for y in (None, hat, x * 0, mean.float().expand_as(x)))
    predicts = keep[:, :-1]
    ce, ce_hat, ce_zero, ce_mean = (
        -log.gather(2, contexts[:, 1:, None])[..., 0][predicts].mean().item()
        for log in (log_p, log_q, log_zero, log_mean)
    )
    x, hat, f = x.double(), hat.double(), f.double()
    r = x - hat
    expected = {
        "l2_loss": r.norm(dim=1).mean(),
        "l1_loss": f.abs().sum(1).mean(),
        "l0": (f != 0).double().sum(1).mean(),
        "frac_variance_explained": 1 - r.var(0).sum() / x.var(0).sum(),
        "cossim": torch.cosine_similarity(x, hat).mean(),
        "l2_ratio": (hat.norm(dim=1) / x.norm(dim=1)).mean(),
        "relative_reconstruction_bias": hat.square().sum() / (x * hat).sum(),
        "loss_original": ce,
        "loss_reconstructed": ce_hat,
        "loss_zero": ce_zero,
        "frac_recovered": (ce_hat - ce_zero) / (ce - ce_zero),
        "frac_alive": (f != 0).any(0).double().mean(),
        "mse": r.square().sum(1).mean(),
        "fvu": r.square().sum() / (x - mean).square().sum(),
        "ce_mean": ce_mean,
        "loss_recovered_mean": (ce_hat - ce_mean) / (ce - ce_mean),
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1)[predicts].mean(),
    }
    for key, value in expected.items():
        assert row[key] == pytest.approx(float(value), rel=2e-4), key
    assert row["tokens"] == int(keep.sum()) and row["spliced_tokens"] == int(predicts.sum())
    assert (
        row["frac_recovered"] == row["loss_recovered_zero"]
        and row["ce_diff"] == row["ce_spliced"] - row["ce_clean"]
    )
    share = (f != 0).double().mean(0)
    edges = row["firing_log10_edges"]
    counts = [int(((share.log10() >= low) & (share.log10() < high)).sum()) for low, high in pairwise(edges)]
    counts[-1] += int((share == 1).sum())
    assert row["firing_counts"] == counts and row["never_fired"] == int((share == 0).sum())


def test_the_interval_is_the_bootstrap_of_the_ratio(lm: LanguageModel, contexts: Tensor) -> None:
    rows = [run(lm, contexts, {"sae": (SITE, BatchTopK(6, 0.8))}, seed=seed)[0] for seed in (0, 0, 1)]
    keys = ("loss_recovered_zero_low", "loss_recovered_zero_high")
    assert rows[0] == rows[1] and [rows[0][k] for k in keys] != [rows[2][k] for k in keys]
    low, high = (rows[0][k] for k in keys)
    assert low < rows[0]["loss_recovered_zero"] < high
    # of sums that are known: a ratio of 1/2 in every context has no spread, and two kinds of contexts have
    # the binomial's
    weights = on_model._bootstrap(100, 0)
    assert weights.shape == (1000, 100) and bool((weights.sum(1) == 100).all())
    one = torch.ones(100, dtype=torch.float64)
    assert on_model._interval(on_model._draws(one / 2, one, weights)) == (0.5, 0.5)
    halves = (torch.arange(100) < 50).double()
    low, high = on_model._interval(on_model._draws(halves, one, weights))
    assert (low, high) == (pytest.approx(0.4, abs=0.03), pytest.approx(0.6, abs=0.03))


# --- what must not matter, and what must


def test_batch_size_does_not_matter(
    lm: LanguageModel, contexts: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_model, "SELECTION_TOKENS", 10 * L)  # three groups, the last of them smaller
    saes = {name: (Site.parse(name), BatchTopK(6, 0.8)) for name in NAMES}
    one, some, all_ = (run(lm, contexts, saes, batch_size=size) for size in (1, 7, 64))
    for rows in (some, all_):
        for row, reference in zip(rows, one, strict=True):
            assert row.keys() == reference.keys()
            for key, value in row.items():
                expected = reference[key]
                close = isinstance(value, float) and not isinstance(value, bool)
                assert value == (pytest.approx(expected, rel=1e-4, abs=1e-6) if close else expected), key


def test_pieces_of_the_head_do_not_matter(
    lm: LanguageModel, contexts: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    saes = {"sae": (SITE, BatchTopK(6, 0.8))}
    whole = run(lm, contexts, saes)[0]
    seen: list[int] = []
    logits = LanguageModel.logits
    monkeypatch.setattr(
        LanguageModel, "logits", lambda self, hidden: (seen.append(len(hidden)), logits(self, hidden))[1]
    )
    monkeypatch.setattr(on_model, "HEAD_ELEMENTS", 10 * V)
    pieces = run(lm, contexts, saes)[0]
    assert max(seen) == 10 and all(
        pieces[key] == pytest.approx(whole[key], rel=1e-5)
        for key in ("kl", "ce_clean", "ce_spliced", "ce_mean")
    )


def test_other_saes_do_not_matter(lm: LanguageModel, contexts: Tensor) -> None:
    sae = (SITE, BatchTopK(6, 0.8))
    (alone,) = run(lm, contexts, {"sae": sae})
    among = run(lm, contexts, {"identity": (SITE, identity()), "sae": sae, "other": (SITES[2], identity())})
    assert among[1] == alone and [row["sae"] for row in among] == ["identity", "sae", "other"]


def test_splice_zero_and_mean_replace_the_same_positions(
    lm: LanguageModel, contexts: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    x_CLD = lm.activations(contexts)[SITE]
    norms = x_CLD.norm(dim=-1)
    keep = ~torch.isin(contexts, IGNORED)
    keep[:, 0] = False
    limit = norms[keep].quantile(0.9).item()
    keep &= norms <= limit
    replaced: list[Tensor] = []
    resume = LanguageModel.run_from

    def spy(self: LanguageModel, clean: object, site: Site, replacement: Tensor) -> Tensor:
        if len(replacement) == C:
            replaced.append((replacement != x_CLD).any(-1))
        return resume(self, clean, site, replacement)

    monkeypatch.setattr(LanguageModel, "run_from", spy)
    (row,) = run(lm, contexts, {"sae": (SITE, BatchTopK(6, 0.8))}, batch_size=C, norm_limits={SITE: limit})
    assert len(replaced) == 4  # zero, mean, and the two modes
    assert all(torch.equal(where, keep) for where in replaced)
    assert row["tokens"] == int(keep.sum()) and row["spliced_tokens"] == int(keep[:, :-1].sum())


def test_what_lies_before_a_site_runs_once(
    lm: LanguageModel, contexts: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = [0] * 4
    for i, layer in enumerate(lm.layers):
        forward = layer.forward

        def count(*args: object, i: int = i, forward: Callable = forward, **kwargs: object) -> Tensor:
            ran[i] += len(args[0])  # type: ignore[arg-type]
            return forward(*args, **kwargs)

        monkeypatch.setattr(layer, "forward", count)
    run(lm, contexts, {f"sae{i}": (SITES[2], identity()) for i in range(10)}, batch_size=C)
    # the pass for the means, the clean run, and one context that checks that the model can be resumed
    assert ran[0] == ran[1] == 2 * C + 1
    assert ran[3] == 12 * C + C + 2


def test_splicing_can_be_limited_to_the_first_contexts(
    lm: LanguageModel, contexts: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_model, "SELECTION_TOKENS", 4 * L)
    saes = {"sae": (SITE, Stub(lambda x: x.relu(), lambda f: f))}
    (full,), (part,), (none,) = (run(lm, contexts, saes, splice_contexts=n) for n in (None, 6, 0))
    (first,) = run(lm, contexts[:6], saes)
    assert (
        full["tokens"] == part["tokens"] == none["tokens"]
        and part["spliced_tokens"] == first["spliced_tokens"]
    )
    for key in ("l0", "fvu", "mse", "cossim", "frac_alive"):
        assert part[key] == pytest.approx(full[key]) == none[key]
    for key in ("ce_clean", "ce_spliced", "ce_zero", "kl"):  # ce_mean knows the mean over all contexts
        assert part[key] == pytest.approx(first[key], rel=1e-6) and none[key] is None
    assert (
        part["loss_recovered_zero_low"] is not None
        and none["loss_recovered_zero_low"] is None
        and none["spliced_tokens"] == 0
    )


def test_a_cut_model_gives_reconstruction_metrics_alone(lm: LanguageModel, contexts: Tensor) -> None:
    cut = LanguageModel(lm.decoder, [SITE])
    saes = {"sae": (SITE, identity())}
    (row,) = run(cut, contexts, saes, splice_contexts=0)
    assert row["fvu"] == 0 and row["frac_recovered"] is None
    with pytest.raises(ValueError, match="whole=True"):
        run(cut, contexts, saes)


def test_norm_outliers_are_left_out_of_every_metric(contexts: Tensor, lm: LanguageModel) -> None:
    x = counted_activations(lm, contexts, SITE)
    limit = x.norm(dim=-1).quantile(0.5).item()
    (row,) = run(lm, contexts, {"sae": (SITE, identity())}, norm_limits={SITE: limit})
    kept = x[x.norm(dim=-1) <= limit]
    assert row["tokens"] == len(kept) and row["l1_loss"] == pytest.approx(kept.abs().sum(1).mean().item())


# --- modes, rows, tables


def test_both_modes_and_the_flag(lm: LanguageModel, contexts: Tensor) -> None:
    good, bad, plain = run(
        lm,
        contexts,
        {"good": (SITE, BatchTopK(6, 0.8)), "bad": (SITE, BatchTopK(6, 0)), "plain": (SITE, identity())},
    )
    assert good["top_k_l0"] == pytest.approx(6, abs=0.01) and good["l0"] != good["top_k_l0"]
    assert {key.removeprefix("top_k_") for key in good if key.startswith("top_k_")} < good.keys()
    assert bad["l0"] > 20 and bad["fvu"] > 1.2 * bad["top_k_fvu"]
    assert bad["threshold_flag"] is True and good["threshold_flag"] is (good["fvu"] > 1.2 * good["top_k_fvu"])
    assert "threshold_flag" not in plain and not any(key.startswith("top_k_") for key in plain)


def test_rows_are_flat_json_with_the_seeds_keys(lm: LanguageModel, contexts: Tensor) -> None:
    (row,) = run(
        lm,
        contexts,
        {"resid_post_layer_0/trainer_0": (SITE, BatchTopK(6, 0.8))},
        info={"resid_post_layer_0/trainer_0": {"k": 6}},
    )
    assert not any(isinstance(value, dict) for value in row.values()) and row["k"] == 6
    assert (
        row["site"] == "resid_post.0"
        and row["layer"] == 0
        and row["architecture"] == "batch_top_k"
        and row["d_sae"] == 64
    )
    metrics = [
        "l2_loss",
        "l1_loss",
        "l0",
        "frac_variance_explained",
        "cossim",
        "l2_ratio",
        "relative_reconstruction_bias",
        "frac_alive",
    ]
    losses = ["loss_original", "loss_reconstructed", "loss_zero", "frac_recovered"]
    nested = dictionary_learning_results(row)
    assert all(isinstance(nested[key], float) and math.isfinite(nested[key]) for key in metrics + losses)
    assert nested["hyperparameters"] == {"n_inputs": C, "context_length": L}


def test_the_table(lm: LanguageModel, contexts: Tensor) -> None:
    rows = run(
        lm, contexts, {"a": (SITE, BatchTopK(6, 0)), "long/name": (SITE, identity())}, splice_contexts=4
    )
    rows += run(lm, contexts, {"c": (SITE, identity())}, splice_contexts=0)
    head, first, second, third = table(rows).splitlines()
    assert head.split()[:3] == ["sae", "architecture", "L0"] and len(head) == len(second)
    assert "*" in first and "1.000 [1.000, 1.000]" in second and " - " in third


def test_bad_input(lm: LanguageModel, contexts: Tensor) -> None:
    saes = {"sae": (SITE, identity())}
    with pytest.raises(ValueError, match="held-out"):
        evaluate_on_model(lm, saes, contexts[:, :1], ignore_ids=IGNORED)
    with pytest.raises(ValueError, match=r"resid_post\.0"):
        evaluate_on_model(lm, saes, contexts, ignore_ids=torch.arange(V))
    with pytest.raises(ValueError, match="splice_contexts"):
        run(lm, contexts, saes, splice_contexts=-1)
    with pytest.raises(ValueError, match=r"resid_post\.3"):
        run(lm, contexts, {"sae": (Site.parse("resid_post.3"), identity())})


def test_a_model_that_cannot_be_resumed_is_refused(
    lm: LanguageModel, contexts: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    resume = LanguageModel.run_from
    monkeypatch.setattr(
        LanguageModel, "run_from", lambda self, clean, site, x: resume(self, clean, site, x) * 1.1
    )
    with pytest.raises(ValueError, match="splice_contexts=0"):
        run(lm, contexts, {"sae": (SITE, identity())})


def test_the_caller_is_left_as_it_was(lm: LanguageModel, contexts: Tensor) -> None:
    before, state = contexts.clone(), torch.random.get_rng_state()
    run(lm, contexts, {"sae": (SITE, identity())})
    assert (
        torch.equal(contexts, before)
        and torch.equal(torch.random.get_rng_state(), state)
        and not torch.is_inference_mode_enabled()
    )


def test_an_evaluation_that_takes_long_tells_how_far_it_is(
    lm: LanguageModel, contexts: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(on_model, "SELECTION_TOKENS", 10 * L)
    caplog.set_level("INFO", "monosemy")
    run(lm, contexts, {"sae": (SITE, identity())})
    assert "evaluating" not in caplog.text  # it was done in a moment
    monkeypatch.setattr("monosemy.system.progress.SECONDS", 0)
    run(lm, contexts, {"sae": (SITE, identity())})
    assert all(f"evaluating: {done} of {C} ctx" in caplog.text for done in (10, 20, 24))
