"""What a user does with an SAE: print it, ask what it is, encode odd and wrong inputs, and save it."""

import numpy as np
import pytest
import torch

import monosemy
from monosemy.sae import architecture
from tests.architectures.test_contract import SETTINGS, D, F, batch, every, trained
from tests.layout_trees import TREES, K


@every
def test_print_tells_kind_widths_and_settings(name):
    sae = architecture(name)(D, F, **SETTINGS[name])
    shown = repr(sae)
    assert shown.startswith(f"{type(sae).__name__}(d_in={D}, d_sae={F}")
    assert all(f"{setting}={value:g}" in shown for setting, value in SETTINGS[name].items())


@every
def test_an_sae_says_what_and_where_it_is(name):
    sae = trained(name, 3).finished()
    assert (sae.d_in, sae.d_sae, sae.device, sae.dtype) == (D, F, torch.device("cpu"), torch.float32)
    assert (
        sae.cfg
        == sae.cfg
        | {"architecture": name, "d_in": D, "d_sae": F, "device": "cpu", "dtype": "float32"}
        | SETTINGS[name]
    )
    assert hasattr(sae, "k") == ("k" in SETTINGS[name]) and getattr(sae, "k", None) == SETTINGS[name].get("k")
    assert sae.bfloat16().dtype == torch.bfloat16


@every
def test_no_tokens_are_encoded_to_none(name):
    sae = trained(name, 3).finished()
    for shape in ((0, D), (2, 0, D), (0, 3, D)):
        for mode in sae.modes:
            assert sae.encode(torch.zeros(shape), mode=mode).shape == (*shape[:-1], F)
        assert sae.encode(torch.zeros(shape), latents=[3, 5]).shape == (*shape[:-1], 2)
        assert sae.encode(torch.zeros(shape), latents=[]).shape == (*shape[:-1], 0)
        assert sae(torch.zeros(shape)).shape == shape


@every
def test_activations_of_another_precision_are_taken_in_the_sae_s(name):
    sae = trained(name, 50).finished()
    x = batch(3)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(sae.encode(x.to(dtype)), sae.encode(x.to(dtype).float()))


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (torch.zeros(2, D + 1), rf"x.shape is \(2, {D + 1}\); allowed: \[.., {D}\].*d_in {D}"),
        (torch.zeros(()), "x.shape"),
        (np.zeros((2, D)), "x is 'ndarray'.*torch tensor"),
        ([[0.0] * D], "x is 'list'"),
        (torch.zeros(2, D, dtype=torch.long), "x.dtype is 'torch.int64'"),
        (torch.zeros(2, D, device="meta"), "x.device is 'meta'; allowed: cpu"),
    ],
    ids=["width", "number", "numpy", "list", "whole numbers", "device"],
)
@every
def test_what_is_no_activation_is_refused_in_a_line(name, x, said):
    sae = architecture(name)(D, F, **SETTINGS[name])
    for call in (sae.encode, sae, lambda x: sae.encode(x, latents=[1])):
        with pytest.raises(ValueError, match=said) as refused:
            call(x)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("latents", "said"),
    [
        ([F], rf"latents is '{F} to {F}'; allowed: whole numbers from 0 to {F - 1}"),
        (torch.tensor([0, -1]), "latents is '-1 to 0'"),
        (torch.tensor([0.5]), "float32"),
        (torch.zeros(2, 2, dtype=torch.long), r"shape \(2, 2\)"),
        (torch.ones(F - 1, dtype=torch.bool), "bool"),
        (3, "of shape"),
    ],
)
def test_latents_that_are_not_there_are_refused(latents, said):
    with pytest.raises(ValueError, match=said):
        architecture("standard")(D, F).encode(batch(0), latents=latents)


def test_latents_may_be_a_list_or_a_mask():
    sae = trained("batch_top_k", 50).finished()
    f = sae.encode(batch(3))
    mask = torch.arange(F) % 7 == 0
    for latents in (mask, mask.nonzero()[:, 0], mask.nonzero()[:, 0].tolist(), mask.nonzero()[:, 0].int()):
        assert torch.allclose(sae.encode(batch(3), latents=latents), f[:, mask], atol=1e-5)


def test_latents_of_another_width_are_not_decoded():
    with pytest.raises(ValueError, match=rf"f.shape is \(2, {D}\); allowed: \[.., {F}\]"):
        architecture("standard")(D, F).decode(torch.zeros(2, D))


# --- odd activations, in training ---------------------------------------------------------------------------

