"""The Triton form of every op against the plain one: on a GPU where there is one, else in Triton's
interpreter (see conftest.py).

B tokens, D d_in, F latents, N entries, S SAEs.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytest.importorskip("triton")

from benchmarks.alone import LoneTrainer  # noqa: E402
from monosemy import ops  # noqa: E402
from monosemy.ops import reference  # noqa: E402
from monosemy.ops import triton as fast  # noqa: E402
from monosemy.ops.pattern import SparsePattern  # noqa: E402
from monosemy.ops.reference import AdamStep  # noqa: E402
from monosemy.ops.triton import selections, sums  # noqa: E402
from monosemy.sae import architecture  # noqa: E402
from monosemy.schedule import Schedule  # noqa: E402
from monosemy.training.trainer import SAESpec  # noqa: E402
from tests.gpu import test_ops as checks  # noqa: E402
from tests.gpu.sizes import FORMULAS  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def form():
    with ops.use_backend("triton"):
        yield


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(got, wanted, tolerance=2e-6):
    assert got.shape == wanted.shape
    error = (got.cpu().double() - wanted.double()).abs().max() if wanted.numel() else 0
    assert error <= tolerance * max(1.0, float(wanted.abs().max()) if wanted.numel() else 0)


# --- selections ---------------------------------------------------------------------------------------------


def check_picked(got, wanted, capacity):
    n = int(wanted.offsets_B1[-1])
    latents, starts, values = (t.cpu() for t in got)
    assert len(latents) == len(values) == capacity
    assert latents.dtype == starts.dtype == torch.int32 and values.dtype == torch.float32
    assert starts.tolist() == wanted.offsets_B1.tolist()
    assert latents[:n].tolist() == wanted.indices_N.tolist()
    assert torch.equal(values[:n], wanted.values_N.float())
    assert not latents[n:].any() and not values[n:].any()


PRE = {
    "normal": lambda B, F: draw(B, F),
    "ties": lambda B, F: (2 * draw(B, F)).round(),
    "equal": lambda B, F: torch.full((B, F), -3.0),
    "infinite": lambda B, F: torch.where(draw(B, F) > 0.3, -torch.inf, draw(B, F, seed=1)),
    "zeros of both signs": lambda B, F: torch.where(draw(B, F) > 0, 0.0, -0.0),
}


SIZES = [
    ("normal", 1, 1, 1, 1),
    ("normal", 2, 37, 1, 1),
    ("normal", 2, 37, 37, 74),
    *((kind, 2, 37, 9, 23) for kind in PRE),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "B", "F", "k", "n"), SIZES)
def test_largest(kind, B, F, k, n, dtype):
    pre = PRE[kind](B, F).to(dtype)
    check_picked(fast.top_k(pre.to(DEVICE), k), reference.top_k(pre, k), B * k)
    check_picked(fast.batch_top_k(pre.to(DEVICE), n), reference.batch_top_k(pre, n), n)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_largest_of_long_rows(dtype):
    """Several values to a share, and rows that keep much more than their part of a batch."""
    pre = (draw(2, 4999) + torch.tensor([[0.0], [1.0]])).to(dtype)
    check_picked(fast.top_k(pre.to(DEVICE), 5), reference.top_k(pre, 5), 10)
    check_picked(fast.batch_top_k(pre.to(DEVICE), 60), reference.batch_top_k(pre, 60), 60)


def test_lists_that_overflow():
    """512 shares of a row have all the large values, so that many more than k reach the bound; or one row of
    a batch has all of them."""
    k, F = 512, 8200
    M, C = selections._sizes(F, k)
    pre = torch.where(torch.arange(F) % M < k, 10, 0) + draw(1, F).sigmoid()
    shares = torch.nn.functional.pad(pre, (0, -F % M), value=-torch.inf).view(-1, M)
    assert (pre >= shares.amax(0).sort().values[-k]).sum() > C
    pre = pre.bfloat16()
    check_picked(fast.top_k(pre.to(DEVICE), k), reference.top_k(pre, k), k)

    k, F = 300, 3000
    assert 4 * k > selections._sizes(F, k)[1]
    pre = (
        torch.stack(
            [torch.where(torch.arange(F) < 4 * k, 10, 0), torch.zeros(F), torch.zeros(F), torch.zeros(F)]
        )
        + draw(4, F).sigmoid()
    )
    pre = pre.bfloat16()
    check_picked(
        fast.batch_top_k(pre.to(DEVICE), 4 * k - 7), reference.batch_top_k(pre, 4 * k - 7), 4 * k - 7
    )


def test_nan_is_the_largest():
    pre = draw(2, 40).float()
    pre[0, 7] = pre[1, :3] = torch.nan
    for got, wanted in (
        (fast.top_k(pre.to(DEVICE), 2), reference.top_k(pre, 2)),
        (fast.batch_top_k(pre.to(DEVICE), 9), reference.batch_top_k(pre, 9)),
    ):
        assert (
            got.indices_N.tolist() == wanted.indices_N.tolist()
            and got.offsets_B1.tolist() == wanted.offsets_B1.tolist()
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_largest_among_some(dtype):
    pre = (3 * draw(2, 37)).round().to(dtype)
    one, some = torch.arange(37) == 11, torch.arange(37) % 3 == 0
    for among in (torch.zeros(37, dtype=torch.bool), one, some, torch.ones(37, dtype=torch.bool)):
        for k in (4, 37):
            wanted = reference.top_k(pre, k, among)
            check_picked(fast.top_k(pre.to(DEVICE), k, among.to(DEVICE)), wanted, 2 * k)
            assert int(wanted.offsets_B1[1]) == min(k, int(among.sum()))


THRESHOLDS = {
    "number": lambda F: 0.3,
    "scalar": lambda F: torch.tensor(0.3),
    "each": lambda F: draw(F, seed=5).float(),
    "nothing above": lambda F: 1e9,
    "all above": lambda F: -torch.inf,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize(("B", "F"), [(1, 1), (3, 37), (2, 2500)])
def test_above(B, F, threshold, dtype):
    pre, threshold = draw(B, F).to(dtype), THRESHOLDS[threshold](F)
    pre[0, 0] = 0.3  # what bfloat16 has of it is not above the number
    here = threshold.to(DEVICE) if isinstance(threshold, torch.Tensor) else threshold
    wanted = reference.above(pre, threshold)
    n = len(wanted.indices_N)
    check_picked(fast.above(pre.to(DEVICE), here), wanted, B * F)
    check_picked(fast.above(pre.to(DEVICE), here, n + 5), wanted, n + 5)
    assert int(fast.count_above(pre.to(DEVICE), here)) == n
    if n > 1:  # overflow: the first that fit
        kept = n // 2
        first = (wanted.indices_N[:kept], wanted.offsets_B1.clamp(max=kept), wanted.values_N[:kept])
        check_picked(fast.above(pre.to(DEVICE), here, kept), ops.Selection(*first), kept)


def test_a_whole_list_is_written_whole(monkeypatch):
    def poisoned(offsets_B1, N):
        nothing = offsets_B1.new_full((N,), torch.nan, dtype=torch.float32)
        return ops.Selection(offsets_B1.new_full((N,), -7), offsets_B1, nothing)

    monkeypatch.setattr(selections, "_whole", poisoned)
    for pre in (kind(4, 50).float() for kind in PRE.values()):
        for picked in (fast.top_k(pre.to(DEVICE), 6), fast.batch_top_k(pre.to(DEVICE), 19)):
            assert (picked.indices_N >= 0).all() and not picked.values_N.isnan().any()


def test_nothing_is_written_behind_a_list(monkeypatch):
    behind = []

    def guarded(offsets_B1, N):
        latents, values = (
            offsets_B1.new_full((N + 99,), -7),
            offsets_B1.new_full((N + 99,), -7, dtype=torch.float32),
        )
        latents[:N], values[:N] = 0, 0
        behind.extend((latents[N:], values[N:]))
        return ops.Selection(latents[:N], offsets_B1, values[:N])

    monkeypatch.setattr(selections, "_padding", guarded)
    monkeypatch.setattr(selections, "_whole", guarded)
    pre = draw(4, 50).float().to(DEVICE)
    for capacity in (0, 1, 40, 70):
        assert fast.above(pre, -0.5, capacity).offsets_B1[-1] == capacity < fast.count_above(pre, -0.5)
    fast.top_k(pre, 6)
    fast.top_k(pre, 6, pre[0] > 0)
    fast.batch_top_k(pre, 19)
    assert len(behind) == 14 and all((tail == -7).all() for tail in behind)


# --- sums over entries --------------------------------------------------------------------------------------


MASKS = {
    "some": lambda B, F: draw(B, F) > 0.5,
    "none": lambda B, F: torch.zeros(B, F, dtype=torch.bool),
    "all": lambda B, F: torch.ones(B, F, dtype=torch.bool),
    "one latent always": lambda B, F: torch.arange(F).expand(B, F) == F // 2,
}


def entries(mask_BF, padding, bags=1):
    """The entries of a mask with places left behind them, or each token's in several bags; and the same
    without padding."""
    F = mask_BF.shape[1]
    indices_N = mask_BF.nonzero()[:, 1].int()
    numbers = mask_BF.view(-1, F // bags).sum(1)
    offsets_R1 = torch.nn.functional.pad(numbers.cumsum(0), (1, 0)).int()
    padded_N = torch.nn.functional.pad(indices_N, (0, padding))
    return SparsePattern(padded_N.to(DEVICE), offsets_R1.to(DEVICE), F, padded=True), SparsePattern(
        indices_N, offsets_R1, F
    )


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("B", "D", "F", "bags", "padding"),
    [(1, 1, 1, 1, 9), (5, 3, 8, 1, 0), (5, 3, 8, 4, 9), (2, 1030, 3, 1, 9), (300, 6, 1, 1, 9)],
)
def test_sums(B, D, F, bags, padding, mask):
    e, wanted_e = entries(MASKS[mask](B, F), padding, bags)
    n, R = len(wanted_e.indices_N), B * bags
    values, W, g = draw(n, seed=1), draw(F, D, seed=2), draw(R, D, seed=3)
    values_N, W_FD, g_RD = (
        torch.nn.functional.pad(values, (0, padding)).float().to(DEVICE),
        W.float().to(DEVICE),
        g.float().to(DEVICE),
    )
    order_N, offsets_F1 = e.by_latent(fast.sort_by_latent)
    with ops.use_backend("reference"):
        wanted_order_N, wanted_starts_F1 = wanted_e.by_latent(reference.sort_by_latent)
        wanted_values, wanted_W = reference.decode_backward(g, values, W, wanted_e, True)
        wanted_rows, wanted_b = reference.encode_backward(values, g, wanted_e)

    assert order_N.dtype == offsets_F1.dtype == torch.int32 and sorted(order_N.tolist()) == list(
        range(n + padding)
    )
    assert (
        order_N[:n].tolist() == wanted_order_N.tolist() and offsets_F1.tolist() == wanted_starts_F1.tolist()
    )
    close(fast.sum_by_latent(values_N, e), wanted_b)
    with ops.use_backend("reference"):
        wanted_counts, least = (
            reference.count_by_latent(values, wanted_e),
            reference.smallest(values, wanted_e),
        )
    close(fast.count_by_latent(values_N, e), wanted_counts)
    assert torch.equal(fast.smallest(values_N, e).cpu(), least.float())
    close(fast.decode(values_N, W_FD, e), reference.decode(values, W, wanted_e))
    d_values_N, d_W_FD = fast.decode_backward(g_RD, values_N, W_FD, e, True)
    close(d_values_N, torch.nn.functional.pad(wanted_values, (0, padding)))
    close(d_W_FD, wanted_W)
    assert d_W_FD.is_contiguous()
    d_values_alone_N, nothing = fast.decode_backward(g_RD, values_N, W_FD, e, False)
    assert nothing is None and torch.equal(d_values_alone_N, d_values_N)
    rows_FD, b_F = fast.encode_backward(values_N, g_RD, e)
    close(rows_FD, wanted_rows)
    close(b_F, wanted_b)
    if B < 100 or mask == "all":  # where latents have entries enough for several programs
        errors = checks.Errors()
        checks.check_norms(fast, errors, values_N, W_FD, g_RD, e)
        errors.check()


def test_padding_belongs_to_the_last_bag():
    e, _ = entries(MASKS["some"](5, 8), 9)
    assert sums._bags(e).tolist() == SparsePattern(e.indices_N, e.offsets_R1, 8, padded=True).bags_N.tolist()


def test_errors_and_counts():
    checks.check_counts(fast, torch.device(DEVICE))


def test_whole_updates():
    checks.check_adam_step(fast, torch.device(DEVICE))


def test_wide_latents_are_grouped():
    """More latents than 16 bits have room for."""
    indices_N, starts = (
        torch.tensor([3, 70_000, 3, 40_000], dtype=torch.int32),
        torch.tensor([0, 2, 4], dtype=torch.int32),
    )
    order_N, offsets_F1 = fast.sort_by_latent(indices_N.to(DEVICE), starts.to(DEVICE), 70_001)
    assert order_N.tolist() == [0, 2, 3, 1]
    assert offsets_F1[[3, 4, 40_000, 40_001, 70_000, 70_001]].tolist() == [0, 2, 2, 3, 3, 4]


def test_order_of_sums_is_that_of_the_data():
    """Whatever the capacity: the same bits."""
    mask = draw(150, 2) > -1.5
    results = []
    for padding in (0, 1000):
        e, _ = entries(mask, padding)
        n = int(mask.sum())
        values_N = torch.nn.functional.pad(draw(n, seed=1), (0, padding)).float().to(DEVICE)
        g_RD, W_FD = draw(150, 7, seed=2).float().to(DEVICE), draw(2, 7, seed=3).float().to(DEVICE)
        d_values_N, d_W_FD = fast.decode_backward(g_RD, values_N, W_FD, e, True)
        results.append(
            (fast.sum_by_latent(values_N, e), fast.decode(values_N, W_FD, e), d_values_N[:n], d_W_FD)
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- the dense layout ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize(("B", "F"), [(1, 1), (3, 37), (2, 2500)])
def test_split(B, F, threshold, dtype):
    pre, threshold = draw(B, F).to(dtype), THRESHOLDS[threshold](F)
    pre[0, 0] = 0.3
    values, mask = torch.full((B, F), torch.nan), torch.zeros(B, F, dtype=torch.bool)
    here = [
        pre.to(DEVICE),
        threshold.to(DEVICE) if isinstance(threshold, torch.Tensor) else threshold,
        values.to(DEVICE),
        mask.to(DEVICE),
    ]
    sums_F, counts_F = fast.threshold_dense(*here)
    wanted_sums_F, wanted_counts_F = reference.threshold_dense(pre, threshold, values, mask)
    assert torch.equal(here[2].cpu(), values) and torch.equal(here[3].cpu(), mask)
    close(sums_F, wanted_sums_F)
    assert torch.equal(counts_F.cpu(), wanted_counts_F) and torch.equal(
        fast.count_positive(here[2]).cpu(), (values > 0).sum(0)
    )


@pytest.mark.parametrize("layout", ["rows", "columns", "one number"])
@pytest.mark.parametrize(("B", "F"), [(1, 1), (3, 37), (70, 600)])
def test_select(B, F, layout):
    """What is infinite or no number off the mask leaves no trace."""
    mask = draw(B, F, seed=1) > 0
    x = {"rows": draw(B, F), "columns": draw(F, B).T, "one number": draw(1).expand(B, F)}[layout]
    if layout != "one number":
        x.masked_fill_(~mask, torch.nan)
    out, wanted_out = torch.full((B, F), torch.nan), torch.zeros(B, F, dtype=torch.float64)
    here = out.to(DEVICE)
    x_BF = x.float().to(DEVICE) if layout == "rows" else x.float().expand(B, F).to(DEVICE)
    for add_F in (None, draw(F, seed=2)):
        sums_F = fast.masked_copy(
            mask.to(DEVICE), x_BF, here, None if add_F is None else add_F.float().to(DEVICE)
        )
        close(sums_F, reference.masked_copy(mask, x, wanted_out, add_F))
        close(here, wanted_out)


# --- the update ---------------------------------------------------------------------------------------------


def stacked(S, *shape):
    """Parameters whose rows are about 1 long, gradients, and moments as they may stand, in float64."""
    p = draw(S, *shape, seed=1)
    return (
        p / p.norm(dim=-1, keepdim=True),
        list(draw(S, *shape, seed=2)),
        draw(S, *shape, seed=3),
        draw(S, *shape, seed=4).square(),
    )


@pytest.mark.parametrize("constraint", ["project", "constrain", "free"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (1, 3, 2100), (10, 70, 33)])
def test_square_norms(shape, constraint):
    p, grads, _, _ = stacked(*shape)
    got = fast.square_norms(p.float().to(DEVICE), [g.float().to(DEVICE) for g in grads], constraint)
    close(got, reference.square_norms(p, grads, constraint))


MATRICES = [(1, 1, 1), (3, 5, 7), (1, 3, 2100), (10, 7, 33)]


@pytest.mark.parametrize("moment", [True, False])
@pytest.mark.parametrize(
    ("shape", "constraint"),
    [*((shape, c) for shape in MATRICES for c in ("project", "constrain", "free")), ((3, 2500), "free")],
)
def test_update(shape, constraint, moment):
    S = shape[0]
    p, grads, m, v = stacked(*shape)
    lr, scale = draw(S, seed=6).sigmoid(), draw(S, seed=7).sigmoid()
    steps = torch.tensor([1.0, 30, 10_000, 2, 3, 4, 5, 6, 7, 8][:S]).double()
    if S > 2:
        scale[1] = torch.nan
        grads[1].fill_(torch.nan)
    if S > 3:
        scale[2:4] = torch.tensor([torch.inf, -torch.inf])
    before, bf16_copy = p.clone(), torch.zeros_like(p).bfloat16()

    fixed = {"betas": (0.9 if moment else 0.0, 0.999), "eps": 1e-8, "constraint": constraint}
    here = [t.float().to(DEVICE) for t in (p, m, v)] + [bf16_copy.to(DEVICE)]
    per_sae = {"lr_S": lr, "scale_S": scale, "steps_S": steps}
    float_grads = [g.float().to(DEVICE) for g in grads]
    fast.update(
        here[0],
        float_grads,
        here[1] if moment else None,
        *here[2:],
        AdamStep(**{n: t.float().to(DEVICE) for n, t in per_sae.items()}, **fixed),
    )
    reference.update(
        p, [g.clone() for g in grads], m if moment else None, v, bf16_copy, AdamStep(**per_sae, **fixed)
    )
    for got, wanted in zip(here[:3], (p, m, v), strict=True):
        close(got, wanted)
    updated = scale.isfinite()
    assert not here[3].cpu()[~updated].any() and torch.equal(
        here[0].cpu()[~updated], before.float()[~updated]
    )
    # the interpreter cuts off where a GPU rounds to the nearest
    copy, whole = here[3].cpu()[updated].float(), here[0].cpu()[updated]
    assert (
        torch.equal(copy, whole.bfloat16().float())
        if CUDA
        else ((copy - whole).abs() <= 2**-7 * whole.abs()).all()
    )


def test_update_without_a_copy():
    p, grads, m, v = (
        [t.float().to(DEVICE) for t in x] if isinstance(x, list) else x.float().to(DEVICE)
        for x in stacked(2, 3, 4)
    )
    before, one = p.clone(), torch.ones(2, device=DEVICE)
    fast.update(
        p,
        grads,
        m,
        v,
        None,
        AdamStep(
            lr_S=one,
            scale_S=one,
            steps_S=one,
            betas=(0.9, 0.999),
            eps=1e-8,
            constraint="free",
        ),
    )
    assert (p != before).all()


# --- what a graph needs, and compilation --------------------------------------------------------------------


def everything(pre, among, x_BD, W_FD, b_F):
    """A step's ops, one after the other."""
    B, F = pre.shape
    results = []
    for picked in (
        fast.top_k(pre, 4),
        fast.top_k(pre, 4, among),
        fast.batch_top_k(pre, 3 * B),
        fast.above(pre, b_F, 3 * B),
        fast.above(pre, 0.5, 9),
    ):
        e = SparsePattern(picked.indices_N, picked.offsets_B1, F, padded=True)
        results += [
            *picked,
            fast.decode(picked.values_N, W_FD, e),
            *fast.encode_backward(picked.values_N, x_BD, e),
        ]
        results += fast.decode_backward(x_BD, picked.values_N, W_FD, e, True)
    p, m, v, bf16_copy, one = (
        W_FD[None].clone(),
        torch.zeros_like(W_FD)[None],
        torch.zeros_like(W_FD)[None],
        W_FD[None].bfloat16(),
        torch.ones_like(W_FD[0, :1]),
    )
    norm_S = fast.square_norms(p, [results[-1]], "project").sqrt()
    fast.update(
        p,
        [results[-1]],
        m,
        v,
        bf16_copy,
        AdamStep(
            lr_S=one,
            scale_S=1 / norm_S,
            steps_S=one,
            betas=(0.9, 0.999),
            eps=1e-8,
            constraint="project",
        ),
    )
    values_BF, mask_BF = (
        torch.empty(pre.shape, device=DEVICE),
        torch.empty(pre.shape, dtype=torch.bool, device=DEVICE),
    )
    fast.threshold_dense(pre, 0.1, values_BF, mask_BF)
    d_b_F = fast.masked_copy(mask_BF, values_BF.new_ones(()).expand_as(values_BF), values_BF)
    return [*results, fast.count_above(pre, 0.5), p, m, v, bf16_copy, d_b_F]


