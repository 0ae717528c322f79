"""Every op of the backend that a device has, against its reference in float64: ties, latents that no token
and that every token has, k = 1 and k = F, empty lists and padding.

On a GPU at the shapes of training; elsewhere at tiny ones, by the backend of that device.

B tokens, D d_in, F d_sae, k entries of a token, N entries, R bags, S SAEs.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from monosemy import ops
from monosemy.ops import reference
from monosemy.ops.backends import backend_for
from monosemy.ops.pattern import RowNorms, Selection, SparsePattern
from monosemy.ops.reference import Adam, AdamStep, Constraint, Counters, Parameter, StepOutcome
from tests.gpu.sizes import DEVICE, FORMULAS, SIZES

pytestmark = pytest.mark.gpu
ENTRY_ERROR = 1e-5  # of sums in float32 against float64


class Called:
    """A module of ops that remembers which of them were called."""

    def __init__(self, module: ModuleType) -> None:
        self.module, self.names = module, set[str]()

    def __getattr__(self, name: str) -> Any:
        self.names.add(name)
        return getattr(self.module, name)


def poison(device: torch.device) -> None:
    """Leave NaN in memory that is about to be allocated, so that what is not written shows."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        kept = [
            torch.full((2**27,), torch.nan, device=device),
            *(torch.full((2**17,), torch.nan, device=device) for _ in range(16)),
        ]
        del kept


class Errors:
    """The largest error that was found in each op."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    def places(self, name: str, number: Any) -> None:
        """Count the places in which two results differ that must agree exactly."""
        self._add(f"{name}: places that differ", float(number), 0)

    def near(self, name: str, got: Tensor, wanted: Tensor) -> None:
        """Measure ||got - wanted|| / ||wanted||; infinite where shapes differ or a number is not finite."""
        error = float("inf")
        if got.shape == wanted.shape and got.isfinite().all() and wanted.isfinite().all():
            error = float(torch.linalg.vector_norm(got.double() - wanted)) / (
                float(torch.linalg.vector_norm(wanted)) or 1.0
            )
        self._add(f"{name}: relative error", error, ENTRY_ERROR)

    def _add(self, name: str, error: float, bound: float) -> None:
        if not error <= bound:
            self.found[name] = max(self.found.get(name, 0.0), error)

    def check(self) -> None:
        assert not self.found, self.found


def differing(got: Selection, wanted: Selection) -> float:
    """In how many places two selections differ, padding included."""
    starts = int((got.offsets_B1 != wanted.offsets_B1).sum())
    n = len(wanted.indices_N)
    if starts or len(got.indices_N) < n:
        return float(max(starts, 1))
    wrong = (got.indices_N[:n] != wanted.indices_N) | (got.values_N[:n].double() != wanted.values_N)
    return float(wrong.sum() + ((got.indices_N[n:] != 0) | (got.values_N[n:] != 0)).sum())


def preactivations(B: int, F: int, device: torch.device) -> dict[str, Tensor]:
    normal_BF = torch.randn(B, F, device=device)
    seldom_BF = torch.where(torch.rand(F, device=device) < 0.8, normal_BF - 100, normal_BF)
    always_BF = normal_BF.clone()
    always_BF[:, F // 2] += 100
    ties_BF = (torch.arange(B * F, device=device).view(B, F) % 3).float()
    return {
        "normal": normal_BF,
        "seldom": seldom_BF,
        "always": always_BF,
        "ties": ties_BF,
        "equal": torch.zeros_like(normal_BF),
    }


def selections(
    B: int, F: int, k: int, device: torch.device, *, every: bool
) -> dict[str, Callable[[Any, Tensor], Selection]]:
    """Calls of selections; the ones that training makes, or every kind."""
    some_F, each_F = torch.arange(F, device=device) % 3 == 0, torch.randn(F, device=device)
    calls: dict[str, Callable[[Any, Tensor], Selection]] = {
        "top_k": lambda o, pre: o.top_k(pre, k),
        "top_k of dead latents": lambda o, pre: o.top_k(pre, k, some_F),
        "batch_top_k": lambda o, pre: o.batch_top_k(pre, k * B),
        "above 0": lambda o, pre: o.above(pre, 0, B * F),
        "above thresholds": lambda o, pre: o.above(pre, each_F, B * F),
    }
    if every:
        calls |= {
            "top_k, k = 1": lambda o, pre: o.top_k(pre, 1),
            "top_k, k = F": lambda o, pre: o.top_k(pre, F),
            "top_k of no latents": lambda o, pre: o.top_k(pre, k, torch.zeros_like(some_F)),
            "top_k of fewer than k latents": lambda o, pre: o.top_k(pre, F, some_F),
            "batch_top_k, n = 1": lambda o, pre: o.batch_top_k(pre, 1),
            "batch_top_k, n = B F": lambda o, pre: o.batch_top_k(pre, B * F),
            "above, nothing is": lambda o, pre: o.above(pre, 1e9, B * F),
            "above, everything is": lambda o, pre: o.above(pre, -1e9, B * F),
        }
    return calls


def check_selections(fast: Any, device: torch.device) -> None:
    """Exactly the reference ops' entries, of float32 and bfloat16 pre-activations."""
    errors = Errors()
    aten = fast.__name__.endswith("aten")  # whose top_k has an order of its own among equal values
    for B, F, k, every in [(*SIZES.every, 7, True), *((*shape, False) for shape in SIZES.ordinary)]:
        for kind, pre_BF in preactivations(B, F, device).items():
            calls = selections(B, F, k, device, every=every).items()
            for dtype, (name, call) in itertools.product((torch.float32, torch.bfloat16), calls):
                if aten and kind != "normal" and name.startswith("top_k"):
                    continue
                wanted = call(reference, pre_BF.to(dtype).double())
                poison(device)
                errors.places(name, differing(call(fast, pre_BF.to(dtype)), wanted))
    errors.check()