ODD = {
    "zeros": torch.zeros(64, D),
    "constant": torch.ones(64, D),
    "large and constant": torch.full((64, D), 1e20),
    "one token": batch(0)[:1],
    "one token of zeros": torch.zeros(1, D),
    "two equal tokens": batch(0)[:1].repeat(2, 1),
    "tiny": 1e-25 * batch(0),
}


@pytest.mark.parametrize("odd", sorted(ODD))
def test_activations_that_do_not_vary_are_trained_on(odd):
    """With dead latents, whose auxiliary loss divides by the variance of what is left over: zero here."""
    specs = [monosemy.SAESpec(name, F, settings=settings) for name, settings in SETTINGS.items()]
    fitted = monosemy.fit([ODD[odd]] * 40, specs, dead_feature_threshold=2 * len(ODD[odd]), log_steps=10)
    assert (fitted.status, fitted.failed) == ("complete", {})
    for sae in fitted.saes:
        assert all(tensor.isfinite().all() for tensor in sae.state_dict().values()), sae.name


def test_a_residual_of_zero_in_the_middle_changes_nothing_else():
    """A batch that is reconstructed without error between others: finite, and the steps after it go on."""
    x = batch(0)
    specs = [monosemy.SAESpec("batch_top_k", F, settings={"k": 8})]
    fitted = monosemy.fit([x, torch.zeros_like(x), x] * 20, specs, dead_feature_threshold=2 * len(x))
    assert fitted.status == "complete" and fitted.metrics[-1]["mse"] < fitted.metrics[0]["mse"]


# --- what cannot be trained ---------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [-1.0, float("nan"), float("inf"), -float("inf")])
def test_a_learning_rate_is_a_number_of_0_or_more(lr):
    with pytest.raises(ValueError, match=f"lr is {lr!r}; allowed: a number, 0 or more"):
        monosemy.SAESpec("top_k", F, lr=lr)


@pytest.mark.parametrize("d_sae", [0, -4, 8.0, True])
def test_a_width_is_a_whole_number(d_sae):
    with pytest.raises(ValueError, match="d_sae is"):
        monosemy.SAESpec("top_k", d_sae)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("standard", {"l1_penalty": -0.1}),
        ("standard", {"l1_penalty": float("nan")}),
        ("gated", {"l1_penalty": float("inf")}),
        ("p_anneal", {"p_end": -1.0}),
        ("jump_relu", {"bandwidth": 0.0}),
        ("jump_relu", {"target_l0": 0.0}),
        ("jump_relu", {"l0_loss": "absolute"}),
        ("jump_relu_tanh", {"kernel_width": 0.0}),
        ("jump_relu_tanh", {"ramp": 1.5}),
        ("batch_top_k", {"auxk_alpha": float("nan")}),
    ],
)
def test_settings_that_no_sae_can_have_are_refused(name, settings):
    (field,) = settings
    with pytest.raises(ValueError, match=f"{field} is"):
        monosemy.fit([batch(0)], [monosemy.SAESpec(name, F, settings=settings)])


@pytest.mark.parametrize(
    "what", [{"steps": 0}, {"steps": -1}, {"log_steps": 0}, {"checkpoint_every": 0}, {"saes": []}]
)
def test_fit_refuses_counts_below_1(what):
    (field,) = what
    with pytest.raises(ValueError, match=f"{field} is"):
        monosemy.fit([batch(0)], **({"saes": [monosemy.SAESpec("standard", F)]} | what))


def test_settings_that_another_tool_s_files_do_not_say_are_not_made_up(tmp_path):
    """Gemma Scope's say no target L0: ours would be shown, and saved, as if it had been theirs."""
    tree = TREES["gemma_scope"]()
    sae = monosemy.load(tree.write(tmp_path))
    assert repr(sae) == f"JumpReLU(d_in={sae.d_in}, d_sae={sae.d_sae})" and "target_l0" not in sae.cfg
    sae.save_pretrained(tmp_path / "ours")
    assert repr(monosemy.load(tmp_path / "ours")) == repr(sae)
    top_k = TREES["sparsify"]()
    assert f"k={K}" in repr(monosemy.load(top_k.write(tmp_path / "other")))


@pytest.mark.parametrize("device", ["mps", "xpu", "cuda:99", "gpu"])
def test_fit_refuses_a_device_that_it_cannot_train_on(device):
    with pytest.raises(ValueError, match=f"device is '{device}'"):
        monosemy.fit([batch(0)], [monosemy.SAESpec("standard", F)], device=device)
