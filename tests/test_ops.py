"""Every op against a plain float64 meaning: every output, every gradient. B tokens, D d_in, F latents, N entries."""

import pytest
import torch
from torch import nn

from monosemy import ops
from monosemy.sae import Product

SHAPES = [(5, 3, 7), (1, 1, 1), (16, 8, 33), (33, 5, 130), (64, 24, 96)]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(D, F):
    return [w.requires_grad_() for w in (draw(F, D, seed=1), draw(F, seed=2), draw(D, seed=3), draw(F, D, seed=4))]


def close(got, wanted, *, exact=False):
    for name, (a, b) in {k: (got[k], wanted[k]) for k in wanted}.items():
        tolerance = 0 if exact else 1e-12 * max(1.0, float(b.abs().max()))
        assert (a - b).abs().max() <= tolerance, name


def gradients(loss, named):
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), grads, strict=True)}


def naive(x, W_enc, b_enc, b_dec, W_dec, mask_BF, groups=None):
    """The dense meaning: pre-activations where the mask is set, decoded."""
    f = torch.where(mask_BF, (x - b_dec) @ W_enc.T + b_enc, 0)
    if groups is None:
        return f, f @ W_dec
    return f, torch.stack([f[:, a : a + n] @ W_dec[a : a + n] for a, n in zip(torch.tensor([0, *groups]).cumsum(0), groups, strict=False)])


def mask_of(codes, B, F):
    mask = torch.zeros(B, F, dtype=torch.bool)
    mask[codes.entries.bags_N, codes.entries.latents_N] = True
    return mask


