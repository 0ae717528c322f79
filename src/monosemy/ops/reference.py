"""What each op means, in plain torch: the reference that the fast forms are held to, and the form of any
other device or precision.

Each function has a twin of the same name and signature in the fast forms. B tokens, D d_in, F latents, N
entries, R bags, S SAEs of one shape. Weights are stored a latent per row: W_enc_FD, W_dec_FD.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from monosemy.ops.pattern import Constraint, Estimate, Selection, SparsePattern


def estimate(
    x_BD: Tensor, W_FD: Tensor, b_F: Tensor, workspace: Callable[..., Tensor], bf16_FD: Tensor | None = None
) -> Estimate | None:
    """Return the pre-activations x W^T + b by a product of low precision, where this form has one that pays;
    `workspace` gives arrays to use.

    None as well where no bound of its error is known, which is so of numbers that are not finite.
    """
    return None


# --- selections: of equal values the earlier position is taken ----------------------------------------------


def _picked(pre_BF: Tensor, chosen_BF: Tensor) -> Selection:
    offsets_B1 = torch.nn.functional.pad(chosen_BF.sum(1).cumsum(0), (1, 0)).int()
    return Selection(
        chosen_BF.nonzero()[:, 1].int(),
        offsets_B1,
        pre_BF[chosen_BF].to(torch.promote_types(pre_BF.dtype, torch.float32)),
    )


def top_k(pre_BF: Tensor, k: int, among_F: Tensor | None = None) -> Selection:
    """Select the k largest of each token; with a mask `among_F` those of its latents alone, as many as there
    are up to k."""
    allowed_BF = torch.ones_like(pre_BF, dtype=torch.bool) if among_F is None else among_F.expand_as(pre_BF)
    k = min(k, int(allowed_BF[0].sum()))
    order_BK = (
        torch.where(allowed_BF, pre_BF, -torch.inf).sort(dim=1, descending=True, stable=True).indices[:, :k]
    )
    return _picked(pre_BF, torch.zeros_like(allowed_BF).scatter_(1, order_BK, True))


def batch_top_k(pre_BF: Tensor, n: int) -> Selection:
    """Select the n largest of the whole batch."""
    order = pre_BF.flatten().sort(descending=True, stable=True).indices[:n]
    return _picked(
        pre_BF,
        torch.zeros_like(pre_BF, dtype=torch.bool).flatten().index_fill_(0, order, True).view_as(pre_BF),
    )


def above(pre_BF: Tensor, threshold: Tensor | float, capacity: int | None = None) -> Selection:
    """Select everything above a threshold: a number, or one for each latent [F].

    On a GPU the lists hold `capacity` entries.
    """
    return _picked(pre_BF, pre_BF > threshold)


def sort_by_latent(indices_N: Tensor, offsets_R1: Tensor, F: int) -> tuple[Tensor, Tensor]:
    """Return the places of the entries in order of latents, int32 [N], and where each latent's begin, int32
    [F + 1]."""
    order_N = indices_N.sort(stable=True).indices.int()
    return order_N, torch.nn.functional.pad(torch.bincount(indices_N, minlength=F).cumsum(0), (1, 0)).int()


# --- sums over entries --------------------------------------------------------------------------------------


def sum_by_latent(values_N: Tensor, e: SparsePattern) -> Tensor:
    """Return the sum of each latent's values, [F]."""
    return values_N.new_zeros(e.F).index_add_(0, e.indices_N, values_N)


def count_by_latent(values_N: Tensor, e: SparsePattern) -> Tensor:
    """Count each latent's positive values, in their dtype, [F]."""
    return sum_by_latent((values_N > 0).to(values_N.dtype), e)


def smallest(values_N: Tensor, e: SparsePattern) -> Tensor:
    """Return the smallest positive value of each bag, [R]; infinity where it has none."""
    positive_N = torch.where(values_N > 0, values_N, torch.inf)
    least_R = values_N.new_full((e.R,), torch.inf)
    return least_R.scatter_reduce_(0, e.bags_N.long(), positive_N, "amin")


def mean_of_finite(values_B: Tensor) -> Tensor:
    """Return the mean of what is below infinity; NaN where nothing is."""
    known_B = values_B < torch.inf
    return torch.where(known_B, values_B, 0).sum() / known_B.sum()


