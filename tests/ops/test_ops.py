"""Every op against a plain float64 meaning, in every form that runs on a CPU: every output, every gradient.

B tokens, D d_in, F latents, N entries.
"""

import pytest
import torch
from torch import nn

from monosemy import ops
from monosemy.codes import Execution, Preactivations
from monosemy.ops import cpu

SHAPES = [(5, 3, 7), (1, 1, 1), (16, 8, 33), (33, 5, 130), (64, 24, 96)]
FORMS = [
    "reference",
    "aten",
    pytest.param("cpu", marks=pytest.mark.skipif(not cpu.available(), reason="no compiler")),
]
TOLERANCE = {"reference": 1e-12, "aten": 3e-6, "cpu": 3e-6}
every_form = pytest.mark.parametrize("form", FORMS)


@pytest.fixture
def dtype(form):
    """The fast forms are of float32; the plain one shows the maths in float64."""
    with ops.use_backend(form):
        yield torch.float64 if form == "reference" else torch.float32


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(D, F, dtype=torch.float64):
    return [
        w.to(dtype).requires_grad_()
        for w in (draw(F, D, seed=1), draw(F, seed=2), draw(D, seed=3), draw(F, D, seed=4))
    ]


def close(got, wanted, tolerance=1e-12):
    for name in wanted:
        a, b = got[name].double(), wanted[name].double()
        assert (a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max())), name


def gradients(loss, named):
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), grads, strict=True)
    }


def naive(x, W_enc, b_enc, b_dec, W_dec, mask_BF):
    """The dense meaning: pre-activations where the mask is set, decoded."""
    f = torch.where(mask_BF, (x - b_dec) @ W_enc.T + b_enc, 0)
    return f, f @ W_dec


def mask_of(codes, B, F):
    mask = torch.zeros(B, F, dtype=torch.bool)
    mask[codes.pattern.bags_N, codes.pattern.indices_N] = True
    return mask