def step_inputs(seed):
    B, D, F = 2, 5, 14
    tensors = (
        draw(B, F, seed=seed).bfloat16(),
        draw(F, seed=seed + 1) > 0,
        *(draw(*s, seed=seed).float() for s in ((B, D), (F, D), (F,))),
    )
    return [t.to(DEVICE) for t in tensors]


WAITING = "_local_scalar_dense nonzero bincount masked_select _unique2 unique_dim is_nonzero equal".split()


class NoWaiting(TorchDispatchMode):
    """Fails at what would bring a number from the device to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in WAITING, name
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device():
    with NoWaiting():
        results = everything(*step_inputs(0))
        with pytest.raises(AssertionError):
            int(results[0].sum())


@pytest.mark.skipif(not CUDA, reason="a graph needs a GPU")
def test_a_step_is_captured():
    inputs = step_inputs(0)
    everything(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = everything(*inputs)
    for seed in (3, 4):
        for to, new in zip(inputs, step_inputs(seed), strict=True):
            to.copy_(new)
        graph.replay()
        for got, wanted in zip(results, everything(*step_inputs(seed)), strict=True):
            assert torch.equal(got, wanted)


def test_formulas_are_fused_and_unknown_operations_are_not():
    for name, count, formula in FORMULAS:
        assert fast.fused(formula, count) is not None, name
    assert fast.fused(torch.erf, 0) is None
    assert fast.fused(lambda v: v / v.sum(1, keepdim=True), 0) is None


def test_a_fused_formula_is_the_formula():
    torch.manual_seed(0)
    checks.check_dense(fast, torch.device(DEVICE))


@pytest.mark.parametrize(
    "capability",
    [pytest.param("80", marks=pytest.mark.certify), "90", pytest.param("100", marks=pytest.mark.certify)],
)
def test_every_kernel_compiles(capability, tmp_path):
    env = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(tmp_path)
    }
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_kernels.py"), capability],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    kernels = {
        line.removeprefix("def ").partition("(")[0]
        for file in Path(fast.__file__).parent.glob("*.py")
        for line in file.read_text().splitlines()
        if "_kernel(" in line and line.startswith("def ")
    }
    assert set(run.stdout.split()) == kernels and len(kernels) > 10


@pytest.mark.parametrize(
    ("name", "dense"),
    [
        ("top_k", False),
        ("matryoshka_batch_top_k", False),
        ("gated", True),
        ("jump_relu", False),
        ("p_anneal", True),
        ("standard_new", True),
        ("standard_new", False),
    ],
)
def test_whole_steps_are_the_reference_s(name, dense):
    """Three steps with all that follows from them: the update, the threshold, counters, and a batch that is
    skipped."""
    settings = {"k": 3} if architecture(name).always_sparse else {}
    trained = []
    for form in ("triton", "reference"):
        schedule = Schedule.of_run(4, 6, dead_feature_threshold=12, threshold_start_step=0, anneal_start=1)
        trainer = LoneTrainer(
            "x", SAESpec(name, 40, 1e-2, settings=settings), 5, schedule, on_nonfinite="skip"
        )
        trainer.sparse = not dense
        # lists of the ReLU kinds have a length on a GPU, here more than is ever needed
        trainer.capacity = 0 if dense or trainer.sae.always_sparse else 7 * 40
        with ops.use_backend(form):
            for step in range(4):
                x_BD = draw(6, 5, seed=step).float()
                trainer.step(torch.full_like(x_BD, torch.nan) if step == 2 else x_BD, step)
        trained.append(trainer.state_dict() | {f"last.{n}": v.clone() for n, v in trainer.last.items()})
    for key, wanted in trained[1].items():
        got = trained[0][key]
        assert torch.allclose(got.double(), wanted.double(), rtol=1e-4, atol=1e-5, equal_nan=True), key
