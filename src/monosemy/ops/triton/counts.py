"""The error, and what a step counts: many small results in few launches.

B tokens, D d_in, F latents, P programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from monosemy.ops.reference import Counters, StepOutcome
from monosemy.ops.triton.launch import require_float32

BLOCK = 1024


@triton.jit
def _error_kernel(x, x_hat, error, parts_P, n, BLOCK: tl.constexpr):
    """Write a block of x - x_hat, and the sum of its squares."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    e = tl.load(x + at, mask=at < n, other=0) - tl.load(x_hat + at, mask=at < n, other=0)
    tl.store(error + at, e, mask=at < n)
    tl.store(parts_P + tl.program_id(0), tl.sum(e * e, 0))


def squared_error(x_BD: Tensor, x_hat_BD: Tensor) -> tuple[Tensor, Tensor]:
    """Return x - x_hat, and the mean over tokens of its squared norm."""
    require_float32(x_BD=x_BD, x_hat_BD=x_hat_BD)
    n, error_BD = x_BD.numel(), torch.empty_like(x_BD)
    parts_P = x_BD.new_empty(cdiv(n, BLOCK))
    _error_kernel[(len(parts_P),)](x_BD, x_hat_BD, error_BD, parts_P, n, BLOCK=BLOCK)
    return error_BD, parts_P.sum() / len(x_BD)


@triton.jit
def _firing_kernel(
    fired_F, since_fired_F, since_F, dead_F, dead, F, tokens, dead_tokens, BLOCK: tl.constexpr
):
    """Write the tokens since some latents fired, and which are dead; count these."""
    latents = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = latents < F
    before = tl.load(since_fired_F + latents, mask=there, other=0)
    since = tl.where(tl.load(fired_F + latents, mask=there, other=1) != 0, 0, before + tokens)
    tl.store(since_F + latents, since, mask=there)
    is_dead = there & (since >= dead_tokens)
    tl.store(dead_F + latents, is_dead.to(tl.uint8), mask=there)
    tl.atomic_add(dead, tl.sum(is_dead.to(tl.int64), 0), sem="relaxed")


def firing(
    fired_F: Tensor, since_fired_F: Tensor, tokens: int, dead_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tokens since each latent fired, int64 [F], after a batch in which some did; which are dead
    by that, [F], and how many."""
    F, dead = len(fired_F), since_fired_F.new_zeros(())
    since_F, dead_F = torch.empty_like(since_fired_F), torch.empty_like(fired_F)
    fired, is_dead = fired_F.contiguous().view(torch.uint8), dead_F.view(torch.uint8)
    grid = (cdiv(F, BLOCK),)
    _firing_kernel[grid](fired, since_fired_F, since_F, is_dead, dead, F, tokens, dead_tokens, BLOCK=BLOCK)
    return since_F, dead_F, dead


@triton.jit
def _threshold_kernel(threshold, values, smallest_kept, WEIGHT: tl.constexpr, MEAN: tl.constexpr):
    """Move the threshold."""
    kept, now, number = tl.load(smallest_kept), tl.load(threshold), tl.load(values)
    known = tl.abs(kept) < float("inf")
    number += known.to(tl.float32)
    share = tl.full([], WEIGHT, tl.float32)
    if MEAN:
        share = tl.maximum(1 / number, share)
    moved = tl.where(now < 0, kept, (1 - share) * now + share * kept)
    tl.store(values, number)
    tl.store(threshold, tl.where(known, moved, now))


def follow_threshold(
    threshold: Tensor, values: Tensor, smallest_kept: Tensor, weight: float, *, mean: bool
) -> None:
    """Move the running threshold towards the smallest value that a batch kept, in place.

    `values` counts how many it has followed; with `mean` it is their plain mean at first.
    """
    require_float32(threshold=threshold, values=values, smallest_kept=smallest_kept)
    _threshold_kernel[(1,)](threshold, values, smallest_kept, WEIGHT=weight, MEAN=mean, num_warps=1)


@triton.jit
def _count_step_kernel(
    since_fired_F,
    active,
    nonfinite,
    clock,
    updated,
    overflowed,
    batch_is_finite,
    entries,
    since_F,
    tokens,
    F,
    BLOCK: tl.constexpr,
):
    """Keep a block of the tokens since latents fired; the first program counts the rest."""
    took = tl.load(updated) != 0
    latents = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    before = tl.load(since_fired_F + latents, mask=latents < F, other=0)
    after = tl.load(since_F + latents, mask=latents < F, other=0)
    tl.store(since_fired_F + latents, tl.where(took, after, before), mask=latents < F)
    if tl.program_id(0) == 0:
        tl.store(active, tl.div_rn(tl.load(entries).to(tl.float32), tl.full([], tokens, tl.float32)))
        steps = tl.load(clock)
        tl.store(clock, steps + 1)
        if not took:
            full = False
            if overflowed is not None:
                full = tl.load(overflowed) != 0
            if full:
                tl.store(nonfinite + 3, tl.load(nonfinite + 3) + 1)
            else:
                skipped = tl.load(nonfinite)
                if skipped == 0:
                    tl.store(nonfinite + 1, steps)
                finite = (tl.load(nonfinite + 2) != 0) & (tl.load(batch_is_finite) != 0)
                tl.store(nonfinite, skipped + 1)
                tl.store(nonfinite + 2, finite.to(tl.int64))


def _flag(flag: Tensor) -> Tensor:
    """Return a truth value as the kernels read it."""
    return flag.view(torch.uint8)


def count_step(counters: Counters, step: StepOutcome) -> None:
    """Count a step in place: where it was updated, keep the tokens since latents fired; otherwise note why
    not."""
    updated, overflowed, batch_is_finite, entries, tokens, since_F = step
    F = len(since_F)
    _count_step_kernel[(cdiv(F, BLOCK),)](
        counters.since_fired_F,
        counters.active,
        counters.nonfinite,
        counters.clock,
        _flag(updated),
        None if overflowed is None else _flag(overflowed),
        _flag(batch_is_finite),
        entries,
        since_F,
        float(tokens),
        F,
        BLOCK=BLOCK,
    )
