"""The compiled ops against their plain meaning, in float64 where they sum.

B tokens, D d_in, F latents, N entries, R bags, S SAEs.
"""

import ctypes
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from monosemy.ops import Workspace, cpu, reference
from monosemy.ops.pattern import SparsePattern
from monosemy.ops.reference import AdamStep

built = pytest.mark.skipif(not cpu.available(), reason="no C compiler here")
linux = pytest.mark.skipif(
    not Path("/proc/self/maps").exists(), reason="what a process has loaded is known on Linux"
)


@pytest.fixture(autouse=True)
def _bf16_where_it_is_asked_for(monkeypatch):
    """Whatever is faster on this processor."""
    monkeypatch.setattr(cpu, "cpu_estimates_in_bf16", lambda: True)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def equal(got, wanted):
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, wanted, strict=True)), (
        got,
        wanted,
    )


def close(got, wanted):
    assert got.dtype == torch.float32 and got.shape == wanted.shape
    if wanted.numel():
        assert (got - wanted).abs().max() <= 1e-6 * wanted.abs().max()


@pytest.fixture
def as_many_threads():
    """What sets the number of threads; it is as before after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# --- selections ---------------------------------------------------------------------------------------------

VALUES = {
    "normal": lambda x: x,
    "integers": lambda x: x.round(),
    "equal": lambda x: torch.ones_like(x),
    "zeros of both signs": lambda x: x.relu() * x.roll(1).sign(),
    "infinities": lambda x: torch.where(x > 0.5, x, -torch.inf).where(x < 1.5, torch.inf),
    "one loud token": lambda x: torch.cat([x[:1] + 9, x[1:]]),
}
SHAPES = [(1, 1), (3, 64), (5, 7), (33, 130), (2, 5000), (70, 1025)]


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize(("B", "F"), SHAPES)
def test_selections_are_exact(B, F, values, dtype):
    pre_BF = VALUES[values](draw(B, F)).to(dtype)
    for k in {1, 2, max(F // 300, 1), max(F // 9, 1), F}:
        equal(cpu.top_k(pre_BF, k), reference.top_k(pre_BF, k))
        equal(cpu.batch_top_k(pre_BF, B * k), reference.batch_top_k(pre_BF, B * k))
    equal(cpu.batch_top_k(pre_BF, 1), reference.batch_top_k(pre_BF, 1))
    for threshold in (0.0, -0.0, 0.3, -1, torch.tensor(0.7), 1e9, -torch.inf, draw(F, seed=1)):
        equal(cpu.above(pre_BF, threshold), reference.above(pre_BF, threshold))


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("among", ["none", "one", "some", "all"])
def test_top_k_among_some_latents(among, values, dtype):
    B, F = 9, 1025
    pre_BF = VALUES[values](draw(B, F)).to(dtype)
    among_F = {
        "none": torch.zeros(F),
        "one": torch.arange(F) == 700,
        "some": draw(F, seed=1) > 0,
        "all": torch.ones(F),
    }[among].bool()
    latents_M = among_F.nonzero().squeeze(1)
    for k in (1, 3, 80, F):
        indices_N, offsets_B1, values_N = cpu.top_k(pre_BF, k, among_F)
        columns = reference.top_k(pre_BF[:, latents_M], min(k, len(latents_M)))
        equal(
            (indices_N, offsets_B1, values_N),
            (latents_M[columns.indices_N].int(), columns.offsets_B1, columns.values_N),
        )


@built
def test_what_is_not_a_number_is_survived():
    pre_BF = draw(20, 600)
    pre_BF[draw(20, 600, seed=1) > 0.5] = torch.nan
    pre_BF[:4] = -torch.tensor(torch.nan)
    for picked, n in (
        (cpu.top_k(pre_BF, 9), 180),
        (cpu.batch_top_k(pre_BF, 500), 500),
        (cpu.top_k(pre_BF, 600), 12_000),
    ):
        pattern = SparsePattern(picked.indices_N, picked.offsets_B1, 600)
        assert len(picked.indices_N) == n == picked.offsets_B1[-1]
        assert (pattern.bags_N * 600 + pattern.indices_N).diff().min() > 0 and pattern.indices_N.max() < 600
    assert cpu.above(pre_BF, torch.nan).offsets_B1.max() == 0


# --- estimates ----------------------------------------------------------------------------------------------

OPERANDS = {
    "normal": lambda x, W: (x, W),
    "a few large columns, as in a residual stream": lambda x, W: (
        x * torch.where(torch.arange(x.shape[1]) % 11 == 3, 300.0, 1.0),
        W,
    ),
    "tokens of all sizes": lambda x, W: (x * 10 ** torch.linspace(-30, 12, len(x))[:, None], W),
    "latents of all sizes": lambda x, W: (x, W * 10 ** torch.linspace(-30, 6, len(W))[:, None]),
    "zeros": lambda x, W: (
        x * (torch.arange(len(x)) % 2)[:, None],
        W * (torch.arange(len(W)) % 3 > 0)[:, None],
    ),
    "single entries": lambda x, W: (x * (torch.arange(x.shape[1]) == 0), W * (torch.arange(W.shape[1]) == 0)),
    "latents that hardly differ": lambda x, W: (x, W[:1] + 1e-4 * W),
}
OPERAND_SHAPES = [(1, 1, 1), (5, 3, 7), (13, 64, 33), (100, 65, 1100), (7, 576, 40)]


def estimated(B, D, F, operands, bf16):
    """An estimate, the exact pre-activations in float64, and for each token what float32 may lose of them."""
    x_BD, W_FD = OPERANDS[operands](draw(B, D), draw(F, D, seed=1))
    b_F = 0.1 * draw(F, seed=2)
    estimate = cpu.estimate(x_BD, W_FD, b_F, Workspace(), W_FD.bfloat16() if bf16 else None)
    if estimate is None:
        pytest.skip("no product of integers on this processor")
    lost_B = 1e-6 * (x_BD.abs().double() @ W_FD.abs().double().T + b_F.abs()).amax(1)
    return estimate, x_BD.double() @ W_FD.double().T + b_F, lost_B


every_operand = pytest.mark.parametrize("operands", OPERANDS)
each_estimate = pytest.mark.parametrize("bf16", [False, True], ids=["integers", "bf16"])


@built
@each_estimate
@every_operand
@pytest.mark.parametrize(("B", "D", "F"), OPERAND_SHAPES)
def test_an_estimate_is_as_near_as_it_says(B, D, F, operands, bf16):
    estimate, exact_BF, _ = estimated(B, D, F, operands, bf16)
    off_BF = (estimate.pre_BF.double() - exact_BF).abs()
    assert (off_BF <= estimate.error_B[:, None].double() + estimate.relative * exact_BF.abs()).all()
    if not bf16 and operands == "normal" and B > 1:
        assert (estimate.error_B < 0.02 * exact_BF.std(1)).all(), "and says that it is near"


@built
@each_estimate
@every_operand
@pytest.mark.parametrize(("B", "D", "F"), OPERAND_SHAPES)
def test_what_is_picked_of_an_estimate_is_exact(B, D, F, operands, bf16):
    """Values are float32's, and whatever was left is no larger than what was picked, but for what float32
    cannot tell apart."""
    estimate, exact_BF, lost_B = estimated(B, D, F, operands, bf16)
    among_F = torch.arange(F) % 3 != 1
    middle = exact_BF.median()
    thresholds_F = middle + 0.3 * draw(F, seed=3)
    for k in {1, max(F // 20, 1), F}:
        cases = {
            "top_k": (cpu.top_k(estimate, k), torch.ones(F, dtype=torch.bool), None),
            "among": (cpu.top_k(estimate, k, among_F), among_F, None),
            "batch": (cpu.batch_top_k(estimate, B * k), torch.ones(F, dtype=torch.bool), None),
            "above": (cpu.above(estimate, float(middle)), torch.ones(F, dtype=torch.bool), middle),
            "above each": (
                cpu.above(estimate, thresholds_F.float()),
                torch.ones(F, dtype=torch.bool),
                thresholds_F,
            ),
        }
        for case, (picked, allowed_F, threshold) in cases.items():
            e = SparsePattern(picked.indices_N, picked.offsets_B1, F)
            tokens_N, indices_N = e.bags_N.long(), picked.indices_N.long()
            assert ((tokens_N * F + indices_N).diff() > 0).all()
            assert ((picked.values_N - exact_BF[tokens_N, indices_N]).abs() <= lost_B[tokens_N]).all()
            mask_BF = torch.zeros(B, F, dtype=torch.bool)
            mask_BF[tokens_N, indices_N] = True
            assert not mask_BF[:, ~allowed_F].any()
            if threshold is not None:
                assert (mask_BF == (exact_BF > threshold))[
                    (exact_BF - threshold).abs() > 2 * lost_B[:, None]
                ].all(), case
                continue
            assert len(indices_N) == B * min(k, int(allowed_F.sum()))
            # the least that was picked and the most that was left, of each token, or of all
            least_B = torch.where(mask_BF, exact_BF + 2 * lost_B[:, None], torch.inf).amin(1)
            most_B = torch.where(~mask_BF & allowed_F, exact_BF, -torch.inf).amax(1)
            assert (least_B.min() >= most_B.max()) if case == "batch" else (least_B >= most_B).all(), case


@built
@each_estimate
@pytest.mark.parametrize("where", ["x", "W", "b"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_numbers_that_no_bound_is_known_of_are_not_estimated(where, value, bf16):
    operands = {"x": draw(9, 16), "W": draw(40, 16), "b": draw(40)}
    operands[where].view(-1)[5] = value
    bf16_FD = operands["W"].bfloat16() if bf16 else None
    estimate = cpu.estimate(*operands.values(), Workspace(), bf16_FD)
    assert estimate is None or (value == 1e30 and estimate.error_B.isfinite().all())


@built
def test_bf16_is_estimated_by_the_faster_product(monkeypatch):
    x_BD, W_FD, b_F = draw(9, 16), draw(40, 16, seed=1), draw(40, seed=2)
    for faster, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(cpu, "cpu_estimates_in_bf16", lambda faster=faster: faster)
        estimate = cpu.estimate(x_BD, W_FD, b_F, Workspace(), W_FD.bfloat16())
        assert estimate is None or estimate.pre_BF.dtype == dtype
        assert estimate is not None or not (faster or cpu._call("panel"))


# --- sums over entries --------------------------------------------------------------------------------------


def entries_of(mask_BF, bags=1):
    """The set places of a mask; each token's in so many bags of equal ranges of latents."""
    B, F = mask_BF.shape
    tokens_N, indices_N = mask_BF.nonzero().unbind(1)
    places_N = tokens_N * bags + indices_N * bags // F
    return SparsePattern(
        indices_N.int(), torch.searchsorted(places_N, torch.arange(B * bags + 1), out_int32=True), F
    )


