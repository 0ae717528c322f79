"""What every architecture promises, over the registry.

A new one is one row in SETTINGS. B tokens, D d_in, F d_sae.
"""

import copy

import pytest
import torch

from benchmarks.alone import LoneTrainer
from monosemy import formats
from monosemy.codes import Execution
from monosemy.config import architecture_names
from monosemy.formats import dictionary_learning
from monosemy.recipe import DICTIONARY_LEARNING, MONOSEMY
from monosemy.sae import StepContext, architecture
from monosemy.schedule import Schedule
from monosemy.system.rng import generator
from monosemy.training.trainer import SAESpec
from tests import synthetic

B, D, F = 128, 16, 64
SETTINGS = {
    "standard": {"l1_penalty": 0.02},
    "standard_new": {"l1_penalty": 0.02},
    "gated": {"l1_penalty": 0.02},
    "p_anneal": {"initial_sparsity_penalty": 0.02},
    "jump_relu": {"target_l0": 8, "bandwidth": 0.01},
    "jump_relu_tanh": {"tanh_penalty": 0.02},
    "top_k": {"k": 8},
    "batch_top_k": {"k": 8},
    "matryoshka_batch_top_k": {"k": 8},
}
every = pytest.mark.parametrize("name", sorted(SETTINGS))


def batch(step, scale=1.0):
    return synthetic.batch(step, B, D, scale=scale)


def member(name, steps=60, seed=0, **how):
    return LoneTrainer(
        name,
        SAESpec(name, F, lr=3e-3, seed=seed, settings=SETTINGS[name]),
        D,
        Schedule.of_run(steps, B),
        **how,
    )


def trained(name, steps=60, **how):
    m = member(name, steps, **how)
    for step in range(steps):
        m.step(batch(step), step)
    return m


def parts(sae, x, ctx, *, sparse=True):
    codes = sae.codes(sae.preactivations(x, Execution(sparse=sparse)), ctx)
    return sae.loss(x, codes, sae.active(codes), ctx)