def decode(values_N: Tensor, W_FD: Tensor, e: SparsePattern) -> Tensor:
    """Sum by bag: value times the latent's row of W, [R, D]."""
    return W_FD.new_zeros(e.R, W_FD.shape[1]).index_add_(0, e.bags_N, values_N[:, None] * W_FD[e.indices_N])


def decode_backward(
    g_RD: Tensor, values_N: Tensor, W_FD: Tensor, e: SparsePattern, weight: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of `decode` with respect to its values, [N], and, where asked for, to W, [F,
    D]."""
    g_ND = g_RD[e.bags_N]
    d_values_N = (g_ND * W_FD[e.indices_N]).sum(1)
    return d_values_N, torch.zeros_like(W_FD).index_add_(
        0, e.indices_N, values_N[:, None] * g_ND
    ) if weight else None


def encode_backward(g_N: Tensor, x_BD: Tensor, e: SparsePattern) -> tuple[Tensor, Tensor]:
    """Return the gradients of the entries' pre-activations x W_enc^T + b_enc with respect to W_enc, [F, D],
    and b_enc, [F]. Bags are tokens."""
    d_W_FD = x_BD.new_zeros(e.F, x_BD.shape[1]).index_add_(0, e.indices_N, g_N[:, None] * x_BD[e.bags_N])
    return d_W_FD, sum_by_latent(g_N, e)


def row_norms(W_FD: Tensor) -> Tensor:
    """Return the norm of each row, [F]."""
    return torch.linalg.vector_norm(W_FD, dim=1)


def add_scaled_rows(W_FD: Tensor, factors_F: Tensor, into_FD: Tensor) -> None:
    """Add each row of W times its factor to an array."""
    into_FD.addcmul_(W_FD, factors_F[:, None])


def add_rows(values_N: Tensor, rows_RD: Tensor, e: SparsePattern, into_FD: Tensor) -> None:
    """Add to each latent's row of an array the sum of value times its bags' rows."""
    into_FD.add_(encode_backward(values_N, rows_RD, e)[0])


# --- the dense layout ---------------------------------------------------------------------------------------


def threshold_dense(
    pre_BF: Tensor, threshold: Tensor | float, values_BF: Tensor, mask_BF: Tensor
) -> tuple[Tensor, Tensor]:
    """Write where the pre-activations are above a threshold, and what they are there and zero elsewhere, [B,
    F].

    Returns the sum of each latent's values, and on how many tokens it is above, float32, both [F].
    """
    torch.gt(pre_BF, threshold, out=mask_BF)
    return values_BF.copy_(torch.where(mask_BF, pre_BF, 0)).sum(0), mask_BF.sum(0).float()


def masked_copy(
    mask_BF: Tensor,
    x_BF: Tensor,
    out_BF: Tensor,
    add_F: Tensor | None = None,
    also_BF: Tensor | None = None,
) -> Tensor:
    """Write x, plus another array and a number of each latent, where the mask is set and zero elsewhere,
    whatever x is there; returns the sums, [F]."""
    x_BF = x_BF if also_BF is None else x_BF + also_BF
    return out_BF.copy_(torch.where(mask_BF, x_BF if add_F is None else x_BF + add_F, 0)).sum(0)


def scale(x_BF: Tensor, factor: Tensor, out_BF: Tensor) -> Tensor:
    """Write x times a scalar, which is not rounded to x's precision, and return it."""
    return torch.mul(x_BF, factor, out=out_BF)


def fused(function: Callable[..., Tensor], numbers: int) -> None:
    """Return an elementwise function of values [B, F] and of so many `numbers` of each latent as kernels of
    this form; None where it has none, and torch computes it operation by operation."""
    return None


def count_positive(x_BF: Tensor) -> Tensor:
    """Return on how many tokens each latent is positive, float32 [F]."""
    return (x_BF > 0).sum(0).float()


# --- the error ----------------------------------------------------------------------------------------------


def squared_error(x_BD: Tensor, x_hat_BD: Tensor) -> tuple[Tensor, Tensor]:
    """Return x - x_hat, and the mean over tokens of its squared norm."""
    error_BD = x_BD - x_hat_BD
    return error_BD, error_BD.pow(2).sum(1).mean()


# --- what a step counts -------------------------------------------------------------------------------------


def firing(
    fired_F: Tensor, since_fired_F: Tensor, tokens: int, dead_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tokens since each latent fired, int64 [F], after a batch in which some did; which are dead
    by that, [F], and how many."""
    since_F = torch.where(fired_F, 0, since_fired_F + tokens)
    dead_F = since_F >= dead_tokens
    return since_F, dead_F, dead_F.sum()


def follow_threshold(
    threshold: Tensor, values: Tensor, smallest_kept: Tensor, weight: float, *, mean: bool
) -> None:
    """Move the running threshold towards the smallest value that a batch kept, in place; `values` counts how
    many it has followed.

    With `mean` it is their plain mean until that average would forget. A value that is not finite is left
    out; below zero the threshold has none yet, and takes the first.
    """
    known = smallest_kept.isfinite()
    values.add_(known)
    share = torch.full_like(threshold, weight)
    if mean:
        share = torch.maximum(1 / values, share)
    moved = torch.where(threshold < 0, smallest_kept, (1 - share) * threshold + share * smallest_kept)
    threshold.copy_(torch.where(known, moved, threshold))


@dataclass(frozen=True)
class Counters:
    """What an SAE counts over its steps; changed in place."""

    since_fired_F: Tensor
    """Tokens since each latent fired, int64."""
    active: Tensor
    """Mean entries of a token in the last step's codes."""
    nonfinite: Tensor
    """Int64 [4]: steps skipped as not finite, the first of them (-1: none), whether all of their batches were
    finite, steps skipped because a list was full."""
    clock: Tensor
    """Steps taken, skipped ones included; int64."""


class StepOutcome(NamedTuple):
    """How a step of an SAE ended."""

    updated: Tensor
    """Whether its update was made."""
    overflowed: Tensor | None
    """Whether a list of fixed length may have lacked room; None where none has one."""
    batch_is_finite: Tensor
    entries: Tensor
    """Of its codes."""
    tokens: int
    since_fired_F: Tensor
    """Tokens since each latent fired, this batch counted."""


def count_step(counters: Counters, step: StepOutcome) -> None:
    """Count a step in place: where it was updated, keep the tokens since latents fired; otherwise note why
    not."""
    updated, overflowed, batch_is_finite, entries, tokens, since_F = step
    fired_F = counters.since_fired_F
    fired_F.copy_(torch.where(updated, since_F, fired_F))
    counters.active.copy_(entries / tokens)
    skipped, first_step, finite, full = counters.nonfinite
    first_step = torch.where(skipped == 0, counters.clock, first_step)
    not_updated = torch.stack([skipped + 1, first_step, finite * batch_is_finite, full])
    if overflowed is not None:
        too_long = torch.stack([*counters.nonfinite[:3], full + 1])
        not_updated = torch.where(overflowed, too_long, not_updated)
    counters.nonfinite.copy_(torch.where(updated, counters.nonfinite, not_updated))
    counters.clock.add_(1)


# --- the update ---------------------------------------------------------------------------------------------


def _projected(p_RC: Tensor, g_RC: Tensor, constraint: Constraint) -> Tensor:
    """Return the gradient without its part along p's rows; "project" (OpenAI's code) divides by the norm plus
    1e-6, "constrain" by the norm."""
    if constraint == "free":
        return g_RC
    norm_R1 = torch.linalg.vector_norm(p_RC, dim=1, keepdim=True) + (1e-6 if constraint == "project" else 0)
    return g_RC - (g_RC * p_RC).sum(1, keepdim=True) / norm_R1 * p_RC / norm_R1


def square_norms(p: Tensor, grads: Sequence[Tensor], constraint: Constraint) -> Tensor:
    """Return each SAE's squared norm of the gradient that `update` will use, [S].

    `p` is [S, ..], gradients one of each SAE.
    """
    return torch.stack([_projected(p_s, g, constraint).pow(2).sum() for p_s, g in zip(p, grads, strict=True)])


@dataclass(frozen=True)
class AdamStep:
    """One step of Adam for a parameter of S SAEs."""

    lr_S: Tensor
    scale_S: Tensor
    """Factor on the gradient, by which it is clipped; where it is not finite the SAE is left as it is."""
    steps_S: Tensor
    """Updates made, this one included."""
    betas: tuple[float, float]
    eps: float
    constraint: Constraint


def update(
    p: Tensor, grads: Sequence[Tensor], m: Tensor | None, v: Tensor, bf16_copy: Tensor | None, adam: AdamStep
) -> None:
    """Project, scale (clip), Adam, renormalize, and write a bfloat16 copy: one parameter of S SAEs of one
    shape, in place.

    `steps_S` counts this step too. An SAE whose scale is not finite stays as it is. Without `m` (beta1 = 0)
    the first moment is the gradient itself. Gradients may be overwritten.
    """
    for s, g in enumerate(grads):
        if not adam.scale_S[s].isfinite():
            continue
        g = _projected(p[s], g, adam.constraint) * adam.scale_S[s]
        m_s = g if m is None else m[s].lerp_(g, 1 - adam.betas[0])
        v[s].mul_(adam.betas[1]).addcmul_(g, g, value=1 - adam.betas[1])
        t = adam.steps_S[s].double()
        first, second = 1 - adam.betas[0] ** t, 1 - adam.betas[1] ** t
        p[s].sub_(
            adam.lr_S[s].to(p.dtype)
            / first.to(p.dtype)
            * m_s
            / (v[s].sqrt() / second.sqrt().to(p.dtype) + adam.eps)
        )
        if adam.constraint != "free":
            norm = torch.linalg.vector_norm(p[s], dim=1, keepdim=True)
            p[s].div_(norm + torch.finfo(p.dtype).eps if adam.constraint == "project" else norm)
        if bf16_copy is not None:
            bf16_copy[s].copy_(p[s])


@dataclass(frozen=True)
class Parameter:
    """One parameter of S SAEs of one shape, [S, ..], with the gradient of each and the optimizer's state."""

    p: Tensor
    grads: Sequence[Tensor]
    m: Tensor | None
    v: Tensor
    bf16_copy: Tensor | None
    constraint: Constraint
    in_norm: bool
    """Whether the gradient counts in the norm that is clipped and looked at."""
    sharded: bool = False
    """Whether this is a part of a parameter whose other parts other ranks have."""
    row_norms: Sequence[Tensor] | None = None
    """Norms of the rows of each gradient, as the update will use it, or of parts of rows: what a kernel that
    wrote the gradient may leave. Their sum of squares is the gradient's."""


@dataclass(frozen=True)
class Adam:
    """What all steps have in common."""

    clip: float | None
    """Largest norm of an SAE's gradient."""
    betas: tuple[float, float]
    eps: float
    add_up: Callable[[Tensor], Tensor] | None = None
    """Adds up over the ranks what each has of sharded parameters."""

    def total_square_norm(self, counted: Sequence[Parameter], squares: Sequence[Tensor]) -> Tensor:
        """Return the squared norm of the whole gradient, [S], from that of each parameter or part of one."""
        assert self.add_up is not None, "no parameter is sharded"
        parts = [square for each, square in zip(counted, squares, strict=True) if each.sharded]
        whole = [square for each, square in zip(counted, squares, strict=True) if not each.sharded]
        return torch.stack([self.add_up(torch.stack(parts).sum(0)), *whole]).sum(0)


def adam_step(
    parameters: Sequence[Parameter],
    loss_S: Tensor,
    lr_S: Tensor,
    steps_S: Tensor,
    adam: Adam,
    skip_S: Tensor | None = None,
    *,
    square_norms: Callable[..., Tensor] = square_norms,
    update: Callable[..., None] = update,
) -> Tensor:
    """Clip and update all parameters of the SAEs whose loss and gradient norm are finite and which are not to
    be skipped, and count these updates in `steps_S`. Returns which they are, bool [S]."""
    counted = [each for each in parameters if each.in_norm]
    squares = [square_norms(each.p, each.grads, each.constraint) for each in counted]
    assert squares, "no parameter counts in the norm"
    squares_S = sum(squares[1:], squares[0])
    if adam.add_up is not None:
        squares_S = adam.total_square_norm(counted, squares)
    norm_S = squares_S.sqrt()
    updated_S = (norm_S + loss_S).isfinite()
    if skip_S is not None:
        updated_S &= ~skip_S
    scale_S = torch.ones_like(norm_S)
    if adam.clip is not None:
        scale_S = torch.clamp(adam.clip / (norm_S + 1e-6), max=1.0)
    scale_S = torch.where(updated_S, scale_S, torch.nan)
    steps_S += updated_S
    for each in parameters:
        step = AdamStep(lr_S, scale_S, steps_S, adam.betas, adam.eps, each.constraint)
        update(each.p, each.grads, each.m, each.v, each.bf16_copy, step)
    return updated_S