MASKS = {
    "some": lambda B, F: draw(B, F, seed=1) > 1,
    "none": lambda B, F: torch.zeros(B, F, dtype=torch.bool),
    "all": lambda B, F: torch.ones(B, F, dtype=torch.bool),
    "one latent always": lambda B, F: (draw(B, F, seed=1) > 2) | (torch.arange(F) == F // 2),
    "every other token": lambda B, F: (draw(B, F, seed=1) > 0) & (torch.arange(B)[:, None] % 2 == 0),
}


@built
@pytest.mark.parametrize("bags", [1, 3])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("B", "D", "F"), [(1, 1, 1), (5, 3, 7), (33, 17, 130), (700, 41, 19), (64, 24, 96)])
def test_sums_are_the_plain_ones(B, D, F, mask, bags):
    e = entries_of(MASKS[mask](B, F), bags)
    equal(e.by_latent(cpu.sort_by_latent), reference.sort_by_latent(e.indices_N, e.offsets_R1, F))
    values_N, W_FD, g_RD = draw(len(e.indices_N), seed=2), draw(F, D, seed=3), draw(B * bags, D, seed=4)
    doubles = values_N.double(), W_FD.double(), g_RD.double()

    close(cpu.sum_by_latent(values_N, e), reference.sum_by_latent(doubles[0], e))
    close(cpu.decode(values_N, W_FD, e), reference.decode(*doubles[:2], e))
    for got, wanted in zip(
        cpu.encode_backward(values_N, g_RD, e),
        reference.encode_backward(doubles[0], doubles[2], e),
        strict=True,
    ):
        close(got, wanted)
    d_values_N, d_W_FD = reference.decode_backward(doubles[2], *doubles[:2], e, weight=True)
    got, got_W_FD = cpu.decode_backward(g_RD, values_N, W_FD, e, weight=True)
    close(got, d_values_N)
    close(got_W_FD, d_W_FD)
    got, nothing = cpu.decode_backward(g_RD, values_N, W_FD, e, weight=False)
    close(got, d_values_N)
    assert nothing is None

    # in an array that is lent, and added to one
    lent_FD, into_FD = torch.full((F, D), torch.nan), draw(F, D, seed=5)
    for got in (
        cpu.encode_backward(values_N, g_RD, e, lent_FD)[0],
        cpu.decode_backward(g_RD, values_N, W_FD, e, True, lent_FD)[1],
    ):
        assert got.data_ptr() == lent_FD.data_ptr() and torch.equal(got, got_W_FD)
    together_FD = into_FD + got_W_FD
    cpu.add_rows(values_N, g_RD, e, into_FD)
    assert torch.equal(into_FD, together_FD)


