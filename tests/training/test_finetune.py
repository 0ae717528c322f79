"""The step of a finetune: the loss through the language model and its gradient, where an output is spliced
in, and that L0 stays."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from monosemy.architectures.standard import Standard
from monosemy.codes import Execution
from monosemy.evaluation.on_model import _SiteEvaluation
from monosemy.families import Family
from monosemy.lm.model import CleanRun, LanguageModel
from monosemy.lm.site_groups import parse_site, reads, single_sites, writes
from monosemy.lm.splicing import counted_tokens
from monosemy.sae import SAE
from monosemy.training.finetune import (
    Finetuner,
    FinetuningSweep,
    Splice,
    balanced,
    finetuning_schedule,
)

IGNORED = torch.tensor([5, 9])
SITES = ("resid_post.0", "resid_pre.1", "resid_mid.1", "mlp_out.1", "attn_out.2", "mlp_in.1")
SETTINGS = {
    "top_k": {"k": 4},
    "batch_top_k": {"k": 4},
    "matryoshka_batch_top_k": {"k": 4, "group_fractions": (0.25, 0.75)},
    "jump_relu": {"target_l0": 4.0},
    "gated": {"l1_penalty": 0.1},
    "standard": {"l1_penalty": 0.1},
    "standard_new": {"l1_penalty": 0.1},
    "p_anneal": {"initial_sparsity_penalty": 0.02},
}


def loaded(folder, site: str, dtype: torch.dtype = torch.float64) -> LanguageModel:
    sites = single_sites([parse_site(site)])
    lm = LanguageModel.load(str(folder), sites, dtype="float32", device="cpu", whole=True)
    lm.model.to(dtype)
    for norm in [module for module in lm.model.modules() if hasattr(module, "variance_epsilon")]:
        norm.forward = partial(_rms_norm, norm)  # whose own takes float32
    return lm


def _rms_norm(norm: Any, x: Tensor) -> Tensor:
    return norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)


def contexts(n: int = 4, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(3, 30, (n, length), generator=torch.Generator().manual_seed(seed))


def spliced(lm: LanguageModel, site: str, ids_BL: Tensor, batch: int = 3) -> tuple[Splice, Tensor, Tensor]:
    """A splice over several forwards, and what an SAE at the site reads and reconstructs, [N, D]."""
    at = parse_site(site)
    (read,), (written,) = reads(at), writes(at)
    cleans: list[CleanRun] = [lm.clean(ids, single_sites([at])) for ids in ids_BL.split(batch)]
    masks = [counted_tokens(run.ids_BL, IGNORED) for run in cleans]
    rows = [
        torch.cat([run.activations[part][mask] for run, mask in zip(cleans, masks, strict=True)])
        for part in (read, written)
    ]
    return Splice(lm, written, cleans, masks), *rows


def random_sae(name: str, d_in: int = 24, d_sae: int = 40, seed: int = 0, **kind) -> SAE:
    d_out = kind.pop("d_out", d_in)
    widths = (d_in, d_out) if kind.get("transcode") else (d_in,)
    sae = Family(**kind).make(name, widths, d_sae, SETTINGS[name])
    draw = torch.Generator().manual_seed(seed)
    sae.reset(draw)
    for parameter in sae.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=draw)
    if name == "jump_relu":
        sae.threshold.data.abs_()
    if sae.constraint != "free":
        sae.W_dec.data /= sae.W_dec.data.norm(dim=1, keepdim=True)
    return sae.requires_grad_(False)


def finetuner(sae: SAE, *, steps: int = 20, lr: float = 1e-3, kl_weight: float = 1.0, **options) -> Finetuner:
    options = {"l0_before": 4.0, "norm_factors": (2.0, 3.0)[: len(sae.widths)]} | options
    return Finetuner("an SAE", sae, finetuning_schedule(steps, 44), lr=lr, kl_weight=kl_weight, **options)


def batch_of(trainer: Finetuner, x_ND: Tensor, y_ND: Tensor) -> Tensor:
    if len(trainer.norm_factors) == 1:
        return x_ND / trainer.norm_factors[0]
    return torch.cat([z / factor for z, factor in zip((x_ND, y_ND), trainer.norm_factors, strict=True)], 1)


def plain_kl(lm: LanguageModel, site: str, ids_BL: Tensor, y_hat_ND: Tensor) -> Tensor:
    """KL by a forward hook on the whole model, without a clean run's help; of sites that are outputs."""
    tap, done = lm.taps[writes(parse_site(site))[0]], 0
    with torch.no_grad():
        p = lm.model(ids_BL).logits.log_softmax(-1)
    mask_BL = ~torch.isin(ids_BL, IGNORED)
    mask_BL[:, 0] = False

    def replace(module, args, output):
        nonlocal done
        done += 1
        y = output[0] if isinstance(output, tuple) else output
        y = y.masked_scatter(mask_BL[..., None], y_hat_ND)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    handle = tap.module.register_forward_hook(replace)
    q = lm.model(ids_BL).logits.log_softmax(-1)
    handle.remove()
    assert done == 1
    predicts_BL = mask_BL.clone()
    predicts_BL[:, -1] = False
    return (p.exp() * (p - q)).sum(-1)[predicts_BL].mean()