def snapshot(m):
    return {n: t.clone() for n, t in m.save().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_every_architecture_is_under_contract():
    assert set(SETTINGS) == set(architecture_names())
    assert [architecture(name).name for name in SETTINGS] == list(SETTINGS)


@every
def test_the_gradient_is_the_loss_s_slope(name):
    """Central differences in float64, along random directions, at a state where every part of the loss is at
    work."""
    m = trained(name, 40)
    sae = copy.deepcopy(m.sae).double()
    x = batch(99).double()
    dead = torch.zeros(F, dtype=torch.bool)
    dead[::7] = True
    at = StepContext(35, m.schedule, dead_F=dead)
    # its gradient is an estimate, not the slope
    moved = {n: p for n, p in sae.named_parameters() if n != "threshold"}
    # this one's estimate goes through pre-activations; its formula below has all gradients
    if name == "jump_relu_tanh":
        moved = {n: p for n, p in moved.items() if n not in ("W_enc", "b_enc")}
    # the gate's own term holds the decoder fixed, so the slope along it is not the gradient
    if name == "gated":
        moved = {n: p for n, p in moved.items() if n not in ("W_dec", "b_dec")}

    def loss():
        return parts(sae, x, at)["loss"]

    gradients = dict(
        zip(moved, torch.autograd.grad(loss(), list(moved.values()), allow_unused=True), strict=True)
    )
    eps = 1e-7
    for i, (n, p) in enumerate(moved.items()):
        direction = torch.randn(p.shape, generator=generator(i, "direction"), dtype=torch.float64)
        if "auxk" in parts(sae, x, at) and n in ("W_dec", "W_enc", "b_enc", "b_dec"):
            continue  # AuxK holds the residual fixed; its gradients are checked below
        p.data.add_(eps * direction)
        above = float(loss())
        p.data.sub_(2 * eps * direction)
        below = float(loss())
        p.data.add_(eps * direction)
        slope, wanted = (above - below) / (2 * eps), float((gradients[n] * direction).sum())
        assert slope == pytest.approx(wanted, rel=2e-4, abs=1e-6), n


@pytest.mark.parametrize("name", ["top_k", "batch_top_k", "matryoshka_batch_top_k"])
def test_auxk_by_plain_autograd(name):
    """The loss written again in dense torch, differentiated by autograd: equal value and gradients of every
    parameter."""
    m = trained(name, 40)
    sae = copy.deepcopy(m.sae).double()
    x = batch(99).double()
    dead = torch.zeros(F, dtype=torch.bool)
    dead[::7] = True
    at = StepContext(35, m.schedule, dead_F=dead)
    parameters = list(sae.parameters())
    ours = parts(sae, x, at)
    assert float(ours["auxk"]) > 0
    k, pre = SETTINGS[name]["k"], ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).relu()
    if name == "top_k":
        kept = torch.zeros_like(pre, dtype=torch.bool).scatter_(1, pre.topk(k, 1).indices, True)
    else:
        kept = (
            torch.zeros_like(pre, dtype=torch.bool)
            .view(-1)
            .scatter_(0, pre.flatten().topk(k * B).indices, True)
            .view_as(pre)
        )
    f = torch.where(kept, pre, 0)
    sizes = sae.group_sizes if name.startswith("matryoshka") else [F]
    edges = torch.tensor(sizes).cumsum(0).tolist()
    errors = [x - f[:, :e] @ sae.W_dec[:e] - sae.b_dec for e in edges]
    e = errors[-1].detach()
    among = torch.where(dead, pre, -1)
    k_aux = min(D // 2, int(dead.sum()))
    chosen = torch.zeros_like(pre, dtype=torch.bool).scatter_(1, among.topk(k_aux, 1).indices, True)
    auxk = (e - torch.where(chosen, pre, 0) @ sae.W_dec).square().sum(1).mean() / (
        e - e.mean(0)
    ).square().sum(1).mean()
    loss = torch.stack([r.square().sum(1).mean() for r in errors]).mean() + sae.settings.auxk_alpha * auxk
    assert float(ours["loss"]) == pytest.approx(float(loss), rel=1e-10)
    for n, a, b in zip(
        dict(sae.named_parameters()),
        torch.autograd.grad(ours["loss"], parameters),
        torch.autograd.grad(loss, parameters),
        strict=True,
    ):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-12), n


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_gemma_scope_2_s_target_is_its_formula(sparse):
    """lambda (2 / L0*) (L0 - L0*)^2 of each token, and its gradients by the rectangle kernel, written out in
    dense float64."""
    target, weight, bandwidth = 8.0, 0.3, 0.05
    sae = copy.deepcopy(trained("jump_relu", 40).sae).double()
    settings = {"target_l0": target, "sparsity_penalty": weight, "bandwidth": bandwidth}
    theirs = architecture("jump_relu")(D, F, **settings, l0_loss="gemma_scope_2").double()
    theirs.load_state_dict(sae.state_dict())
    x = batch(99).double()
    ours = parts(theirs, x, StepContext(35, Schedule.of_run(60, B), sparsity_scale=0.5), sparse=sparse)
    pre = x @ sae.W_enc.T + sae.b_enc
    l0_B = (pre > sae.threshold).sum(1).double()
    assert l0_B.std() > 1  # else the mean of squares would be the square of the mean
    wanted = (2 / target) * (l0_B - target).square().mean()
    assert float(ours["sparsity"]) == pytest.approx(float(wanted), rel=1e-12)
    assert float(ours["loss"] - ours["mse"]) == pytest.approx(0.5 * weight * float(wanted), rel=1e-9)
    near_BF = ((pre - sae.threshold).abs() <= bandwidth / 2).double()
    slope_F = (((2 / target) * 2 * (l0_B - target) / B)[:, None] * (-near_BF / bandwidth)).sum(0)
    assert slope_F.abs().max() > 0
    (gradient_F,) = torch.autograd.grad(ours["sparsity"], [theirs.threshold])
    assert torch.allclose(gradient_F, slope_F, rtol=1e-9, atol=1e-12)