# --- the update ---------------------------------------------------------------------------------------------


def adam(ops, dtype, shape, constraint, *, beta1, bf16_copy, steps=3):
    """Parameters, moments and gradient norms after some steps, of which the second SAE has its second
    refused."""
    S = shape[0]
    p = draw(*shape).to(dtype)
    if constraint != "free":
        p /= p.norm(dim=-1, keepdim=True)
    m, v = torch.zeros_like(p) if beta1 else None, torch.zeros_like(p)
    copy = p.bfloat16() if bf16_copy else None
    steps_S, norms = torch.zeros(S), []
    for step in range(steps):
        grads = [draw(*shape[1:], seed=10 * step + s + 1).to(dtype) for s in range(S)]
        norms.append(ops.square_norms(p, grads, constraint))
        scale_S = torch.linspace(0.5, 1, S)
        if step == 1 and S > 1:
            scale_S[1] = torch.nan
        steps_S += scale_S.isfinite()
        ops.update(
            p,
            grads,
            m,
            v,
            copy,
            AdamStep(
                lr_S=torch.linspace(1e-3, 1e-2, S),
                scale_S=scale_S,
                steps_S=steps_S,
                betas=(beta1, 0.999),
                eps=1e-8,
                constraint=constraint,
            ),
        )
    return {"p": p, "m": m, "v": v, "norms": torch.stack(norms), "bf16_copy": copy}