@every_form
@pytest.mark.parametrize(("B", "D", "F"), SHAPES)
@pytest.mark.parametrize(
    "selection",
    [
        "k=1",
        "k",
        "k=F",
        "batch",
        "batch of all",
        "above 0",
        "above a row",
        "nothing",
        "one latent always",
        "among",
        "among none",
        "among all",
    ],
)
def test_sparse_codes_are_the_dense_meaning(form, dtype, B, D, F, selection):
    x = draw(B, D).to(dtype)
    W_enc, b_enc, b_dec, W_dec = params = weights(D, F, dtype)
    if selection == "one latent always":
        b_enc.data.fill_(-1e3)
        b_enc.data[F // 2] = 1e3
    product = Preactivations(x, W_enc, b_enc, b_dec)
    k, some = max(F // 4, 1), torch.arange(F) % 3 == 0
    codes = {
        "k=1": lambda: product.top_k(1),
        "k": lambda: product.top_k(k),
        "k=F": lambda: product.top_k(F),
        "batch": lambda: product.batch_top_k(k * B),
        "batch of all": lambda: product.batch_top_k(B * F),
        "above a row": lambda: product.above(draw(F, seed=9).to(dtype)),
        "nothing": lambda: product.above(1e9),
        "among": lambda: product.top_k_among(some, k),
        "among none": lambda: product.top_k_among(torch.zeros(F, dtype=torch.bool), k),
        "among all": lambda: product.top_k_among(some, F),
    }.get(selection, lambda: product.above(0))()
    mask, pre, M = mask_of(codes, B, F), product.product_BF, int(some.sum())
    expected = {
        "k=1": B,
        "k": B * k,
        "k=F": B * F,
        "batch": B * k,
        "batch of all": B * F,
        "nothing": 0,
        "one latent always": B,
        "among": B * min(k, M),
        "among none": 0,
        "among all": B * M,
    }
    if selection in expected:
        assert mask.sum() == expected[selection] == len(codes.values) == codes.size()
    assert not selection.startswith("among") or not mask[:, ~some].any()
    if selection.startswith(("k", "batch", "among")):
        allowed = some.expand(B, F) if selection.startswith("among") else torch.ones(B, F, dtype=torch.bool)
        rows = (
            [(pre.flatten(), mask.flatten(), allowed.flatten())]
            if selection.startswith("batch")
            else zip(pre, mask, allowed, strict=True)
        )
        assert all(v[m].min() >= v[~m & a].max() for v, m, a in rows if m.any() and (~m & a).any())
    flat = codes.pattern.bags_N.long() * F + codes.pattern.indices_N
    assert (flat.diff() > 0).all(), "entries are in order of tokens and latents"

    named = dict(
        zip(
            ("W_enc", "b_enc", "b_dec", "W_dec", "w"),
            [*params, draw(F, seed=5).to(dtype).requires_grad_()],
            strict=True,
        )
    )
    exact = {n: p.detach().double().requires_grad_() for n, p in named.items()}
    c_BD, c_F = draw(B, D, seed=6), draw(F, seed=7)
    begins = torch.tensor([0, F // 3] if F >= 3 else [0])

    def total(summed, decoded, grouped):
        c_GBD = torch.stack([c_BD * (g + 1) for g in range(len(begins))])
        return summed + (decoded * c_BD).sum() + (grouped * c_GBD).sum()

    def of(f, w, c):
        return (f * w + f.square()) * c

    mapped = codes.map(lambda f, w: f * w, named["w"])
    got = total(
        codes.total(of, named["w"], c_F.to(dtype)) + mapped.total(),
        codes.decode(W_dec),
        mapped.decode(W_dec, begins),
    )
    four = [exact[n] for n in ("W_enc", "b_enc", "b_dec", "W_dec")]
    f, decoded = naive(x.double(), *four, mask)
    ends = [*begins.tolist()[1:], F]
    fw = f * exact["w"]
    grouped = torch.stack(
        [fw[:, a:b] @ exact["W_dec"][a:b] for a, b in zip(begins.tolist(), ends, strict=True)]
    )
    wanted = total(of(f, exact["w"], c_F).sum() + fw.sum(), decoded, grouped)
    close({"total": got}, {"total": wanted}, TOLERANCE[form] * 10)
    close(gradients(got, named), gradients(wanted, exact), TOLERANCE[form])
    least = torch.where(mask & (pre > 0), pre, torch.inf).amin(1)
    assert torch.equal(codes.smallest(), least)
    assert torch.equal(codes.count(), (mask & (pre > 0)).sum(0).to(codes.count().dtype))


@every_form
@pytest.mark.parametrize(("B", "D", "F"), SHAPES)
def test_the_two_layouts_agree(form, dtype, B, D, F):
    x, params = draw(B, D).to(dtype), weights(D, F, dtype)
    named = dict(zip(("W_enc", "b_enc", "b_dec", "W_dec"), params, strict=True))
    results = []
    for sparse in (False, True):
        codes = Preactivations(x, *params[:3], Execution(sparse=sparse)).above(0.1)
        loss = (
            (codes.by_latent() * draw(F, seed=8).to(dtype)).sum()
            + codes.total().square()
            + codes.decode(params[3]).square().sum()
        )
        assert torch.equal(codes.count(), codes.size_by_latent())
        codes = codes.map(torch.mul, params[1])
        begins = torch.tensor([0, F // 2] if F > 1 else [0])
        loss = (
            loss + codes.decode(params[3]).square().sum() + codes.decode(params[3], begins)[0].square().sum()
        )
        loss = (
            loss
            + codes.by_latent().square().sum()
            + codes.total(lambda v, w: v.square() * w, params[1]).square()
        ) / (B * F)
        counts = {"size": codes.size(), "count": codes.count(), "of": codes.size_by_latent()}
        found = {"loss": loss.detach(), "smallest": codes.smallest(), **counts}
        results.append(found | gradients(loss, named))
    dense, sparse = results
    assert torch.equal(dense.pop("smallest"), sparse.pop("smallest"))
    close(sparse, dense, 10 * TOLERANCE[form])


@every_form
@pytest.mark.parametrize(("B", "D", "F"), SHAPES)
@pytest.mark.parametrize("first", [True, False], ids=["codes first", "codes last"])
@pytest.mark.parametrize("centered", [True, False], ids=["x - b_dec", "x"])
def test_pre_activations_are_summed_over_a_batch_by_one_product(form, dtype, B, D, F, first, centered):
    """Value and gradients are those of the sum of [B, F], whether the codes' gradient comes before
    theirs or after."""
    x, g = draw(B, D), draw(F, seed=5)

    def parts_of(W_enc, b_enc, b_dec, by_hand):
        if by_hand:
            pre_BF = (x - b_dec if centered else x) @ W_enc.T + b_enc
            sums, total = pre_BF.sum(0), pre_BF.relu().square().sum()
        else:
            pre = Preactivations(x.to(W_enc.dtype), W_enc, b_enc, b_dec if centered else None)
            before = pre.above(0) if first else None
            sums = pre.by_latent()
            total = (before or pre.above(0)).total(lambda v: v.square())
        named = {"W_enc": W_enc, "b_enc": b_enc} | ({"b_dec": b_dec} if centered else {})
        loss = (sums * g.to(sums.dtype)).square().sum() + total
        return {"sums": sums, "loss": loss} | gradients(loss, named)

    ours = parts_of(*weights(D, F, dtype)[:3], by_hand=False)
    close(ours, parts_of(*weights(D, F)[:3], by_hand=True), TOLERANCE[form])


@every_form
def test_power_at_the_support_s_edge_has_finite_gradients(form, dtype):
    """d f^p / df is infinite at 0 for p < 1: what is off the support must be selected away, not multiplied by
    0."""
    x, params = draw(8, 4).to(dtype), weights(4, 9, dtype)
    for sparse in (False, True):
        codes = Preactivations(x, *params[:3], Execution(sparse=sparse)).above(0)
        loss = (
            codes.total(lambda f: ops.power(f, 0.3)) * 0.0
            + codes.map(lambda f: f**0.3).decode(params[3]).sum()
        )
        assert all(g.isfinite().all() for g in gradients(loss, dict(enumerate(params))).values())


def positions(picked, F):
    return ops.SparsePattern(picked.indices_N, picked.offsets_B1, F).bags_N.long() * F + picked.indices_N


@every_form
@pytest.mark.parametrize(
    "values", [torch.zeros(6, 40), torch.ones(6, 40), torch.arange(240.0).view(6, 40) % 3]
)
@pytest.mark.parametrize("n", [1, 7, 120, 240])
def test_of_equal_values_a_batch_selection_takes_the_earlier(form, dtype, values, n):
    flat = positions(ops.batch_top_k(values.to(dtype), n), 40)
    assert torch.equal(flat, values.flatten().sort(descending=True, stable=True).indices[:n].sort().values)


@every_form
@pytest.mark.parametrize("k", [1, 7, 40])
def test_a_selection_by_tokens_with_ties(form, dtype, k):
    values = (torch.arange(240.0).view(6, 40) % 3).to(dtype)
    picked = ops.top_k(values, k)
    assert torch.equal(
        picked.values_N.view(6, k).sort(dim=1, descending=True).values, values.topk(k, dim=1).values
    )
    if form != "aten":  # torch's topk has an order of its own
        earliest = values.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
        assert torch.equal(picked.indices_N.view(6, k).long(), earliest)


@pytest.mark.parametrize("form", FORMS[1:])
def test_batch_selection_is_exact_on_large_batches(form, dtype):
    """Large enough that a sample bounds the search; also where the sample misleads: everything large sits
    between the sample's places."""
    honest = torch.randn(512, 2048, generator=torch.Generator().manual_seed(0))
    hidden = torch.full((512, 2048), -1.0)
    hidden.flatten()[1::16] = torch.rand(65536, generator=torch.Generator().manual_seed(1)) + 1
    sampled = torch.full((512, 2048), -1.0)
    sampled.flatten()[::16] = torch.rand(65536, generator=torch.Generator().manual_seed(1)) + 1
    for values in (honest, hidden, sampled):
        for n in (1, 5_000, 80_000):
            got = ops.batch_top_k(values, n).values_N.sort().values
            assert torch.equal(got, values.flatten().topk(n).values.sort().values)


def test_bf16_rounds_the_product_s_operands_and_nothing_else():
    x, W, b = torch.randn(9, 16), torch.randn(33, 16), torch.randn(33)
    pre = ops.preactivations(x, W, b, bf16=True)
    wanted = x.bfloat16().double() @ W.bfloat16().double().T + b.bfloat16().double()
    assert pre.dtype == torch.bfloat16
    assert (pre.double() - wanted).abs().max() <= 0.01 * wanted.abs().max()
    codes = Preactivations(x, nn.Parameter(W), nn.Parameter(b), None, Execution(bf16=True)).top_k(3)
    assert codes.values.dtype == torch.float32


@every_form
@pytest.mark.parametrize("constraint", ["project", "constrain", "free"])
@pytest.mark.parametrize("clip", [None, 1.0, 0.01])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_the_update_is_adam_with_the_decoder_s_constraint(form, dtype, constraint, clip, beta1):
    """Two SAEs in one group, each like torch's Adam in float64 on it alone."""
    S, F, D = 2, 9, 5
    start = {
        "W_enc": draw(S, F, D, seed=1),
        "b": draw(S, F, seed=2),
        "W_dec": nn.functional.normalize(draw(S, F, D, seed=3), dim=2),
    }
    optimizer = ops.Optimizer(
        {n: p.to(dtype).clone() for n, p in start.items()},
        decoder="W_dec",
        constraint=constraint,
        clip=clip,
        betas=(beta1, 0.999),
        bf16_copies=("W_enc",),
    )

    def gradient(step, s, name):
        return draw(*start[name].shape[1:], seed=100 * step + 10 * s + len(name)) * (step != 2 or name != "b")

    for s in range(S):
        reference = {n: nn.Parameter(p[s].clone()) for n, p in start.items()}
        adam = torch.optim.Adam(
            reference.values(), lr=1.0, betas=(beta1, 0.999), eps=1e-8, foreach=False, fused=False
        )
        W = reference["W_dec"]
        for step in range(5):
            for name, p in reference.items():
                p.grad = gradient(step, s, name)
            with torch.no_grad():
                if constraint != "free":
                    direction = W / (W.norm(dim=1, keepdim=True) + (1e-6 if constraint == "project" else 0))
                    W.grad -= (W.grad * direction).sum(1, keepdim=True) * direction
            if clip is not None:
                nn.utils.clip_grad_norm_(reference.values(), clip)
            adam.param_groups[0]["lr"] = 0.01 * (step + 1) * (s + 1)
            adam.step()
            if constraint != "free":
                W.data /= W.norm(dim=1, keepdim=True)
            lr_S = torch.tensor([0.01 * (step + 1) * (i + 1) for i in range(S)])
            if s == 0:
                grads = {n: [gradient(step, i, n).to(dtype) for i in range(S)] for n in start}
                assert optimizer.step(grads, lr_S, torch.zeros(S)).all()
        for name, p in optimizer.params.items():
            assert torch.allclose(p[s].double(), reference[name], rtol=1e-5, atol=1e-6), name
    assert torch.equal(optimizer.bf16_copies["W_enc"], optimizer.params["W_enc"].bfloat16())
    assert bool(optimizer.m) == bool(beta1), "a first moment that equals the gradient is not kept"


@every_form
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("where", ["loss", "W_enc", "b"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_updates_nothing(form, dtype, clip, where, value):
    """Of two SAEs in a group one has a loss or gradient that is not finite: it stays as it is, bit by bit;
    the other goes on."""
    F, D = 9, 5
    make = lambda: ops.Optimizer(  # noqa: E731
        {"W_enc": draw(2, F, D, seed=1).to(dtype), "b": draw(2, F, seed=2).to(dtype)},
        decoder="W_enc", constraint="project", clip=clip, betas=(0.9, 0.999),
    )  # fmt: skip
    optimizer, alone = make(), make()
    for step in range(2):
        grads = {
            n: [draw(*p.shape[1:], seed=step + i).to(dtype) for i in range(2)]
            for n, p in optimizer.params.items()
        }
        alone.step(
            {n: [g.clone() for g in of] for n, of in grads.items()}, torch.full((2,), 0.1), torch.zeros(2)
        )
        loss_S = torch.zeros(2)
        before = [
            t.clone() for t in (*optimizer.state_dict(1).values(), *(p[1] for p in optimizer.params.values()))
        ]
        if step == 1:
            if where == "loss":
                loss_S[1] = value
            else:
                grads[where][1].view(-1)[3] = value
            if where == "W_enc":  # a weight's gradient is not finite only where its bias's is not
                grads["b"][1][0] = value
        updated = optimizer.step(grads, torch.full((2,), 0.1), loss_S)
        if step == 1:
            assert updated.tolist() == [True, False]
            after = [*optimizer.state_dict(1).values(), *(p[1] for p in optimizer.params.values())]
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for name, p in optimizer.params.items():
        assert torch.equal(p[0], alone.params[name][0]), "company changes nothing"


def test_an_optimizer_goes_on_from_its_state():
    def make():
        return ops.Optimizer(
            {"W": draw(2, 4, 3)}, decoder="W", constraint="free", clip=1.0, betas=(0.9, 0.999)
        )

    one, two = make(), make()

    def step(o, seed):
        return o.step(
            {"W": [draw(4, 3, seed=seed), draw(4, 3, seed=seed + 1)]},
            torch.tensor([0.1, 0.2]),
            torch.zeros(2),
        )

    for seed in range(3):
        step(one, seed)
    two.params["W"].copy_(one.params["W"])
    for s in range(2):
        two.load_state_dict(s, {n: t.clone() for n, t in one.state_dict(s).items()})
    for o in (one, two):
        step(o, 7)
    assert torch.equal(one.params["W"], two.params["W"])


@pytest.mark.parametrize("N", [1, 63, 32_769, 56_725, 70_001, 131_072])
def test_powers_do_not_follow_the_threads(N: int) -> None:
    threads = torch.get_num_threads()
    x = torch.rand(N, generator=torch.Generator().manual_seed(0)) + 1e-3
    try:
        made = []
        for n in (1, 2, 3, 4):
            torch.set_num_threads(n)
            made.append(ops.power(x, 0.7))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(made[0], other) for other in made[1:])
    assert torch.allclose(made[0].double(), x.double() ** 0.7, rtol=1e-6)


def test_lists_of_dead_latents_are_as_long_as_there_can_be_dead_ones() -> None:
    x, params = torch.randn(6, 8), (torch.randn(40, 8), torch.randn(40), None)
    dead_F = torch.arange(40) % 9 == 0  # five
    whole, bounded = (
        Preactivations(x, *params, Execution(dead_at_most=most)).top_k_among(dead_F, 20) for most in (None, 8)
    )
    for a, b in ((whole.values, bounded.values), (whole.pattern.indices_N, bounded.pattern.indices_N)):
        assert torch.equal(a, b)
    cut = Preactivations(x, *params, Execution(dead_at_most=2)).top_k_among(dead_F, 20)
    assert len(whole.values) == 30 and len(cut.values) == 12