def test_at_equal_l0s_gemma_scope_2_s_target_is_2_l0_times_as_strong_as_ours():
    """So that a weight does not carry over from one to the other."""
    sae = trained("jump_relu", 40).sae
    found = {}
    for l0_loss in ("relative", "gemma_scope_2"):
        one = architecture("jump_relu")(D, F, target_l0=5.0, bandwidth=0.01, l0_loss=l0_loss)
        one.load_state_dict(sae.state_dict())
        x = batch(3)[:1].repeat(B, 1)
        found[l0_loss] = float(parts(one, x, StepContext(35, Schedule.of_run(60, B)))["sparsity"])
    assert found["gemma_scope_2"] == pytest.approx(2 * 5.0 * found["relative"], rel=1e-5)


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_the_tanh_penalty_is_its_formula(sparse):
    """Anthropic's objective, and its gradients by the rectangle kernel, written out in dense float64; the
    settings are in units in which x has a mean square norm of d_in."""
    weights = {"tanh_penalty": 0.3, "preactivation_penalty": 2.0}
    sae = architecture("jump_relu_tanh")(D, F, **weights, tanh_scale=3.0, kernel_width=0.5).double()
    sae.load_state_dict(trained("jump_relu_tanh", 40).sae.state_dict())
    draw = generator(0, "thresholds")
    sae.threshold.data.uniform_(0.01, 0.05, generator=draw)
    sae.W_dec.data.mul_(torch.empty(F, 1, dtype=torch.double).uniform_(0.5, 2, generator=draw))
    x = batch(99).double()
    ours = parts(sae, x, StepContext(35, Schedule.of_run(60, B), sparsity_scale=0.7), sparse=sparse)

    pre, width = x @ sae.W_enc.T + sae.b_enc, 0.5 / D**0.5
    on, near = pre > sae.threshold, (pre - sae.threshold).abs() < width / 2
    assert on.any(0).sum() > F / 2 and (near & on).any() and (near & ~on).any() and (~near & ~on).any()
    # what the kernel says of the jump: nothing but a gradient
    distance = pre - sae.threshold
    f = torch.where(on, pre, 0) + near * (sae.threshold / width).detach() * (distance - distance.detach())
    norms = sae.W_dec.norm(dim=1)
    mse = (x - f @ sae.W_dec - sae.b_dec).square().sum(1).mean()
    tanh = torch.tanh(3.0 * D**0.5 * norms * f).sum(1).mean()
    below = (norms * (sae.threshold - pre).relu()).sum(1).mean()
    wanted = mse + 0.3 * 0.7 * tanh + 2.0 / D**0.5 * below
    assert float(ours["loss"]) == pytest.approx(float(wanted), rel=1e-12)
    assert float(ours["tanh"]) == pytest.approx(float(tanh), rel=1e-12)
    named = dict(sae.named_parameters())
    found, true = (torch.autograd.grad(loss, list(named.values())) for loss in (ours["loss"], wanted))
    for n, a, b in zip(named, found, true, strict=True):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max(), n


def test_the_tanh_penalty_rises_over_the_whole_run_or_the_share_of_it_that_is_asked_for():
    """Whatever the other kinds' warm-up is; the group reads it at each step."""
    plan = Schedule.of_run(100, B, sparsity_warmup_steps=5)
    for share, wanted in ((1.0, (0.0, 0.5, 0.9)), (0.5, (0.0, 1.0, 1.0)), (0.0, (1.0, 1.0, 1.0))):
        settings = {"tanh_penalty": 0.02, "ramp": share}
        m = LoneTrainer("x", SAESpec("jump_relu_tanh", F, settings=settings), D, plan)
        for step, scale in zip((0, 50, 90), wanted, strict=True):
            m.step(batch(step), step)
            assert m.group.scales_2S[1].tolist() == pytest.approx([scale])