@built
@pytest.mark.parametrize(
    ("shape", "constraint"),
    [
        *(
            ((S, 130, C), constraint)
            for S in (1, 3)
            for C in (5, 24)
            for constraint in ("free", "project", "constrain")
        ),
        ((1, 1, 1), "free"),
        ((3, 2500), "free"),
        ((1, 3), "free"),
    ],
)
@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("bf16_copy", [False, True])
def test_updates_are_the_plain_ones(shape, constraint, beta1, bf16_copy):
    got = adam(cpu, torch.float32, shape, constraint, beta1=beta1, bf16_copy=bf16_copy)
    wanted = adam(reference, torch.float64, shape, constraint, beta1=beta1, bf16_copy=bf16_copy)
    for name in ("p", "v", "norms", *(["m"] if beta1 else [])):
        close(got[name], wanted[name])
    if bf16_copy:
        assert torch.equal(got["bf16_copy"], got["p"].bfloat16())


@built
def test_a_row_that_is_not_finite_stays_one_row():
    p, v, bf16_copy = draw(1, 40, 9), torch.zeros(1, 40, 9), torch.zeros(1, 40, 9, dtype=torch.bfloat16)
    g = draw(40, 9, seed=1)
    g[7, 3] = torch.inf
    assert not cpu.square_norms(p, [g], "free").isfinite()
    numbers = {n: torch.ones(1) for n in ("lr_S", "scale_S", "steps_S")}
    cpu.update(
        p, [g], None, v, bf16_copy, AdamStep(**numbers, betas=(0.0, 0.999), eps=1e-8, constraint="project")
    )
    assert (
        p.isfinite().all(2)[0].tolist()
        == bf16_copy.isfinite().all(2)[0].tolist()
        == [r != 7 for r in range(40)]
    )
    assert torch.equal(bf16_copy.isnan(), p.isnan())


# --- all of them --------------------------------------------------------------------------------------------


@built
def test_the_number_of_threads_changes_no_bit(as_many_threads):
    B, D, F = 600, 33, 300
    pre_BF, W_FD, rows_BD, b_F = draw(B, F), draw(F, D, seed=1), draw(B, D, seed=2), draw(F, seed=3)
    pre_BF[:, 5] += 9  # a latent on every token

    def everything():
        picked = cpu.batch_top_k(pre_BF, B * 9)
        e = SparsePattern(picked.indices_N, picked.offsets_B1, F)
        decoded_BD = cpu.decode(picked.values_N, W_FD, e)
        d_values_N, d_W_FD = cpu.decode_backward(decoded_BD, picked.values_N, W_FD, e, weight=True)
        after = adam(cpu, torch.float32, (2, 130, 24), "project", beta1=0.9, bf16_copy=False)
        d_W_enc_FD, d_b_F = cpu.encode_backward(d_values_N, decoded_BD, e)
        selected = [*picked, *cpu.top_k(pre_BF, 4), *cpu.above(pre_BF, 1)]
        for pre in (
            cpu.estimate(rows_BD, W_FD, b_F, Workspace(), bf16_FD) for bf16_FD in (None, W_FD.bfloat16())
        ):
            pre = pre_BF if pre is None else pre
            selected += [*cpu.batch_top_k(pre, B * 9), *cpu.top_k(pre, 4), *cpu.above(pre, 1)]
        return [
            *selected,
            *e.by_latent(cpu.sort_by_latent),
            decoded_BD,
            d_values_N,
            d_W_FD,
            d_W_enc_FD,
            d_b_F,
            after["p"],
            after["norms"],
        ]

    as_many_threads(1)
    wanted = everything()
    for n in (2, 3):
        as_many_threads(n)
        equal(everything(), wanted)


