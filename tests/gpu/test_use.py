"""SAEs in use on the device, on a tiny random model: attached, attributed, steered with, evaluated; numbers
beside those of the same on a CPU. And `monosemy.fit` on pairs that lie there.

L tokens, D width of the model, F latents.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import monosemy
from monosemy import LanguageModel, SAESpec, edit
from monosemy.cross_layer import CrossLayerParts, CrossLayerTranscoder
from monosemy.evaluation.replacement import evaluate_replacement
from monosemy.lm.site_groups import CrossLayer, SitePair, parse_site, single_sites
from monosemy.sae import SAE
from tests.gpu.sizes import DEVICE
from tests.gpu.stepping import at_length
from tests.use.conftest import EVERY, F, language_model, sae_of
from tests.use.test_attach import EDITS, IDS, NEW, Spy, generate, logits, wanted

pytestmark = pytest.mark.gpu
NEAR = {"rtol": 2e-3, "atol": 2e-4}  # of float32 through four layers, summed in another order
ROUNDING = 1e-4  # of a mean over all tokens
ALWAYS = ("batch_top_k", "gated", "jump_relu_tanh")
every = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ALWAYS else at_length) for name in EVERY]
)
ids = IDS.to(DEVICE)
PAIR = {"widths": (32, 32), "transcode": True, "skip_connection": True}
ACROSS = {"widths": (32,) * 8, "transcode": True, "cross_layer": True}


@pytest.fixture(scope="module")
def models() -> tuple[hf.PreTrainedModel, hf.PreTrainedModel]:
    """Return one model on the CPU, and on the device."""
    model = language_model()
    return model, copy.deepcopy(model).to(DEVICE)


@pytest.fixture(scope="module")
def llama(models: tuple[hf.PreTrainedModel, hf.PreTrainedModel]) -> hf.PreTrainedModel:
    return models[1]


def twice(sae: SAE) -> tuple[SAE, SAE]:
    """Return an SAE for the CPU, and an equal one for the device."""
    return sae, copy.deepcopy(sae).to(DEVICE)


# --- attached -----------------------------------------------------------------------------------------------


@every
def test_no_edit_leaves_every_bit(name: str, llama: hf.PreTrainedModel) -> None:
    sae, clean = sae_of(name).to(DEVICE), logits(llama, ids)
    for edits in ({}, {latent: edit.scale(1) for latent in range(F)}, lambda f: f):
        with monosemy.attached(llama, {sae: edits}, positions=slice(None)):
            assert torch.equal(logits(llama, ids), clean)
    with monosemy.attached(llama, {sae: EDITS}):
        assert not torch.equal(logits(llama, ids), clean)
    assert torch.equal(logits(llama, ids), clean)


@every
def test_every_generated_token_has_the_edit(name: str, llama: hf.PreTrainedModel) -> None:
    sae, layer = sae_of(name).to(DEVICE), llama.model.layers[1]
    with Spy(layer) as before, monosemy.attached(llama, {sae: EDITS}) as counts, Spy(layer) as after:
        del before[:], after[:]  # of looking for the site
        with_edits = generate(llama, ids)
    x, y = torch.cat(before, 1), torch.cat(after, 1)
    assert x.device.type == DEVICE.type and x.shape[1] == 9 + NEW - 1
    torch.testing.assert_close(y[:, 1:], wanted(sae, x)[:, 1:], **NEAR)
    assert torch.equal(y[:, :1], x[:, :1]) and ((y - x)[:, 1:].abs().amax(-1) > 0.1).all()
    assert counts[sae].changed == counts[sae].tokens - len(IDS)
    assert not torch.equal(with_edits, generate(llama, ids))


@every
def test_edited_logits_are_those_of_the_cpu(
    name: str, models: tuple[hf.PreTrainedModel, hf.PreTrainedModel]
) -> None:
    found = []
    for model, sae in zip(models, twice(sae_of(name)), strict=True):
        with monosemy.attached(model, {sae: {17: 4.0, 8: edit.scale(-2)}}):
            found.append(logits(model, IDS.to(model.device)).cpu())
    torch.testing.assert_close(found[1], found[0], **NEAR)


def test_a_bfloat16_model(llama: hf.PreTrainedModel) -> None:
    model, sae = copy.deepcopy(llama).bfloat16(), sae_of("jump_relu").to(DEVICE)
    layer, clean = model.model.layers[1], logits(model, ids)
    with Spy(layer) as before, monosemy.attached(model, {sae: EDITS}), Spy(layer) as after:
        assert logits(model, ids).dtype == torch.bfloat16
    x, y = before[-1], after[-1]
    torch.testing.assert_close(y[:, 1:].float(), wanted(sae, x.float())[:, 1:], rtol=8e-3, atol=8e-3)
    with monosemy.attached(model, {sae: {}}):
        assert torch.equal(logits(model, ids), clean)


@pytest.mark.parametrize("family", [PAIR, ACROSS], ids=["transcoder", "across"])
def test_transcoders_are_attached_where_they_write(
    family: dict[str, Any], models: tuple[hf.PreTrainedModel, hf.PreTrainedModel]
) -> None:
    found, site = [], "mlp_in.1:mlp_out.1" if family is PAIR else "mlp_in.0-3:mlp_out.0-3"
    for model, sae in zip(models, twice(sae_of("batch_top_k", site=site, **family)), strict=True):
        on = IDS.to(model.device)
        with monosemy.attached(model, {sae: {}}):
            assert torch.equal(logits(model, on), logits(model, on))
        with monosemy.attached(model, {sae: {17: 4.0}}):
            found.append(logits(model, on).cpu())
    torch.testing.assert_close(found[1], found[0], **NEAR)
    assert not torch.allclose(found[0], logits(models[0]), **NEAR)


# --- what latents do ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [None, 3])
def test_attribution_is_that_of_the_cpu(
    steps: int | None, models: tuple[hf.PreTrainedModel, hf.PreTrainedModel]
) -> None:
    kinds = [sae_of("gated"), sae_of("jump_relu", site="mlp_in.2:mlp_out.2", seed=1, **PAIR)]
    both = list(zip(*map(twice, kinds), strict=True))
    found = [
        monosemy.attribute(model, list(saes), IDS[0].to(model.device), (7, 3), steps=steps)
        for model, saes in zip(models, both, strict=True)
    ]
    assert found[1].value == pytest.approx(found[0].value, rel=1e-3)
    for on_cpu, on_device in zip(*both, strict=True):
        was, now = found[0][on_cpu], found[1][on_device]
        largest = float(was.effects_N.abs().max())
        for one, other in ((was.effects_N, now.effects_N), (was.error_L, now.error_L)):
            torch.testing.assert_close(other.cpu(), one, rtol=2e-3, atol=2e-3 * largest)
        assert torch.equal(now.latents_N.cpu(), was.latents_N) and largest > 0
        assert now.total == pytest.approx(was.total, rel=2e-3, abs=2e-3 * largest)
        if steps:
            assert now.change == pytest.approx(was.change, rel=1e-3, abs=1e-3)
    first, second = (found[1].strongest(5), found[0].strongest(5))
    assert [part[:3] for part in first] == [part[:3] for part in second]


def test_attribution_across_layers_is_that_of_the_cpu(
    models: tuple[hf.PreTrainedModel, hf.PreTrainedModel],
) -> None:
    both = twice(sae_of("jump_relu", site="mlp_in.0-3:mlp_out.0-3", **ACROSS))
    was, now = (
        monosemy.attribute(model, sae, IDS[0].to(model.device), 7)[sae]
        for model, sae in zip(models, both, strict=True)
    )
    largest = float(was.effects_N.abs().max())
    torch.testing.assert_close(now.effects_N.cpu(), was.effects_N, rtol=2e-3, atol=2e-3 * largest)
    assert torch.equal(now.latents_N.cpu(), was.latents_N) and largest > 0


def test_steering_is_what_a_rise_adds(llama: hf.PreTrainedModel, tmp_path: Path) -> None:
    sae = sae_of("gated").to(DEVICE)
    with monosemy.attached(llama, {sae: {17: edit.add(3.0)}}, positions=slice(None)):
        expected = logits(llama, ids)
    vector_D = monosemy.steering_vector(sae, 17, 3.0)
    assert vector_D.device.type == DEVICE.type
    with llama.model.layers[1].register_forward_hook(lambda _, args, out: out + vector_D):
        torch.testing.assert_close(logits(llama, ids), expected, **NEAR)
    path = tmp_path / "steer.pt"
    assert monosemy.write_steering(path, llama, {sae: {17: edit.add(3.0)}}) == {"layers.1": "add"}
    written = torch.load(path, weights_only=True)["layers.1"]["steering_vector"]
    assert written.device.type == "cpu" and torch.equal(written, vector_D.cpu())


@every
def test_folding_keeps_the_function(name: str) -> None:
    """The decoder's norms, the norm factors and the center, folded in on the device."""
    sae = sae_of(name).to(DEVICE).requires_grad_(False)
    x_BD = torch.randn(50, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    center_D = torch.linspace(-1, 1, 32, device=DEVICE)
    wanted_BD = sae(x_BD)
    if sae.constraint == "free":  # of the others the norms are 1 in training
        sae.fold_decoder_norm_()
        torch.testing.assert_close(sae(x_BD), wanted_BD, **NEAR)
        norms_F = torch.linalg.vector_norm(sae.W_dec, dim=1)
        torch.testing.assert_close(norms_F, torch.ones(F, device=DEVICE))
    sae.fold_center_(center_D)
    sae.fold_norm_factor_(3.0)
    torch.testing.assert_close(sae(3 * (x_BD + center_D)), 3 * (wanted_BD + center_D), rtol=2e-3, atol=2e-3)


# --- evaluated ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(models: tuple[hf.PreTrainedModel, hf.PreTrainedModel]) -> list[list[dict[str, Any]]]:
    """Return rows of every kind, of the CPU and of the device."""
    kinds: dict[str, SAE] = {name: sae_of(name) for name in EVERY}
    kinds["pair"] = sae_of("batch_top_k", site="mlp_in.2:mlp_out.2", **PAIR)
    kinds["across"] = sae_of("jump_relu", site="mlp_in.0-3:mlp_out.0-3", **ACROSS)
    kinds["cross"] = sae_of("batch_top_k", site="resid_post.0+resid_post.2", widths=(32, 32), crosscode=True)
    places = {name: parse_site(sae.metadata["site"]) for name, sae in kinds.items()}
    found = []
    for model in models:
        lm = LanguageModel(copy.deepcopy(model), single_sites(list(places.values())))
        saes = {name: (places[name], copy.deepcopy(sae).to(lm.device)) for name, sae in kinds.items()}
        saes = {name: (site, sae.requires_grad_(False)) for name, (site, sae) in saes.items()}
        found.append(monosemy.evaluate_on_model(lm, saes, contexts(), ignore_ids=torch.tensor([0, 5])))
    return found


def contexts() -> Tensor:
    return torch.randint(1, 97, (12, 16), generator=torch.Generator().manual_seed(0))


def check_rows(was: dict[str, Any], now: dict[str, Any]) -> None:
    """Hold every number of a row to that of the CPU."""
    assert was.keys() == now.keys()
    wrong = {}
    for column, value in was.items():
        if isinstance(value, float) or isinstance(now[column], float):
            near = now[column] == pytest.approx(value, rel=20 * ROUNDING, abs=20 * ROUNDING, nan_ok=True)
        elif isinstance(value, dict) and column == "by_site":
            for site, columns in value.items():
                check_rows(columns, now[column][site])
            near = True
        else:
            near = isinstance(value, list | dict) or now[column] == value
        if not near:
            wrong[column] = (value, now[column])
    assert not wrong


def test_evaluation_is_that_of_the_cpu(evaluated: list[list[dict[str, Any]]]) -> None:
    was, now = evaluated
    assert len(was) == len(now) == len(EVERY) + 3
    for one, other in zip(was, now, strict=True):
        check_rows(one, other)


def replacing(model: hf.PreTrainedModel, saes: list[SAE]) -> dict[str, Any]:
    """Return the row of a model in which the MLPs of all layers are replaced."""
    across = CrossLayer.parse("mlp_in.0-3:mlp_out.0-3")
    lm = LanguageModel(copy.deepcopy(model), single_sites([across]))
    made: dict[SitePair, Any] = dict(zip(across.pairs, saes, strict=False))
    if isinstance(saes[0], CrossLayerTranscoder):
        made = CrossLayerParts.of(saes[0], across.pairs)
    return evaluate_replacement(lm, made, contexts(), ignore_ids=torch.tensor([0, 5]), batch_size=5)


@pytest.mark.parametrize("kind", ["transcoders", "across"])
def test_a_replaced_model_is_that_of_the_cpu(
    kind: str, models: tuple[hf.PreTrainedModel, hf.PreTrainedModel]
) -> None:
    saes = [sae_of("jump_relu", seed=i, **PAIR) for i in range(4)]
    if kind == "across":
        saes = [sae_of("jump_relu", **ACROSS)]
    both = [[one.requires_grad_(False) for one in of] for of in zip(*map(twice, saes), strict=True)]
    was, now = (replacing(model, of) for model, of in zip(models, both, strict=True))
    agrees = "top1_agreement", "errors_carry"  # a token of two near ones may change
    check_rows(*({name: value for name, value in row.items() if name not in agrees} for row in (was, now)))
    assert now["top1_agreement"] == pytest.approx(was["top1_agreement"], abs=0.02)
    assert now["ce_with_errors"] == pytest.approx(now["ce_clean"], rel=1e-4) and now["errors_kl"] < 1e-4
    assert now["kl"] > 0.01


# --- trained without a model --------------------------------------------------------------------------------


class Pairs:
    """Batches of what a component reads and what it writes: a matrix and a ReLU of it."""

    def __len__(self) -> int:
        return 30

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        draw = torch.Generator().manual_seed(0)
        W_DD = torch.randn(24, 16, generator=draw)
        for _ in range(len(self)):
            x_BD = torch.randn(64, 24, generator=draw)
            yield x_BD.to(DEVICE), (x_BD @ W_DD).relu().to(DEVICE)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_fit_on_pairs_that_lie_on_the_device(bf16: bool) -> None:
    kinds: list[dict[str, Any]] = [{"skip_connection": True}, {}]
    specs = [
        SAESpec(name, 64, 3e-3, settings={"k": 6} if "k" in name else {}, transcode=True, **kind)
        for name in ("top_k", "jump_relu")
        for kind in kinds
    ]
    fitted, again = (monosemy.fit(Pairs(), specs, bf16=bf16, device=DEVICE, log_steps=5) for _ in range(2))
    x_BD, y_BD = next(iter(Pairs()))
    for sae, other in zip(fitted.saes, again.saes, strict=True):
        assert all(torch.equal(t, other.state_dict()[n]) for n, t in sae.state_dict().items())
        y_hat = sae.to(DEVICE)(x_BD)
        assert (y_hat - y_BD).square().sum() < 0.9 * (y_BD - y_BD.mean(0)).square().sum()