@pytest.mark.parametrize("site", ["resid_post.0", "resid_post.2", "mlp_out.1", "attn_out.2"])
def test_kl_and_its_gradient_are_those_of_the_whole_model(tiny_model, site, monkeypatch):
    monkeypatch.setattr("monosemy.training.finetune.HEAD_ELEMENTS", 200)  # several pieces of logits
    lm, ids_BL = loaded(tiny_model, site), contexts()
    splice, _, y_ND = spliced(lm, site, ids_BL)
    noise_ND = torch.randn(y_ND.shape, dtype=y_ND.dtype, generator=torch.Generator().manual_seed(1))
    ours = (y_ND + 0.1 * noise_ND).requires_grad_()
    plain = ours.detach().clone().requires_grad_()
    kl, reference = splice.kl(ours), plain_kl(lm, site, ids_BL, plain)
    (2 * kl).backward()
    (2 * reference).backward()
    assert float(kl.detach()) == pytest.approx(float(reference.detach()), rel=1e-10)
    assert ours.grad.abs().max() > 0
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("site", SITES)
def test_the_gradient_is_that_of_finite_differences(tiny_model, site):
    lm = loaded(tiny_model, site)
    splice, _, y_ND = spliced(lm, site, contexts(3))
    draw = torch.Generator().manual_seed(1)
    at = (y_ND + 0.1 * torch.randn(y_ND.shape, dtype=y_ND.dtype, generator=draw)).requires_grad_()
    splice.kl(at).backward()
    for _ in range(3):
        direction = torch.randn(y_ND.shape, dtype=y_ND.dtype, generator=draw)
        above, below = (splice.kl(at.detach() + step * direction) for step in (1e-5, -1e-5))
        assert float((at.grad * direction).sum()) == pytest.approx(float(above - below) / 2e-5, rel=1e-5)


@pytest.mark.parametrize("site", SITES)
def test_kl_of_the_untouched_activations_is_zero(tiny_model, site):
    lm = loaded(tiny_model, site, torch.float32)
    splice, _, y_ND = spliced(lm, site, contexts())
    kl = splice.kl(y_ND.clone().requires_grad_())
    assert kl == 0
    kl.backward()


def test_an_identity_loses_nothing(tiny_model):
    site = "resid_post.1"
    lm, eye = loaded(tiny_model, site), torch.eye(24)
    sae = Standard(24, 48, l1_penalty=0.0).requires_grad_(False)
    sae.W_enc.copy_(torch.cat([eye, -eye]))
    sae.W_dec.copy_(torch.cat([eye, -eye]))
    splice, x_ND, y_ND = spliced(lm, site, contexts())
    trainer = finetuner(sae)
    trainer.sae.double()
    trainer.splice = splice
    result = trainer.forward(batch_of(trainer, x_ND, y_ND), 0, 1.0)
    assert 0 <= result.metrics["kl"] < 1e-12 and result.metrics["mse"] < 1e-20
    assert all(gradient.isfinite().all() for gradient in result.grads.values())


def test_the_tokens_are_those_that_evaluation_counts(tiny_model):
    lm, ids_BL = loaded(tiny_model, "resid_post.1", torch.float32), contexts(6)
    site = parse_site("resid_post.1")
    x_BLD = lm.activations(ids_BL)[site]
    limit = float(x_BLD.norm(dim=-1).flatten().quantile(0.8))
    mask_BL = counted_tokens(ids_BL, IGNORED, [x_BLD], [limit])
    assert torch.equal(mask_BL, _SiteEvaluation(site, {}, IGNORED, limit).counted(ids_BL, [x_BLD]))
    assert not mask_BL[:, 0].any() and not mask_BL[torch.isin(ids_BL, IGNORED)].any()
    assert 0 < mask_BL.sum() < (~torch.isin(ids_BL[:, 1:], IGNORED)).sum()


def test_only_counted_tokens_are_replaced(tiny_model):
    """What the next layer reads in a spliced run."""
    lm, ids_BL = loaded(tiny_model, "resid_post.1"), contexts()
    splice, _, y_ND = spliced(lm, "resid_post.1", ids_BL, batch=4)
    read = []
    hook = lm.layers[2].register_forward_pre_hook(lambda _, args: read.append(args[0]))
    splice.run(splice.cleans[0], splice.masks[0], torch.full_like(y_ND, 7.0))
    hook.remove()
    clean_BLD, mask_BL = splice.cleans[0].activations[splice.site], splice.masks[0]
    assert (read[0][mask_BL] == 7).all() and torch.equal(read[0][~mask_BL], clean_BLD[~mask_BL])
    assert 0 < (~mask_BL).sum() < mask_BL.numel()