@every
def test_both_layouts_give_the_same_loss_and_gradients(name):
    m = trained(name, 40)
    results = []
    for sparse in (True, False):
        at = StepContext(35, m.schedule, dead_F=torch.zeros(F, dtype=torch.bool))
        loss = parts(m.sae, batch(99), at, sparse=sparse)["loss"]
        results.append((float(loss), torch.autograd.grad(loss, list(m.sae.parameters()), allow_unused=True)))
    (loss_a, grads_a), (loss_b, grads_b) = results
    assert loss_a == pytest.approx(loss_b, rel=1e-6)
    for a, b in zip(grads_a, grads_b, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).abs().max() <= 1e-5 * b.abs().max() + 1e-9


@every
def test_the_loss_is_pure_and_records_only_look(name):
    m = trained(name, 10)
    before = snapshot(m)
    at = StepContext(10, m.schedule, dead_F=torch.zeros(F, dtype=torch.bool))
    codes = m.sae.codes(m.sae.preactivations(batch(10)), at)
    first, second = (m.sae.loss(batch(10), codes, m.sae.active(codes), at)["loss"] for _ in range(2))
    m.record(batch(10))
    m.finished()
    assert torch.equal(first, second)
    assert equal(before, snapshot(m))


@every
def test_training_learns_and_is_a_function_of_its_seed(name):
    m = trained(name, 200)
    start = member(name, 200)
    start.step(batch(0), 0)
    assert float(m.last["mse"]) < 0.5 * float(start.last["mse"])
    assert equal(snapshot(trained(name, 20)), snapshot(trained(name, 20)))
    assert not torch.equal(member(name, seed=0).sae.W_enc, member(name, seed=1).sae.W_enc)
    norms = m.sae.W_dec.norm(dim=1)
    if m.sae.constraint != "free":
        assert torch.allclose(norms, torch.ones(F), atol=1e-5)


@every
def test_the_global_generator_is_left_alone(name):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    trained(name, 5)
    assert torch.equal(torch.rand(3), wanted)


@every
@pytest.mark.parametrize(
    "x",
    [torch.zeros(B, D), torch.ones(B, D), batch(0).repeat_interleave(2, 0)[:B]],
    ids=["zeros", "constant", "repeated rows"],
)
def test_odd_batches_stay_finite(name, x):
    m = member(name)
    for step in range(3):
        m.step(x, step)
    assert all(t.isfinite().all() for t in snapshot(m).values())


@every
def test_a_finished_sae_takes_raw_activations(name):
    """Training on x / factor - center and folding both in is the same function as doing so by hand."""
    m = trained(name, 100)
    m.norm_factors = (7.5,)
    sae, unscaled, center_D = m.finished(), copy.deepcopy(m.sae), m.center_D if m.centered else torch.zeros(D)
    assert m.sae.centered == bool(center_D.any())
    x = batch(3)
    for mode in sae.modes:
        by_hand = 7.5 * (unscaled(x - center_D, mode=mode) + center_D)
        assert torch.allclose(sae(7.5 * x, mode=mode), by_hand, rtol=1e-4, atol=1e-4)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(F), atol=1e-5)
    assert not any(p.requires_grad for p in sae.parameters())


@every
def test_where_activations_lie_does_not_matter(name):
    """An SAE trained on x + c is the one trained on x, moved: few dimensions with a large mean change
    nothing. So it is with ours for every architecture, and not with dictionary_learning's for the ReLU
    kinds."""
    c_D = torch.zeros(D)
    c_D[3] = 10.0

    def moved(recipe):
        spec = SAESpec(name, F, settings=SETTINGS[name])
        here, there = (LoneTrainer("x", spec, D, Schedule.of_run(40, B), recipe=recipe) for _ in range(2))
        for step in range(15):
            here.step(batch(step), step)
            there.step(batch(step) + c_D, step)
        mode = "top_k" if "top_k" in here.sae.modes else None
        x = batch(99)
        return (there.finished()(x + c_D, mode=mode) - c_D - here.finished()(x, mode=mode)).abs().mean()

    assert moved(MONOSEMY) < 2e-3
    if architecture(name).centered:
        assert moved(DICTIONARY_LEARNING) > 0.01


