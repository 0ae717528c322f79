"""Norms of rows, their gradient added to an array, and what the update takes of a gradient's rows.

F rows of D numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from monosemy.ops.triton.launch import require_float32, warps_for


@triton.jit
def tangential(g_RC, p_RC, CONSTRAINT: tl.constexpr):
    """Return the gradient without its part along the rows of p, where these keep their norm."""
    if CONSTRAINT != "free":
        norm = tl.sqrt(tl.sum(p_RC * p_RC, 1))
        if CONSTRAINT == "project":
            norm += 1e-6
        g_RC -= (tl.sum(g_RC * p_RC, 1) / norm / norm)[:, None] * p_RC
    return g_RC


@triton.jit
def _row_norms_kernel(W_FD, norms_F, D: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    w = tl.load(W_FD + row * D + d, mask=d < D, other=0)
    tl.store(norms_F + row, tl.sqrt(tl.sum(w * w, 0)))


def row_norms(W_FD: Tensor) -> Tensor:
    """Return the norm of each row, [F]."""
    require_float32(W_FD=W_FD)
    (F, D), block = W_FD.shape, next_power_of_2(W_FD.shape[1])
    norms_F = W_FD.new_empty(F)
    _row_norms_kernel[(F,)](W_FD, norms_F, D=D, BLOCK=block, num_warps=warps_for(block))
    return norms_F


@triton.jit
def _add_scaled_rows_kernel(W_FD, factors_F, into_FD, D: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    w = tl.load(W_FD + row * D + d, mask=d < D, other=0)
    g = tl.load(into_FD + row * D + d, mask=d < D, other=0)
    tl.store(into_FD + row * D + d, g + tl.load(factors_F + row) * w, mask=d < D)


def add_scaled_rows(W_FD: Tensor, factors_F: Tensor, into_FD: Tensor) -> None:
    """Add each row of W times its factor to an array."""
    require_float32(W_FD=W_FD, factors_F=factors_F, into_FD=into_FD)
    (F, D), block = W_FD.shape, next_power_of_2(W_FD.shape[1])
    _add_scaled_rows_kernel[(F,)](W_FD, factors_F, into_FD, D=D, BLOCK=block, num_warps=warps_for(block))