def objective_again(trainer: Finetuner, lm: LanguageModel, site: str, ids_BL: Tensor, batch: Tensor):
    """The loss of a batch of a TopK or ReLU SAE in plain autograd: dense codes, the whole model."""
    sae = copy.deepcopy(trainer.sae).requires_grad_()
    x_BD, y_BD = (batch, batch) if len(trainer.norm_factors) == 1 else batch.split(24, 1)
    pre_BF = (x_BD - sae.b_dec if sae.pre_bias else x_BD) @ sae.W_enc.T + sae.b_enc
    kept = pre_BF.topk(4, dim=1) if sae.name == "top_k" else pre_BF.flatten().topk(4 * len(pre_BF))
    if sae.name == "top_k":
        f_BF = torch.zeros_like(pre_BF).scatter(1, kept.indices, kept.values.relu())
    elif sae.name == "standard":
        f_BF = pre_BF.relu()
    else:
        flat = torch.zeros_like(pre_BF).flatten().scatter(0, kept.indices, kept.values.relu())
        f_BF = flat.view_as(pre_BF)
    y_hat_BD = f_BF @ sae.W_dec + sae.b_dec
    prefix_mse = []
    if sae.name == "matryoshka_batch_top_k":
        half = f_BF[:, :10] @ sae.W_dec[:10] + sae.b_dec
        prefix_mse.append((y_BD - half).square().sum(1).mean())
    if getattr(sae, "W_skip", None) is not None:
        y_hat_BD = y_hat_BD + x_BD @ sae.W_skip.T
    mse = torch.stack([*prefix_mse, (y_BD - y_hat_BD).square().sum(1).mean()]).mean()
    penalty = trainer.pressure * 0.1 * f_BF.sum(1).mean() if sae.name == "standard" else 0
    kl = plain_kl(lm, site, ids_BL, y_hat_BD * trainer.norm_factors[-1])
    alpha, beta = float((mse / kl).detach()), trainer.kl_weight
    loss = (mse + alpha * beta * kl) / (1 + beta) + penalty
    loss.backward()
    return float(loss.detach()), {name: parameter.grad for name, parameter in sae.named_parameters()}