def supports(B: int, F: int, k: int, device: torch.device) -> list[tuple[Selection, int]]:
    """Selections to sum over, and places for padding behind them, which lists have on a GPU alone."""
    pre = {name: pre_BF.double() for name, pre_BF in preactivations(B, F, device).items()}
    room = B * F if device.type == "cuda" else 0
    return [
        *((reference.top_k(pre["normal"], n), 0) for n in (1, k, F)),
        (reference.top_k(pre["always"], k), min(room, 1000)),
        (reference.above(pre["seldom"], 1.0), room // 2),
        (reference.above(pre["normal"], 1e9), min(room, 1000)),
    ]


def check_sums(fast: Any, device: torch.device) -> None:
    """Sums over entries and their gradients, by tokens and by groups of a token's latents; of rows in
    bfloat16, too."""
    errors = Errors()
    for B, D, F, k in SIZES.sums:
        for (indices_N, offsets_B1, _), padding in supports(B, F, k, device):
            n = len(indices_N)
            if n * D > 2**27:
                continue  # of every latent of every token only small batches
            exact = SparsePattern(indices_N, offsets_B1, F)
            pattern = SparsePattern(
                torch.cat([indices_N, indices_N.new_zeros(padding)]), offsets_B1, F, padded=padding > 0
            )
            values_N, W_FD, x_BD = (torch.randn(*shape, device=device) for shape in ((n,), (F, D), (B, D)))
            padded_N, values = torch.cat([values_N, values_N.new_zeros(padding)]), values_N.double()

            poison(device)
            order_N, begins_F1 = fast.sort_by_latent(pattern.indices_N, offsets_B1, F)
            order, begins = reference.sort_by_latent(indices_N, offsets_B1, F)
            errors.places("sort_by_latent", (order_N[:n] != order).sum() + (begins_F1 != begins).sum())
            errors.near(
                "sum_by_latent", fast.sum_by_latent(padded_N, pattern), reference.sum_by_latent(values, exact)
            )
            count_F, least_R = fast.count_by_latent(padded_N, pattern), fast.smallest(padded_N, pattern)
            errors.places("count_by_latent", (count_F != reference.count_by_latent(values_N, exact)).sum())
            errors.places("smallest", (least_R != reference.smallest(values_N, exact)).sum())
            precisions = (
                (torch.float32, torch.bfloat16) if fast.__name__.endswith("triton") else (torch.float32,)
            )
            for x in (x_BD.to(dtype) for dtype in precisions):
                both = zip(
                    fast.encode_backward(padded_N, x, pattern),
                    reference.encode_backward(values, x.double(), exact),
                    strict=True,
                )
                for got, wanted in both:
                    errors.near(f"encode_backward, {x.dtype}", got, wanted)

            if getattr(fast, "TAKES_NORMS", False):
                check_norms(fast, errors, padded_N, W_FD, x_BD, pattern)
            least_R = torch.where(torch.rand(B, device=device) < 0.3, torch.inf, x_BD[:, 0])
            mean, exact_mean = fast.mean_of_finite(least_R), reference.mean_of_finite(least_R.double())
            errors.near("mean_of_finite", mean.nan_to_num(7.0), exact_mean.nan_to_num(7.0))
            if hasattr(fast, "row_norms"):
                factors_F, total_FD = torch.randn(F, device=device), torch.randn(F, D, device=device)
                wanted_FD = torch.addcmul(total_FD.double(), W_FD.double(), factors_F.double()[:, None])
                fast.add_scaled_rows(W_FD, factors_F, total_FD)
                errors.near("add_scaled_rows", total_FD, wanted_FD)
                errors.near("row_norms", fast.row_norms(W_FD), reference.row_norms(W_FD.double()))
            if hasattr(fast, "add_rows"):
                into_FD = torch.randn(F, D, device=device)
                wanted_FD = into_FD.double()
                fast.add_rows(padded_N, x_BD, pattern, into_FD)
                reference.add_rows(values, x_BD.double(), exact, wanted_FD)
                errors.near("add_rows", into_FD, wanted_FD)

            first_of_groups = torch.arange(B, device=device)[:, None] * F + torch.tensor(
                [0, F // 3, F // 2], device=device
            )
            places = torch.searchsorted(
                exact.bags_N.long() * F + indices_N, first_of_groups.flatten(), out_int32=True
            )
            starts = torch.cat([places, offsets_B1[-1:]])
            grouped = (" by groups", SparsePattern(indices_N, starts, F), pattern.rebagged(starts))
            for (name, a, b), dtype in itertools.product((("", exact, pattern), grouped), precisions):
                g_RD, rows_FD = torch.randn(a.R, D, device=device).to(dtype), W_FD.to(dtype)
                W = rows_FD.double()
                poison(device)
                errors.near(
                    f"decode{name}", fast.decode(padded_N, rows_FD, b), reference.decode(values, W, a)
                )
                d_values, d_W = reference.decode_backward(g_RD.double(), values, W, a, True)
                got_values, got_W = fast.decode_backward(g_RD, padded_N, rows_FD, b, True)
                errors.near(f"decode_backward{name}, weights", got_W, d_W)
                for got in (got_values, fast.decode_backward(g_RD, padded_N, rows_FD, b, False)[0]):
                    errors.near(f"decode_backward{name}, values", got[:n], d_values)
    errors.check()


def check_norms(
    fast: Any, errors: Errors, values_N: Tensor, W_FD: Tensor, x_BD: Tensor, e: SparsePattern
) -> None:
    """The norms of gradients' rows that kernels leave on their way: those of what the update takes."""
    W_FD = normalize(W_FD, dim=1)
    for dtype, constraint in itertools.product(
        (torch.float32, torch.bfloat16), get_args(reference.Constraint)
    ):
        x, W = x_BD.to(dtype), W_FD.to(dtype)
        norms = RowNorms(W_FD, constraint)
        poison(W_FD.device)
        _, d_W_FD = fast.decode_backward(x, values_N, W, e, True, norms)
        # what is left of a row along its weights is the rounding of its own square
        own = d_W_FD.double().square().sum(1)
        got, wanted = norms_of(norms).square() + own, norms_wanted(W_FD, d_W_FD, constraint).square() + own
        errors.near(f"squares of norms, {constraint}", got, wanted)
        errors.places("norms, of another array", float(norms.gradient_FD is not d_W_FD))
    norms = RowNorms(W_FD, "free")
    d_W_FD, _ = fast.encode_backward(values_N, x, e, norms)
    errors.near("norms, of the encoder", norms_of(norms), norms_wanted(W_FD, d_W_FD, "free"))
    nothing = RowNorms(W_FD, "free")
    fast.decode_backward(x, values_N, W, e, False, nothing)
    errors.places("norms, of no gradient", float(nothing.of_parts_FK is not None))


def norms_of(norms: RowNorms) -> Tensor:
    """The norm of each row from those of its parts."""
    assert norms.of_parts_FK is not None, "no norms"
    return norms.of_parts_FK.double().square().sum(1).sqrt()


def norms_wanted(p_FD: Tensor, g_FD: Tensor, constraint: Constraint) -> Tensor:
    """The norm of each row of a gradient as the update takes it."""
    return reference._projected(p_FD.double(), g_FD.double(), constraint).norm(dim=1)


def check_estimate(fast: Any, device: torch.device) -> None:
    """Where the backend estimates the encoder's product, nothing is further off than it says."""
    worst = 0.0
    for B, D, F, _ in SIZES.sums:
        x_BD, W_FD, b_F = (torch.randn(*shape, device=device) for shape in ((B, D), (F, D), (F,)))
        estimate = fast.estimate(x_BD, W_FD, b_F, ops.Workspace())
        if estimate is not None:
            off_BF = (estimate.pre_BF.double() - (x_BD.double() @ W_FD.double().T + b_F)).abs()
            worst = max(worst, float((off_BF / estimate.error_B[:, None]).max()))
    assert worst <= 1, f"{worst} times the bound that it gives"


def check_dense(fast: Any, device: torch.device) -> None:
    """The dense layout's two passes: what is above a threshold, and what a mask lets through, where it holds
    what is not a number too."""
    errors = Errors()
    B, F = SIZES.every
    for pre_BF in preactivations(B, F, device).values():
        for threshold in (0.0, torch.randn(F, device=device)):
            values_BF, mask_BF = torch.empty_like(pre_BF), torch.empty_like(pre_BF, dtype=torch.bool)
            wanted_values_BF, wanted_mask_BF = torch.empty_like(values_BF), torch.empty_like(mask_BF)
            of_latents = fast.threshold_dense(pre_BF, threshold, values_BF, mask_BF)
            for got, wanted in zip(
                of_latents,
                reference.threshold_dense(pre_BF, threshold, wanted_values_BF, wanted_mask_BF),
                strict=True,
            ):
                errors.near("split, sums", got, wanted)
            errors.places(
                "threshold_dense", (values_BF != wanted_values_BF).sum() + (mask_BF != wanted_mask_BF).sum()
            )
            x_BF = torch.where(mask_BF, torch.randn_like(pre_BF), torch.inf)
            factor, scaled_BF = torch.tensor(0.3, device=device), torch.empty_like(pre_BF)
            errors.places(
                "scale", (fast.scale(pre_BF, factor, scaled_BF) != (pre_BF.double() * factor).float()).sum()
            )
            sums_F = fast.masked_copy(mask_BF, x_BF, values_BF)
            errors.near("masked_copy", values_BF, torch.where(mask_BF, x_BF.double(), 0))
            errors.near("select, sums", sums_F, torch.where(mask_BF, x_BF.double(), 0).sum(0))
            check_formulas(fast, errors, pre_BF, mask_BF)
            if fast.__name__.endswith("triton"):
                check_dense_in_bfloat16(fast, errors, pre_BF.bfloat16(), threshold)
            errors.places("count_positive", (fast.count_positive(values_BF) != (values_BF > 0).sum(0)).sum())
    errors.check()


def check_dense_in_bfloat16(fast: Any, errors: Errors, pre_BF: Tensor, threshold: Tensor | float) -> None:
    """Arrays in bfloat16, whose sums are of float32."""
    values_BF, mask_BF = torch.empty_like(pre_BF), torch.empty_like(pre_BF, dtype=torch.bool)
    wanted_BF, wanted_mask_BF = torch.empty_like(pre_BF).double(), torch.empty_like(mask_BF)
    of_latents = fast.threshold_dense(pre_BF, threshold, values_BF, mask_BF)
    wanted = reference.threshold_dense(pre_BF.double(), threshold, wanted_BF, wanted_mask_BF)
    for a, b in zip(of_latents, wanted, strict=True):
        errors.near("split of bfloat16, sums", a, b)
    errors.places("split of bfloat16", ((values_BF != wanted_BF) | (mask_BF != wanted_mask_BF)).sum())
    x_BF = torch.randn_like(pre_BF)
    sums_F = fast.masked_copy(mask_BF, x_BF, values_BF)
    errors.places("masked_copy of bfloat16", (values_BF != torch.where(mask_BF, x_BF, 0)).sum())
    errors.near("select of bfloat16, sums", sums_F, torch.where(mask_BF, x_BF.double(), 0).sum(0))
    errors.places(
        "count_positive of bfloat16", (fast.count_positive(values_BF) != (values_BF > 0).sum(0)).sum()
    )
    (name, count, formula), v_BF = FORMULAS[0], torch.where(mask_BF, pre_BF.abs() + 0.1, 0)
    kernels, w_F = fast.fused(formula, count), [torch.randn(v_BF.shape[1], device=v_BF.device)]
    inputs = [t.double().requires_grad_() for t in (v_BF, *w_F)]
    exact_BF, d_BF, out_BF = torch.where(mask_BF, formula(*inputs), 0), *torch.empty(2, *v_BF.shape).to(v_BF)
    kernels.map(v_BF, mask_BF, out_BF, w_F)
    errors.places(f"fused {name} in bfloat16", (out_BF != exact_BF.bfloat16()).sum())
    _, (d_w_F,) = kernels.gradients(v_BF, mask_BF, x_BF, d_BF, w_F)
    wanted_v, wanted_w = torch.autograd.grad(exact_BF, inputs, x_BF.double())
    errors.places(f"fused {name} in bfloat16, gradient", (d_BF != wanted_v.bfloat16()).sum())
    errors.near(f"fused {name} in bfloat16, of numbers", d_w_F, wanted_w)


def check_formulas(fast: Any, errors: Errors, values_BF: Tensor, mask_BF: Tensor) -> None:
    """Elementwise formulas with their gradients, where the backend has kernels of them, against autograd."""
    for name, count, formula in FORMULAS:
        kernels = fast.fused(formula, count)
        if kernels is None:
            continue
        v_BF = torch.where(mask_BF, values_BF.abs() + 0.1, 0)
        w_F = [torch.randn(v_BF.shape[1], device=v_BF.device) for _ in range(count)]
        g_BF, one_BF = torch.randn_like(v_BF), torch.ones_like(v_BF)
        inputs = [t.double().requires_grad_() for t in (v_BF, *w_F)]
        exact_BF = torch.where(mask_BF, formula(*inputs), 0)
        out_BF = torch.full_like(v_BF, torch.nan)
        kernels.map(v_BF, mask_BF, out_BF, w_F)
        errors.near(f"fused {name}", out_BF, exact_BF.detach())
        errors.near(f"fused {name}, total", kernels.total(v_BF, mask_BF, w_F), exact_BF.sum().detach())
        for given, g in ((g_BF, g_BF), (None, one_BF)):
            d_BF = torch.full_like(v_BF, torch.nan)
            total, grads = kernels.gradients(v_BF, mask_BF, given, d_BF, w_F)
            wanted = torch.autograd.grad(exact_BF, inputs, g.double(), allow_unused=True, retain_graph=True)
            if kernels.through_values:
                errors.near(f"fused {name}, values", d_BF, torch.where(mask_BF, wanted[0], 0))
            for got, exact in zip(grads, wanted[1:], strict=True):
                errors.near(
                    f"fused {name}, numbers", got, torch.zeros_like(got).double() if exact is None else exact
                )
            if given is None:
                errors.near(f"fused {name}, sum", total, exact_BF.sum().detach())


def check_update(fast: Any, device: torch.device) -> None:
    """Three updates of three SAEs, the last of which is refused."""
    errors = Errors()
    # constraint, dimensions of the parameter
    kinds = [
        ("project", 2),
        ("constrain", 2),
        ("free", 2),
        ("free", 1),
    ]
    for (_, D, F, _), (constraint, dimensions), beta1 in itertools.product(SIZES.sums, kinds, (0.9, 0.0)):
        shape = (F, D)[:dimensions]
        p = normalize(torch.randn(3, *shape, device=device), dim=-1)
        m, v, bf16_copy, refused = (
            torch.zeros_like(p) if beta1 else None,
            torch.zeros_like(p),
            p.bfloat16(),
            p[2].clone(),
        )
        exact_p, exact_m, exact_v = p.double(), None if m is None else m.double(), v.double()
        for step in range(3):
            grads = [torch.randn(*shape, device=device) for _ in range(3)]
            exact_grads = [g.double() for g in grads]
            of_each = ([1e-2, 1e-3, 1e-2], [1.0, 0.3, torch.nan], [step + 1.0] * 3)
            how: dict[str, Any] = {"betas": (beta1, 0.999), "eps": 1e-8, "constraint": constraint}
            how |= {
                n: torch.tensor(x, device=device)
                for n, x in zip(("lr_S", "scale_S", "steps_S"), of_each, strict=True)
            }
            poison(device)
            errors.near(
                "square_norms",
                fast.square_norms(p, grads, constraint),
                reference.square_norms(exact_p, exact_grads, constraint),
            )
            reference.update(exact_p, exact_grads, exact_m, exact_v, None, AdamStep(**how))
            fast.update(p, grads, m, v, bf16_copy, AdamStep(**how))
        errors.near("update", p[:2], exact_p[:2])
        errors.near("update, second moment", v[:2], exact_v[:2])
        if m is not None and exact_m is not None:
            errors.near("update, first moment", m[:2], exact_m[:2])
        errors.places("update, bfloat16 copy", (bf16_copy != p.bfloat16()).sum())
        errors.places("update, refused", (p[2] != refused).sum() + v[2].count_nonzero())
    errors.check()


def row_norms_of(p: Tensor, grads: Sequence[Tensor], constraint: Constraint) -> list[Tensor]:
    """The norms of parts of the rows of each SAE's gradient, as kernels leave them."""
    return [
        torch.stack([norms_wanted(p_FD, g, constraint) / 2**0.5] * 2, dim=1).float()
        for p_FD, g in zip(p, grads, strict=True)
    ]


def check_adam_step(fast: Any, device: torch.device) -> None:
    """Updates of all parameters of four SAEs: one clipped, one not or skipped, one with a gradient and one
    with a loss that is not a number; with norms of rows that are known. Of sharded ones the norm is added up
    over ranks: here over three that are alike."""
    errors = Errors()
    constraints: tuple[Constraint, ...] = ("free", "free", "project")
    kinds = ((1.0, 1, None, False), (None, 1, False, False), (1.0, 3, True, False), (1.0, 1, True, True))
    for (_, D, F, _), (clip, shards, skips, known) in itertools.product(SIZES.sums, kinds):
        shapes, S = ((F, D), (F,), (F, D)), 4
        p = [normalize(torch.randn(S, *shape, device=device), dim=-1) for shape in shapes]
        grads = [[torch.randn(*shape, device=device) for _ in range(S)] for shape in shapes]
        for of_parameter in grads:
            of_parameter[1] *= 1e-4
            of_parameter[2].view(-1)[-1] = torch.nan
        loss_S = torch.tensor([1.0, 2.0, 3.0, torch.nan], device=device)
        skip_S = torch.tensor([False, skips, False, False], device=device) if skips is not None else None
        lr_S, steps_S = torch.full((S,), 1e-2, device=device), torch.full((S,), 6.0, device=device)
        got, wanted = (
            [
                Parameter(
                    each.to(dtype, copy=True),
                    [g.to(dtype, copy=True) for g in of_each],
                    torch.full_like(each, 0.1, dtype=dtype),
                    torch.full_like(each, 0.2, dtype=dtype),
                    each.bfloat16(),
                    constraint,
                    in_norm=clip is not None or each.ndim == 2,
                    sharded=shards > 1 and constraint == "project",
                    row_norms=row_norms_of(each, of_each, constraint) if known and each.ndim == 3 else None,
                )
                for each, of_each, constraint in zip(p, grads, constraints, strict=True)
            ]
            for dtype in (torch.float32, torch.float64)
        )
        adam = Adam(clip, (0.9, 0.999), 1e-8, None if shards == 1 else lambda square: 3 * square)
        counted = [steps_S.clone(), steps_S.double()]
        poison(device)
        updated = fast.adam_step(got, loss_S, lr_S, counted[0], adam, skip_S)
        reference.adam_step(wanted, loss_S.double(), lr_S.double(), counted[1], adam, skip_S)
        errors.places("adam_step, updated", float(updated.tolist() != [True, not skips, False, False]))
        errors.places("adam_step, steps", (counted[0] != counted[1]).sum())
        for a, b in zip(got, wanted, strict=True):
            errors.near("adam_step", a.p, b.p)
            errors.near("adam_step, second moment", a.v, b.v)
    errors.check()


def on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def check_counts(fast: Any, device: torch.device) -> None:
    """The error, dead latents, the running threshold, and the counters of steps that were taken, skipped and
    too long for their lists."""
    errors = Errors()
    for B, D, F, _ in SIZES.sums:
        x_BD, x_hat_BD = torch.randn(2, B, D, device=device)
        poison(device)
        error_BD, mse = fast.squared_error(x_BD, x_hat_BD)
        wanted_BD, wanted_mse = reference.squared_error(x_BD.double(), x_hat_BD.double())
        errors.near("squared_error", error_BD, wanted_BD)
        errors.near("squared_error, mean", mse, wanted_mse)

        fired_F = torch.rand(F, device=device) < 0.5
        since_F = torch.randint(0, 2**33, (F,), device=device)
        poison(device)
        got_and_wanted = zip(
            fast.firing(fired_F, since_F, B, 2**32), reference.firing(fired_F, since_F, B, 2**32), strict=True
        )
        for a, b in got_and_wanted:
            errors.places("firing", float((a != b).sum()) + (a.dtype != b.dtype))

        flags = [torch.tensor(flag, device=device) for flag in (True, False)]
        got, wanted = (
            Counters(
                since_F.to(where, copy=True),
                torch.zeros((), device=where),
                torch.tensor([0, -1, 1, 0], device=where),
                torch.tensor(5, device=where),
            )
            for where in (device, torch.device("cpu"))
        )
        entries = torch.tensor(70, dtype=torch.int32, device=device)
        for updated, overflowed, finite in itertools.product(flags, (None, *flags), flags):
            outcome = StepOutcome(updated, overflowed, finite, entries, B, since_F + 7)
            fast.count_step(got, outcome)
            # on a CPU: by a number torch divides on a GPU by multiplying with its rounded inverse
            reference.count_step(wanted, StepOutcome(*map(on_cpu, outcome)))
            for name, value in vars(wanted).items():
                errors.places(f"count_step, {name}", (getattr(got, name).cpu() != value).sum())

    for mean in (True, False):
        now, number = torch.tensor([-1.0, 0.0], device=device).unbind()
        exact, exact_number = now.double(), number.double()
        for kept in (torch.inf, 0.3, 0.7, torch.nan, 0.2, 0.9):
            smallest_kept = torch.tensor(kept, device=device)
            fast.follow_threshold(now, number, smallest_kept, 0.4, mean=mean)
            reference.follow_threshold(exact, exact_number, smallest_kept.double(), 0.4, mean=mean)
            errors.near("follow_threshold", now, exact)
            errors.places("follow_threshold, values", float(number != exact_number))
    errors.check()


CHECKS = (
    check_selections,
    check_sums,
    check_estimate,
    check_dense,
    check_update,
    check_adam_step,
    check_counts,
)


@pytest.mark.parametrize("check", CHECKS)
def test_ops_match_the_reference(check: Callable[[Any, torch.device], None]) -> None:
    torch.manual_seed(0)
    check(backend_for(torch.zeros(1, device=DEVICE)), DEVICE)


def test_every_op_is_checked() -> None:
    torch.manual_seed(0)
    called = Called(reference)
    for check in CHECKS:
        check(called, torch.device("cpu"))
    public = {
        name
        for name, function in inspect.getmembers(reference, inspect.isfunction)
        if function.__module__ == reference.__name__ and not name.startswith("_")
    }
    assert public <= called.names


def broken(name: str, function: object) -> ModuleType:
    """The reference ops, one of which is wrong."""
    module = ModuleType("broken")
    module.__dict__.update(vars(reference) | {name: function, "__name__": "broken"})
    return module


@pytest.mark.parametrize(
    ("check", "name", "function", "wrong"),
    [
        (check_selections, "top_k", lambda pre, k, among=None: reference.top_k(-pre, k, among), "top_k"),
        (
            check_selections,
            "above",
            lambda pre, t, capacity=None: reference.above(pre, t + 0.01),
            "above 0",
        ),
        (check_sums, "decode", lambda v, W, e: reference.decode(v, W, e) * 1.0001, "decode"),
        (
            check_sums,
            "sum_by_latent",
            lambda v, e: reference.sum_by_latent(v, e) * torch.nan,
            "sum_by_latent",
        ),
        (
            check_sums,
            "sort_by_latent",
            lambda latents, starts, F: tuple(x.flip(0) for x in reference.sort_by_latent(latents, starts, F)),
            "sort_by_latent",
        ),
        (
            check_update,
            "square_norms",
            lambda p, grads, c: reference.square_norms(p, grads, "free"),
            "square_norms",
        ),
        (
            check_adam_step,
            "adam_step",
            lambda *a, **k: ~reference.adam_step(*a, **k),
            "adam_step, updated",
        ),
        (
            check_counts,
            "firing",
            lambda fired, since, B, dead: reference.firing(fired, since, B + 1, dead),
            "firing",
        ),
        (
            check_update,
            "update",
            lambda p, *a, **k: reference.update(p, *a, **k) or p.mul_(0.999),
            "update",
        ),
    ],
)
def test_a_wrong_op_is_found(
    check: Callable[[Any, torch.device], None], name: str, function: object, wrong: str
) -> None:
    cpu = torch.device("cpu")
    with pytest.raises(AssertionError, match=f"'{wrong}: "):
        check(broken(name, function), cpu)
    check(reference, cpu)