@pytest.mark.parametrize(("B", "D", "F"), SHAPES)
@pytest.mark.parametrize(
    "selection", ["k=1", "k", "k=F", "batch", "batch of all", "above 0", "above a row", "nothing", "one latent always"]
)
def test_sparse_codes_are_the_dense_meaning(B, D, F, selection):
    x = draw(B, D)
    W_enc, b_enc, b_dec, W_dec = params = weights(D, F)
    if selection == "one latent always":
        b_enc.data.fill_(-1e3)
        b_enc.data[F // 2] = 1e3
    product = Product(x, W_enc, b_enc, b_dec)
    k = max(F // 4, 1)
    codes = {
        "k=1": lambda: product.top_k(1),
        "k": lambda: product.top_k(k),
        "k=F": lambda: product.top_k(F),
        "batch": lambda: product.batch_top_k(k * B),
        "batch of all": lambda: product.batch_top_k(B * F),
        "above a row": lambda: product.above(draw(F, seed=9), sparse=True),
        "nothing": lambda: product.above(1e9, sparse=True),
    }.get(selection, lambda: product.above(0, sparse=True))()
    mask = mask_of(codes, B, F)
    pre = product.pre_BF
    expected = {"k=1": B, "k": B * k, "k=F": B * F, "batch": B * k, "batch of all": B * F, "nothing": 0, "one latent always": B}
    if selection in expected:
        assert mask.sum() == expected[selection]
    if selection.startswith(("k", "batch")) and not mask.all():
        rows = [(pre[b], mask[b]) for b in range(B)] if selection.startswith("k") else [(pre.flatten(), mask.flatten())]
        assert all(values[chosen].min() >= values[~chosen].max() for values, chosen in rows if not chosen.all())

    named = dict(zip(("W_enc", "b_enc", "b_dec", "W_dec", "w"), [*params, draw(F, seed=5).requires_grad_()], strict=True))
    c_BD, c_F, c_B = draw(B, D, seed=6), draw(F, seed=7), draw(B, seed=8)
    groups = [F // 3, F - F // 3] if F >= 3 else [F]

    def total(f_values, at, by_latent, by_token, decoded, grouped):
        v = f_values * at + f_values.square()
        c_GBD = torch.stack([c_BD * (g + 1) for g in range(len(groups))])
        return (by_latent(v) * c_F).sum() + (by_token(v) * c_B).sum() + (decoded * c_BD).sum() + (grouped * c_GBD).sum()

    got = total(codes.values, codes.at(named["w"]), codes.by_latent, codes.by_token, codes.decode(W_dec), codes.decode(W_dec, groups))
    f, decoded = naive(x, *params, mask)
    _, grouped = naive(x, *params, mask, groups)
    wanted = total(f, named["w"], lambda v: torch.where(mask, v, 0).sum(0), lambda v: torch.where(mask, v, 0).sum(1), decoded, grouped)
    assert torch.allclose(got, wanted, rtol=1e-12, atol=1e-12)
    close(gradients(got, named), gradients(wanted, named))
    least = torch.where(mask & (f > 0), f, torch.inf).amin(1)
    assert torch.allclose(codes.smallest(), least, rtol=1e-12)
    assert torch.equal(codes.count(), (mask & (f > 0)).sum(0).float())


@pytest.mark.parametrize(("B", "D", "F"), SHAPES)
def test_the_two_layouts_agree(B, D, F):
    x, params = draw(B, D), weights(D, F)
    product = Product(x, *params[:3])
    named = dict(zip(("W_enc", "b_enc", "b_dec", "W_dec"), params, strict=True))
    results = []
    for sparse in (False, True):
        codes = product.above(0.1, sparse=sparse)
        codes = codes.replace(codes.values * codes.at(params[1]))
        loss = (
            codes.decode(params[3]).square().sum() + codes.by_latent(codes.values).square().sum() + codes.by_token(codes.values).exp().sum()
        )
        results.append(
            {
                "loss": loss.detach(),
                "size": codes.size().double(),
                "count": codes.count(),
                "smallest": codes.smallest(),
                **gradients(loss, named),
            }
        )
    dense, sparse = results
    assert torch.equal(dense.pop("smallest"), sparse.pop("smallest"))
    close(sparse, dense)


def test_power_at_the_support_s_edge_has_finite_gradients():
    """d f^p / df is infinite at 0 for p < 1: what is off the support must be selected away, not multiplied by 0."""
    x, params = draw(8, 4), weights(4, 9)
    for sparse in (False, True):
        loss = Product(x, *params[:3]).above(0, sparse=sparse).values.pow(0.3).sum() * 0.0
        assert all(g.isfinite().all() for g in gradients(loss, dict(enumerate(params))).values())


@pytest.mark.parametrize("values", [torch.zeros(6, 40), torch.ones(6, 40), torch.arange(240.0).view(6, 40) % 3])
@pytest.mark.parametrize("n", [1, 7, 120, 240])
def test_batch_selection_with_ties(values, n):
    flat = ops.batch_top_k(values, n)
    assert len(flat.unique()) == n
    assert torch.equal(flat, flat.sort().values)
    assert torch.equal(values.flatten()[flat].sort().values, values.flatten().sort(descending=True).values[:n].sort().values)


def test_batch_selection_is_exact_on_large_batches():
    """Large enough that a sample bounds the search; also where the sample misleads: everything large sits between the sample's places."""
    honest = torch.randn(512, 2048, generator=torch.Generator().manual_seed(0))
    hidden = torch.full((512, 2048), -1.0)
    hidden.flatten()[1::16] = torch.rand(65536, generator=torch.Generator().manual_seed(1)) + 1
    sampled = torch.full((512, 2048), -1.0)
    sampled.flatten()[::16] = torch.rand(65536, generator=torch.Generator().manual_seed(1)) + 1
    for values in (honest, hidden, sampled):
        for n in (1, 5_000, 80_000):
            got = values.flatten()[ops.batch_top_k(values, n)].sort().values
            assert torch.equal(got, values.flatten().topk(n).values.sort().values)


def test_bf16_rounds_the_product_s_operands_and_nothing_else():
    x, W, b = torch.randn(9, 16), torch.randn(33, 16), torch.randn(33)
    pre = ops.preactivations(x, W, b, bf16=True)
    wanted = x.bfloat16().double() @ W.bfloat16().double().T + b.bfloat16().double()
    assert pre.dtype == torch.bfloat16
    assert (pre.double() - wanted).abs().max() <= 0.01 * wanted.abs().max()
    codes = Product(x, nn.Parameter(W), nn.Parameter(b), None, bf16=True).top_k(3)
    assert codes.values.dtype == torch.float32


@pytest.mark.parametrize("constraint", ["project", "constrain", "free"])
@pytest.mark.parametrize("clip", [None, 1.0, 0.01])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_the_update_is_adam_with_the_decoder_s_constraint(constraint, clip, beta1):
    F, D = 9, 5
    params = {"W_enc": draw(F, D, seed=1), "b": draw(F, seed=2), "W_dec": nn.functional.normalize(draw(F, D, seed=3), dim=1)}
    optimizer = ops.Optimizer(
        {n: p.clone() for n, p in params.items()}, decoder="W_dec", constraint=constraint, clip=clip, betas=(beta1, 0.999)
    )
    reference = {n: nn.Parameter(p.clone()) for n, p in params.items()}
    adam = torch.optim.Adam(reference.values(), lr=1.0, betas=(beta1, 0.999), eps=1e-8, foreach=False, fused=False)
    for step in range(5):
        lr = 0.01 * (step + 1)
        for i, name in enumerate(params):
            if (step, name) != (2, "b"):  # a parameter that a step does not touch
                optimizer.params[name].grad = draw(*params[name].shape, seed=10 * step + i)
            gradient = draw(*params[name].shape, seed=10 * step + i) if (step, name) != (2, "b") else torch.zeros_like(params[name])
            reference[name].grad = gradient
        W = reference["W_dec"]
        with torch.no_grad():
            if constraint == "project":
                direction = W / (W.norm(dim=1, keepdim=True) + 1e-6)
                W.grad -= (W.grad * direction).sum(1, keepdim=True) * direction
            elif constraint == "constrain":
                direction = W / W.norm(dim=1, keepdim=True)
                W.grad -= (W.grad * direction).sum(1, keepdim=True) * direction
        if clip is not None:
            nn.utils.clip_grad_norm_(reference.values(), clip)
        adam.param_groups[0]["lr"] = lr
        adam.step()
        if constraint != "free":
            W.data /= W.norm(dim=1, keepdim=True)
        optimizer.step(lr)
        for name, p in optimizer.params.items():
            assert torch.allclose(p, reference[name], rtol=1e-7, atol=1e-9), (step, name)
            assert p.grad is None
    assert bool(optimizer.m) == bool(beta1), "a first moment that equals the gradient is not kept"


def test_an_optimizer_goes_on_from_its_state():
    make = lambda: ops.Optimizer({"W": draw(4, 3)}, decoder="W", constraint="free", clip=1.0, betas=(0.9, 0.999))  # noqa: E731
    one, two = make(), make()
    for step in range(3):
        one.params["W"].grad = draw(4, 3, seed=step)
        one.step(0.1)
    two.params["W"].copy_(one.params["W"])
    two.restore({n: t.clone() for n, t in one.state().items()})
    for o in (one, two):
        o.params["W"].grad = draw(4, 3, seed=7)
        o.step(0.1)
    assert torch.equal(one.params["W"], two.params["W"])