@pytest.mark.parametrize(
    ("name", "site", "kind"),
    [
        ("top_k", "resid_post.1", {}),
        ("batch_top_k", "resid_post.0", {}),
        ("matryoshka_batch_top_k", "mlp_out.1", {}),
        ("standard", "resid_post.1", {}),
        ("batch_top_k", "mlp_in.1:mlp_out.1", {"transcode": True, "skip_connection": True}),
        ("top_k", "resid_mid.0:mlp_out.1", {"transcode": True}),
    ],
)
def test_a_step_minimizes_what_its_docstring_says(tiny_model, name, site, kind):
    lm, ids_BL = loaded(tiny_model, site), contexts()
    sae = random_sae(name, **kind)
    if kind.get("skip_connection"):
        sae.W_skip.normal_(generator=torch.Generator().manual_seed(3))
    splice, x_ND, y_ND = spliced(lm, site, ids_BL)
    trainer = finetuner(sae, kl_weight=3.0)
    trainer.sae.double()
    trainer.splice = splice
    trainer.pressure.fill_(1.5)
    batch = batch_of(trainer, x_ND, y_ND)
    layouts = [True] if trainer.sae.always_sparse else [False, True]
    wanted, gradients = objective_again(trainer, lm, site, ids_BL, batch)
    for trainer.sparse in layouts:
        result = trainer.forward(batch, 0, 1.0)
        assert float(result.metrics["loss"]) == pytest.approx(wanted, rel=1e-9)
        for parameter, gradient in gradients.items():
            torch.testing.assert_close(result.grads[parameter], gradient, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", SETTINGS)
def test_without_kl_it_is_the_architectures_own_loss(tiny_model, name):
    lm, sae = loaded(tiny_model, "resid_post.1", torch.float32), random_sae(name)
    splice, x_ND, y_ND = spliced(lm, "resid_post.1", contexts())
    trainer = finetuner(sae, kl_weight=0.0)
    batch = batch_of(trainer, x_ND, y_ND)
    result = trainer.forward(batch, 0, 1.0)  # without a splice
    codes = trainer.sae.codes(trainer.sae.preactivations(batch, Execution(sparse=trainer.sparse)), result.ctx)
    own = trainer.sae.loss(batch, codes, trainer.sae.active(codes), result.ctx)
    assert torch.equal(result.metrics["loss"], own["loss"]) and "kl" not in result.metrics
    with_kl = finetuner(sae, kl_weight=1e-9)
    with_kl.splice = splice
    close = with_kl.forward(batch, 0, 1.0)
    for parameter, gradient in result.grads.items():
        torch.testing.assert_close(close.grads[parameter], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SETTINGS)
def test_alpha_makes_both_terms_equal(tiny_model, name):
    """So the loss is as large as it was, whatever KL's weight, penalties included."""
    lm, sae = loaded(tiny_model, "resid_post.1", torch.float32), random_sae(name)
    splice, x_ND, y_ND = spliced(lm, "resid_post.1", contexts())
    losses = []
    for kl_weight in (0.0, 1.0, 10.0):
        trainer = finetuner(sae, kl_weight=kl_weight)
        trainer.splice = splice
        metrics = trainer.forward(batch_of(trainer, x_ND, y_ND), 0, 1.0).metrics
        losses.append(float(metrics["loss"]))
        if kl_weight:
            reconstruction = trainer.sae.reconstruction(metrics)
            assert float(metrics["alpha"] * metrics["kl"]) == pytest.approx(float(reconstruction), rel=1e-5)
            assert metrics["kl"] > 0
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_alpha_is_held_fixed():
    mse, kl = (torch.tensor(v, requires_grad=True) for v in (6.0, 2.0))
    parts = balanced({"loss": mse + 1, "mse": mse}, mse, kl, 3.0)
    parts["loss"].backward()
    assert float(parts["loss"].detach()) == 7 and float(parts["alpha"]) == 3
    assert (float(mse.grad), float(kl.grad)) == (0.25, 2.25)


def trained(lm: LanguageModel, site: str, sae: SAE, *, steps: int, lr: float, kl_weight: float, **options):
    """Finetune on fresh contexts; return the trainer and the metrics of its last steps."""
    trainer = finetuner(sae, steps=steps, lr=lr, kl_weight=kl_weight, **options)
    sweep, drawn, records = FinetuningSweep({"": [trainer]}), iter(range(steps)), []

    def batches() -> dict[str, Tensor]:
        trainer.splice, x_ND, y_ND = spliced(lm, site, contexts(8, seed=next(drawn)))
        return {"": batch_of(trainer, x_ND, y_ND)}

    sweep.run(batches, steps, log_steps=1, on_record=records.append)
    assert not sweep.failed
    return trainer, records


def measured(lm: LanguageModel, site: str, sae: SAE) -> tuple[float, float, float]:
    """L0, KL and squared error of a finished SAE on other contexts."""
    splice, x_ND, y_ND = spliced(lm, site, contexts(40, seed=10**6), batch=40)
    y_hat_ND = sae(x_ND)
    l0 = (sae.encode(x_ND) > 0).sum(1).float().mean()
    return float(l0), float(splice.kl(y_hat_ND)), float((y_ND - y_hat_ND).square().sum(1).mean())


def begun(lm: LanguageModel, site: str, name: str) -> tuple[SAE, float]:
    """An SAE of raw activations that training has begun, and the norm factor of that."""
    from monosemy.training.loop import fit
    from monosemy.training.trainer import SAESpec

    rows = [spliced(lm, site, contexts(16, seed=1000 + i))[1:] for i in range(150)]
    paired = writes(parse_site(site)) != reads(parse_site(site))
    fitted = fit(
        rows if paired else [x for x, _ in rows],
        [SAESpec(name, 40, settings=SETTINGS[name], transcode=paired)],
    )
    return fitted.saes[0], fitted.norm_factors


@pytest.mark.parametrize("name", SETTINGS)
def test_predictions_come_nearer_and_l0_stays(tiny_model, name):
    """Nearer than by squared error on the same batches; L0 of TopK kinds comes nearer to k."""
    site, k = "resid_post.1", 4.0
    lm = loaded(tiny_model, site, torch.float32)
    sae, norm_factors = begun(lm, site, name)
    l0, kl, _ = measured(lm, site, sae)
    options = {"steps": 80, "lr": 2e-3, "norm_factors": norm_factors, "l0_before": l0}
    trainers = [trained(lm, site, sae, kl_weight=kl_weight, **options)[0] for kl_weight in (1.0, 0.0)]
    after, control = (measured(lm, site, trainer.finished()) for trainer in trainers)
    assert after[1] < 0.97 * min(kl, control[1])
    for l0_after, *_ in (after, control):
        assert l0_after == pytest.approx(l0, rel=0.05) or (sae.always_sparse and l0 < l0_after < 1.02 * k)
    assert sae.always_sparse == (float(trainers[0].pressure) == 1)