@every
def test_encode_decode_and_call(name):
    sae = trained(name, 100).finished()
    x = batch(3).view(4, 32, D)
    f = sae.encode(x)
    assert f.shape == (4, 32, F) and (f >= 0).all() and (f > 0).any() and (f == 0).any()
    assert torch.equal(sae(x), sae.decode(f)) and sae(x).shape == x.shape
    ids = torch.tensor([5, 0, F - 1])
    assert torch.allclose(sae.encode(x, latents=ids), f[..., ids], atol=1e-5)
    assert torch.equal(sae.encode(x[0, 0]), sae.encode(x)[0, 0]) or torch.allclose(
        sae.encode(x[0, 0]), f[0, 0], atol=1e-5
    )
    with pytest.raises(ValueError, match=r"mode is 'nope'"):
        sae.encode(x, mode="nope")
    if "top_k" in sae.modes:
        exact = sae.encode(x.view(-1, D), mode="top_k")
        assert (exact > 0).sum() <= 8 * B
        assert not torch.equal(exact, f.view(-1, F))
        with pytest.raises(ValueError, match="where latents are given"):
            sae.encode(x, latents=ids, mode="top_k")
    else:
        with pytest.raises(ValueError, match="mode is 'top_k'"):
            sae.encode(x, mode="top_k")


@every
def test_training_codes_and_inference_agree(name):
    """What training calls the codes is what encode computes: under the selection for the TopK kinds."""
    m = trained(name, 60)
    x = batch(70)
    codes = m.sae.active(
        m.sae.codes(m.sae.preactivations(x, Execution(sparse=False)), StepContext(60, m.schedule))
    )
    f = m.sae.encode(x, mode="top_k" if "top_k" in m.sae.modes else None)
    assert torch.allclose(codes.decode(m.sae.W_dec) + m.sae.b_dec, m.sae.decode(f), atol=1e-5)


@every
def test_saved_and_loaded_it_is_the_same(name, tmp_path):
    sae = trained(name).finished()
    formats.save(sae, tmp_path / "a", {"status": "complete"})
    again = formats.load(tmp_path / "a")
    assert type(again) is type(sae) and again.settings == sae.settings
    assert all(
        torch.equal(a, b) for a, b in zip(sae.state_dict().values(), again.state_dict().values(), strict=True)
    )
    if name not in dictionary_learning.LAYOUTS:  # one that dictionary_learning does not have
        return
    trainer = dictionary_learning.trainer_config(
        sae,
        lr=1e-3,
        seed=0,
        steps=60,
        schedule=vars(Schedule.of_run(60, B)),
        layer=3,
        lm_name="m",
        submodule_name="resid_post_layer_3",
        device="cpu",
    )
    formats.save(sae, tmp_path / "b", {"trainer": trainer})
    (tmp_path / "b" / "sae.safetensors").unlink()
    with pytest.raises(ValueError, match='format="dictionary_learning"'):
        formats.load(tmp_path / "b")
    theirs = formats.load(tmp_path / "b", format="dictionary_learning")
    assert torch.allclose(theirs(batch(1)), sae(batch(1)), atol=1e-6)


@every
def test_it_can_begin_from_another_s_weights(name):
    sae = trained(name).finished()
    spec = SAESpec(name, F, settings=SETTINGS[name], init_from=sae)
    begun = LoneTrainer("x", spec, D, Schedule.of_run(10, B), norm_factors=(2.0,))
    assert torch.allclose(begun.finished()(batch(1)), sae(batch(1)), atol=1e-5)
    begun.step(batch(1) / 2, 0)
    with pytest.raises(ValueError, match="init_from"):
        SAESpec(name, F + 1, settings=SETTINGS[name], init_from=sae).build(D)


@every
def test_settings_are_checked(name):
    with pytest.raises(ValueError, match="nonsense"):
        architecture(name)(D, F, nonsense=1)
    with pytest.raises(ValueError, match="d_sae is 0"):
        architecture(name)(D, 0)
    if "k" in SETTINGS[name]:
        for k in (0, F + 1):
            with pytest.raises(ValueError, match=f"k is {k}"):
                architecture(name)(D, F, k=k)
