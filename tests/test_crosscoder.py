"""Crosscoders: their maths against float64, what a latent's weight means, masks, both factors, and what is
said of latents of one source alone.

B tokens, D and E widths of two sources, F d_sae.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor

import monosemy
from benchmarks.alone import LoneTrainer
from monosemy.cli import main
from monosemy.crosscoder import Crosscoder, crosscoder
from monosemy.evaluation.diffing import LatentScaling
from monosemy.evaluation.on_model import evaluate_on_model
from monosemy.lm.info import Site, describe
from monosemy.lm.model import load_tokenizer
from monosemy.lm.site_groups import SiteGroup, groups_at, parse_site, single_sites
from monosemy.lm.two_models import check_tokenizers, load_models
from monosemy.ops import cpu
from monosemy.schedule import Schedule
from monosemy.training.trainer import SAESpec
from tests.exact_steps import check_steps
from tests.test_transcoder import SETTINGS, every

B, D, E, F = 96, 24, 16, 66
forms = pytest.mark.parametrize("form", ["cpu"] * cpu.available() + ["aten"])
masks = pytest.mark.parametrize("mask", ["full", "causal", "dedicated"])


def spec(name: str, *, mask: str = "full", **how: object) -> SAESpec:
    return SAESpec(name, F, 3e-3, settings=SETTINGS[name], crosscode=True, mask=mask, **how)


def planted(number: int, seed: int = 0) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Two sources of 40 sparse latents, the first ten of the first source alone, the next ten of the second;
    of other sizes and means. Returns batches, and the latents' decoders side by side."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(40, D, generator=draw), dim=1)
    other = torch.nn.functional.normalize(torch.randn(40, E, generator=draw), dim=1)
    rows[10:20], other[:10] = 0, 0

    def batch() -> tuple[Tensor, Tensor]:
        f = torch.randn(B, 40, generator=draw).abs() * (torch.rand(B, 40, generator=draw) < 0.1)
        noise = [0.01 * torch.randn(B, width, generator=draw) for width in (D, E)]
        return f @ rows + noise[0] + 0.3, 20 * (f @ other + noise[1]) - 4

    return [batch() for _ in range(number)], torch.cat([rows, other], 1)


def scaled(number: int) -> list[Tensor]:
    """Batches as a trainer takes them: both sources of unit size, side by side."""
    found, _ = planted(number)
    sizes = [torch.cat(part).square().sum(1).mean().sqrt() for part in zip(*found, strict=True)]
    return [torch.cat([x / size for x, size in zip(parts, sizes, strict=True)], 1) for parts in found]


@forms
@every
def test_a_step_is_that_of_float64(name: str, form: str) -> None:
    assert check_steps(spec(name, mask="causal"), (D, E), scaled(8), form)


@masks
@every
def test_weights_stay_at_one_and_masked_weights_at_zero(name: str, mask: str) -> None:
    member = LoneTrainer(name, spec(name, mask=mask), (D, E), Schedule.of_run(60, B))
    sae = member.sae
    for step, batch in enumerate(scaled(30)):
        member.step(batch, step)
    assert isinstance(sae, Crosscoder)
    if sae.weighted:
        assert sae.weights().detach() == pytest.approx(torch.ones(F), abs=1e-6)
    kept = torch.zeros(2, F, 2, dtype=torch.bool)
    for latents, reads, writes in sae.groups:
        kept[0, latents, list(reads)] = kept[1, latents, list(writes)] = True
    for may, W in zip(kept, (sae.W_enc, sae.W_dec), strict=True):
        norm_FS = torch.stack([W[:, columns].detach().norm(dim=1) for columns in sae.columns], 1)
        assert ((norm_FS > 0) == may).all()
    shares = {"full": [66], "causal": [33, 33], "dedicated": [3, 3, 60]}[mask]
    assert [of.stop - of.start for of, *_ in sae.groups] == shares


@pytest.mark.parametrize("name", ["top_k", "batch_top_k", "standard"])
def test_the_gradient_is_that_of_codes_divided_by_their_weight(name: str) -> None:
    """At a weight of 1: of the loss in which decoder rows are free and a latent's weight counts."""
    sae = crosscoder(name)((D, E), F, **SETTINGS[name]).double()
    sae.reset(torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.W_dec.div_(sae.weights()[:, None])
    x_BD = torch.randn(B, D + E, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    u_BF = sae.encode(x_BD).detach()

    def loss(W_dec: Tensor) -> Tensor:
        return (x_BD - (u_BF / sae.weights(W_dec)) @ W_dec).square().sum(1).mean()

    (true,) = torch.autograd.grad(loss(sae.W_dec), [sae.W_dec])
    plain = torch.autograd.grad((x_BD - u_BF @ sae.W_dec).square().sum(1).mean(), [sae.W_dec])[0]
    grads = {"W_enc": torch.zeros_like(sae.W_enc), "W_dec": plain.clone()}
    sae.adjust_gradients_(grads)
    assert not torch.allclose(plain, true) and torch.allclose(grads["W_dec"], true, atol=1e-12)


def test_the_k_largest_are_those_of_codes_times_their_decoders_norms() -> None:
    """As Minder et al. choose them, whatever a latent's scale is divided into."""
    sae = crosscoder("top_k")((D, E), F, k=6).double()
    sae.reset(torch.Generator().manual_seed(0))
    x_BD = torch.randn(B, D + E, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    factor_F = torch.rand(F, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 0.1
    with torch.no_grad():
        sae.W_dec.div_(sae.weights()[:, None])
    W_enc, W_dec = factor_F * sae.W_enc, sae.W_dec / factor_F  # the same function, other weights
    f_BF = (x_BD @ W_enc.T).relu()
    weight_F = W_dec[:, :D].norm(dim=1) + W_dec[:, D:].norm(dim=1)
    chosen = (f_BF * weight_F).topk(6, 1).indices
    theirs = torch.zeros_like(f_BF).scatter_(1, chosen, f_BF.gather(1, chosen)) @ W_dec
    assert torch.allclose(sae(x_BD, "top_k"), theirs)


@every
def test_fit_learns_folds_all_factors_and_comes_back(name: str, tmp_path: Path) -> None:
    found, _ = planted(150)
    fitted = monosemy.fit(found, [spec(name)])
    (sae,) = fitted.saes
    assert isinstance(sae, Crosscoder) and len(fitted.norm_factors) == 2
    assert fitted.norm_factors[1] > 5 * fitted.norm_factors[0]
    if not sae.always_sparse:
        assert sae.decoder_norms() == pytest.approx(torch.ones(F), abs=1e-5)
    (row,) = monosemy.evaluate([sae], found[:40])
    assert row["fvu"] < 0.75 and row["architecture"] == name
    x_BD = torch.cat(found[0], 1)
    sae.save_pretrained(tmp_path / "saved")
    again = monosemy.load(tmp_path / "saved")
    assert again.widths == (D, E) and torch.equal(again(x_BD), sae(x_BD))
    begun = dataclasses.replace(spec(name), init_from=sae)
    member = LoneTrainer("x", begun, (D, E), Schedule.of_run(10, B), norm_factors=fitted.norm_factors)
    assert torch.allclose(member.finished()(x_BD), sae(x_BD), rtol=1e-3, atol=1e-3)


def test_latents_of_one_source_are_found() -> None:
    found, rows = planted(1000)
    how = SAESpec("batch_top_k", 40, 3e-3, settings={"k": 4}, crosscode=True)
    (sae,) = monosemy.fit(found, [how]).saes
    assert isinstance(sae, Crosscoder)
    own = torch.cat([rows[:, :D], rows[:, D:]], 1)
    cosine = torch.nn.functional.normalize(sae.comparable_decoders()[0], dim=1) @ (
        torch.nn.functional.normalize(own, dim=1).T
    )
    best, which = cosine.max(1)
    relative = sae.relative_norms()[:, 1]
    sure = best > 0.9
    assert int(sure.sum()) > 25
    for low, high, wanted in ((0, 10, 0.0), (10, 20, 1.0)):
        of = sure & (which >= low) & (which < high)
        assert of.any() and (relative[of] - wanted).abs().mean() < 0.1
        assert (relative[of] - wanted).abs().max() < 0.2
    shared = sure & (which >= 20)
    assert (relative[shared] - 0.5).abs().max() < 0.15


def test_latent_scaling_is_the_least_squares_of_each_latent() -> None:
    found, _ = planted(60)
    same = [(x, y[:, :1].expand(-1, D) + x) for x, y in found]
    (sae,) = monosemy.fit(same, [SAESpec("top_k", 12, 3e-3, settings={"k": 3}, crosscode=True)]).saes
    assert isinstance(sae, Crosscoder)
    y_ND = torch.cat([torch.cat(pair, 1) for pair in same])
    f_NF = sae.encode(y_ND, mode="top_k")
    hat_ND = sae.reconstruct(f_NF, y_ND)
    scaling = LatentScaling(sae, torch.device("cpu"))
    for part in torch.arange(len(y_ND)).split(1000):
        scaling.add(f_NF[part], y_ND[part], hat_ND[part])
    nu = scaling.nu()
    scale = sae.source_scale.double()
    rows = torch.stack(sae.W_dec.double().split([D, D], 1)) / scale[:, None, None]
    y, hat = (torch.stack(z.double().split([D, D], 1)) / scale[:, None, None] for z in (y_ND, hat_ND))
    for latent in (f_NF > 0).any(0).nonzero()[:, 0].tolist():
        longer = int(rows[:, latent].norm(dim=1).argmax())
        column = (f_NF[:, latent, None].double() * rows[longer, latent]).reshape(-1, 1)
        betas = []
        for s in (1 - longer, longer):
            own = f_NF[:, latent, None].double() * rows[s, latent]
            targets = torch.stack([(y[s] - hat[s] + own).flatten(), hat[s].flatten()], 1)
            betas.append(torch.linalg.lstsq(column, targets).solution[0])
        true = betas[0] / betas[1]
        assert [float(of[latent]) for of in nu] == pytest.approx(true.tolist(), rel=1e-3, abs=1e-4)


def test_columns_are_those_of_each_source() -> None:
    found, _ = planted(60)
    (sae,) = monosemy.fit(found, [spec("batch_top_k")]).saes
    (row,) = monosemy.evaluate([sae], found)
    y_ND = torch.cat([torch.cat(pair, 1) for pair in found])
    hat_ND = sae(y_ND)
    fvu = [
        float((y - hat).square().sum() / (y - y.mean(0)).square().sum())
        for y, hat in zip(y_ND.split([D, E], 1), hat_ND.split([D, E], 1), strict=True)
    ]
    assert row["fvu"] == pytest.approx(sum(fvu) / 2, rel=1e-4)
    assert "first_only" not in row  # of sources of other widths no latent can be scaled


@pytest.mark.parametrize(
    ("batches", "how", "said"),
    [
        (lambda: [x for x, _ in planted(3)[0]], {"crosscode": True}, "crosscoders"),
        (lambda: planted(3)[0], {}, "autoencoder"),
        (lambda: planted(3)[0], {"mask": "causal"}, "without crosscode"),
        (lambda: planted(3)[0], {"crosscode": True, "mask": "acausal"}, "causal, dedicated"),
        (lambda: planted(3)[0], {"crosscode": True, "transcode": True}, "choose one"),
        (lambda: planted(3)[0], {"crosscode": True, "mask": "dedicated", "dedicated_share": 0.5}, "share"),
        (lambda: planted(3)[0], {"crosscode": True, "mask": "dedicated", "dedicated_share": 0.001}, "share"),
    ],
)
def test_what_fit_refuses(batches, how, said) -> None:
    with pytest.raises(ValueError, match=f"(?i){said}"):
        monosemy.fit(batches(), [SAESpec("top_k", F, settings={"k": 4}, **how)])


def test_names_of_groups() -> None:
    row = parse_site("resid_post.3-5")
    assert row == SiteGroup(tuple(Site("resid_post", layer) for layer in (3, 4, 5)))
    both = parse_site("resid_post.3+resid_post.3@other")
    assert isinstance(both, SiteGroup) and [site.other for site in both.members] == [False, True]
    for name in (
        "resid_post.3+resid_post.5",
        "resid_post.3-5",
        "resid_mid.1+mlp_out.1",
        str(both),
        "a.b+c.d",
    ):
        site = parse_site(name)
        assert str(site) == name and parse_site(str(site)) == site
    assert row.folder == "crosscoder_resid_post_layers_3_4_5" and row.depth == 6 and row.layer == 3
    assert parse_site("resid_post.0-9").folder == "crosscoder_resid_post_layers_0_to_9"
    assert both.folder == "crosscoder_resid_post_layer_3_and_resid_post_layer_3_other"
    assert groups_at(["resid_post"], [5, 3, 4], two_models=False) == [row]
    (all_of_both,) = groups_at(["resid_post"], range(64), two_models=True)
    assert str(all_of_both) == "resid_post.0-63+resid_post.0-63@other"
    assert parse_site(str(all_of_both)) == all_of_both
    assert all_of_both.folder == "crosscoder_resid_post_layers_0_to_63_and_resid_post_layers_0_to_63_other"
    scattered = [parse_site("+".join(f"m.{n}.a" for n in range(at, 90, 2))) for at in (0, 1)]
    assert scattered[0].folder != scattered[1].folder
    assert all(len(site.folder) < 120 and parse_site(str(site)) == site for site in scattered)
    assert groups_at([], [3], two_models=True) == [both]
    assert len(groups_at(["mlp_out"], [1, 2], two_models=True)[0].members) == 4
    for wrong in ("resid_post.5-3", "resid_post.3+resid_post.3", "resid_post.0-99999999", "+", "mlp_out.1+"):
        with pytest.raises(ValueError, match="site"):
            parse_site(wrong)


# --- two models ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, somewhat changed, with a token more."""
    folder = tmp_path_factory.mktemp("tuned")
    model = hf.AutoModelForCausalLM.from_pretrained(tiny_model)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=draw))
    tokenizer = hf.AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>"]})
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


FLAGS = (
    "--num_tokens 12800 --sae_batch_size 128 --context_length 32 --buffer_tokens 4000 --eval_num_inputs 12 "
    "--held_out_fraction 0.1 --target_l0s 4 --dictionary_widths 48 --architectures batch_top_k jump_relu"
).split()


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tuned_model: Path, text_file: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("diff") / "run"
    models = ["--model_name", str(tiny_model), "--diff_model", str(tuned_model)]
    how = ["--layers", "0", "1", "--dataset", str(text_file), "--save_dir", str(folder), *FLAGS]
    assert main(["train", *models, *how]) == 0
    return folder


def test_a_run_compares_two_models(finished: Path, tuned_model: Path) -> None:
    rows = [json.loads(line) for line in (finished / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    facts = json.loads((finished / "run.json").read_text())
    assert facts["model"]["other"]["name"] == str(tuned_model)
    for row in rows:
        sae = monosemy.load(finished / row["sae"])
        assert isinstance(sae, Crosscoder) and sae.widths == (24, 24)
        assert sae.metadata["other_model"] == str(tuned_model)
        assert facts["norm_factor"][row["site"]] == sae.metadata["norm_factors"]
        assert list(row["by_site"]) == [f"resid_post.{row['layer']}{of}" for of in ("", "@other")]
        for column in ("fvu", "loss_recovered_zero", "kl"):
            parts = [of[column] for of in row["by_site"].values()]
            assert row[column] == pytest.approx(sum(parts) / 2) and parts[0] != parts[1]
        assert row["first_only"] + row["second_only"] + row["shared"] <= 48
        assert not (finished / row["sae"] / "ae.pt").exists()
    assert "Which source a latent belongs to" in (finished / "report.html").read_text()


def test_the_loss_is_that_of_each_model_with_its_reconstruction(
    finished: Path, tiny_model: Path, tuned_model: Path
) -> None:
    """Against both models run by hand, with a hook that replaces what the layer writes."""
    row = json.loads((finished / "rows.jsonl").read_text().splitlines()[0])
    site, sae = parse_site(row["site"]), monosemy.load(finished / row["sae"])
    lm = load_models(
        describe(str(tiny_model)), single_sites([site]), describe(str(tuned_model)), whole=True, device="cpu"
    )
    ids_CL = torch.randint(3, 30, (6, 20), generator=torch.Generator().manual_seed(0))
    (found,) = evaluate_on_model(
        lm, {"x": (site, sae)}, ids_CL, ignore_ids=torch.tensor([0, 1, 2]), batch_size=4
    )
    models = [hf.AutoModelForCausalLM.from_pretrained(path) for path in (tiny_model, tuned_model)]
    with torch.no_grad():
        x = [model(ids_CL, output_hidden_states=True).hidden_states[1] for model in models]
        hats = sae(torch.cat(x, -1)).split([24, 24], -1)
        for name, model, clean, hat in zip(found["by_site"], models, x, hats, strict=True):
            replaced = torch.cat([clean[:, :1], hat[:, 1:]], 1)
            hook = model.model.layers[0].register_forward_hook(lambda *_, by=replaced: by)
            logits = model(ids_CL).logits
            hook.remove()
            ce = torch.nn.functional.cross_entropy(
                logits[:, 1:-1].flatten(0, 1), ids_CL[:, 2:].flatten(), reduction="mean"
            )
            assert found["by_site"][name]["ce_spliced"] == pytest.approx(float(ce), rel=1e-4)


def test_a_run_goes_on_and_its_crosscoders_are_evaluated_again(finished: Path, capsys) -> None:
    assert main(["eval", str(finished), "--eval_num_inputs", "6"]) == 0
    assert main(["eval", *map(str, sorted(finished.glob("*/trainer_0"))), "--eval_num_inputs", "6"]) == 0
    assert "batch_top_k" in capsys.readouterr().out


def test_layers_of_one_model(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    how = ["--model_name", str(tiny_model), "--dataset", str(text_file), *FLAGS]
    folder = tmp_path / "run"
    train = ["train", *how, "--crosscode", "resid_post", "--layers", "all", "--crosscoder_mask", "causal"]
    assert main([*train, "--save_dir", str(folder)]) == 0
    (site,) = folder.glob("crosscoder_*")
    assert site.name == "crosscoder_resid_post_layers_0_1_2"
    sae = monosemy.load(site / "trainer_0")
    assert isinstance(sae, Crosscoder) and sae.mask == "causal" and sae.widths == (24, 24, 24)
    assert sae.source_norms().gt(0).sum(0).tolist() == [16, 32, 48]
    for tool in ("sae_lens", "sparsify", "dictionary_learning"):
        assert main(["convert", str(site / "trainer_0"), str(tmp_path / tool), "--to", tool]) == 2
    assert main(["convert", str(site / "trainer_0"), str(tmp_path / "native"), "--to", "native"]) == 0


def test_a_transcoder_from_one_model_to_the_other_is_whole(
    tiny_model: Path, tuned_model: Path, text_file: Path, tmp_path: Path
) -> None:
    how = ["--model_name", str(tiny_model), "--diff_model", str(tuned_model), "--dataset", str(text_file)]
    pair = ["--sites", "resid_post.0:resid_post.1@other", "--save_dir", str(tmp_path / "run")]
    assert main(["train", *how, *pair, *FLAGS]) == 0
    assert not (tmp_path / "run" / "errors.log").exists()


def test_tokenizers_that_disagree_are_refused(tiny_model: Path, tuned_model: Path) -> None:
    ours, theirs = (load_tokenizer(str(path)) for path in (tiny_model, tuned_model))
    check_tokenizers(ours, theirs, "tuned")
    with pytest.raises(ValueError, match="diff_model.*1 tokens differ.*<user>"):
        check_tokenizers(theirs, ours, "tiny")


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        ("--crosscode resid_post --layers 1", "layers"),
        ("--layers 1 --diff_model MODEL --crosscoder_mask causal", "crosscoder_mask"),
        ("--layers 1 --diff_model MODEL --transcode mlp", "diff_model"),
        ("--layers 1 --diff_model no/where/at/all", "diff_model"),
        ("--crosscode nowhere --layers 0 1", "crosscode"),
        ("--layers 1 --crosscoder_mask causal", "crosscoder_mask"),
        ("--sites resid_post.1+resid_post.1@other", "sites"),
        ("--layers 1 --diff_revision main", "diff_revision"),
        ("--diff_model MODEL --sites resid_post.1", "diff_model"),
        ("--layers 1 --diff_model nowhere/", "model"),
        ("--crosscode resid_post --transcode mlp --layers 9", "layers"),
        (
            "--crosscode resid_post --layers all --dry_run --crosscoder_mask dedicated --dedicated_share 0.4",
            "dedicated_share",
        ),
        (
            "--crosscode resid_post --layers all --dry_run --crosscoder_mask causal --dictionary_widths 2 "
            "--target_l0s 1",
            "dictionary_widths",
        ),
    ],
)
def test_what_a_run_refuses(
    flags: str, field: str, tiny_model: Path, text_file: Path, tmp_path, capsys
) -> None:
    given = flags.replace("MODEL", str(tiny_model)).split()
    how = ["--model_name", str(tiny_model), "--dataset", str(text_file), "--save_dir", str(tmp_path / "run")]
    assert main(["train", *how, *FLAGS, *given]) == 2
    assert field in capsys.readouterr().err and not (tmp_path / "run" / "metrics.jsonl").exists()