@built
def test_arguments_are_named_when_they_do_not_fit():
    e = entries_of(draw(4, 6) > 0)
    values_N = draw(len(e.indices_N))
    for W_FD in (draw(6, 4).double(), draw(4, 6).T):
        with pytest.raises(AssertionError, match="W_FD"):
            cpu.decode(values_N, W_FD, e)
    with pytest.raises(AssertionError, match="pre_BF"):
        cpu.top_k(draw(4, 6).half(), 2)


@built
@linux
def test_torchs_own_threads_are_used(as_many_threads):
    library = cpu._library()
    loaded = {
        line.split()[-1]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if re.match(r"lib(g|i)?omp", line.rsplit("/")[-1])
    }
    assert len(loaded) == 1, loaded
    for n in (1, 2):
        as_many_threads(n)
        assert library.omp_get_max_threads() == n


# --- building -----------------------------------------------------------------------------------------------


@pytest.fixture
def afresh(tmp_path, monkeypatch):
    """Nothing is built or loaded yet, and the cache is an empty folder."""
    monkeypatch.setenv("MONOSEMY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MONOSEMY_COMPILED", raising=False)
    for cached in (cpu.available, cpu._library):
        cached.cache_clear()
    yield tmp_path / "cache"
    for cached in (cpu.available, cpu._library):
        cached.cache_clear()


@pytest.fixture
def small(afresh, tmp_path, monkeypatch):
    """Another source, which is quickly built."""
    monkeypatch.setattr(cpu, "SOURCE", tmp_path / "small.c")
    cpu.SOURCE.write_text("int answer(void) { return 42; }\n")
    return afresh


@built
def test_processes_may_build_at_once(small):
    code = (
        "import sys, pathlib; from monosemy.ops import cpu as c; c.SOURCE = pathlib.Path(sys.argv[1]); "
        "print(c._library().answer())"
    )
    command = [sys.executable, "-c", code, str(cpu.SOURCE)]
    racing = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for process in racing:
        out, err = process.communicate()
        assert out == "42\n", err
    assert [path.suffix for path in small.iterdir()] == [".so"]


@built
def test_a_damaged_library_is_built_again(small):
    path = cpu._built()
    whole, inode = path.read_bytes(), path.stat().st_ino
    assert cpu._built() == path and path.stat().st_ino == inode, "what is whole is not built again"
    for damaged in (whole[: len(whole) // 2], b"\0" * len(whole), b""):
        path.write_bytes(damaged)
        assert cpu._built().read_bytes() == whole
    assert [p.read_bytes() for p in small.iterdir()] == [whole]
    assert ctypes.CDLL(str(path)).answer() == 42


@built
def test_what_was_made_of_another_source_or_by_another_compiler_is_left(small, monkeypatch):
    paths = [cpu._built()]
    monkeypatch.setenv("CC", "cc -DANOTHER")
    paths += [cpu._built()]
    cpu.SOURCE.write_text("int answer(void) { return 43; }\n")
    paths += [cpu._built()]
    assert len(set(paths)) == 3 and set(small.iterdir()) == set(paths)
    assert [ctypes.CDLL(str(path)).answer() for path in paths] == [42, 42, 43]


@pytest.mark.parametrize(
    ("compiler", "cause"),
    [("no-such-compiler", "no-such-compiler"), ("cc -no-such-option", "no-such-option")],
)
def test_without_a_compiler_slower_ops_run(afresh, monkeypatch, caplog, compiler, cause):
    monkeypatch.setenv("CC", compiler)
    with caplog.at_level(logging.WARNING):
        assert not cpu.available()
        assert not cpu.available()
    (record,) = caplog.records
    assert cause in record.getMessage()


def test_it_can_be_turned_off(afresh, monkeypatch, caplog):
    monkeypatch.setenv("MONOSEMY_COMPILED", "0")
    assert not cpu.available() and not caplog.records and not afresh.exists()
