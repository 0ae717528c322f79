"""The dense layout: values [B, F] above a threshold, with their mask and their sums."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from monosemy.ops.triton.launch import ROWS, columns, key_bits, on_device, require_floats
from monosemy.ops.triton.selection_kernels import is_above, load_row

SCALED = 4096  # elements that a program multiplies


@triton.jit
def _split_kernel(
    pre_BF,
    threshold,
    values_BF,
    mask_BF,
    parts_2PF,
    B,
    F: tl.constexpr,
    EACH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write a block of some rows where it is above the threshold, and where that is; sum and count over the
    rows."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(1) * ROWS
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    for row in range(first, tl.minimum(first + ROWS, B)):
        x, there = load_row(pre_BF, None, row, cols, F)
        over = is_above(x, there, cols, threshold, EACH)
        at = tl.cast(row, tl.int64) * F + cols
        x = tl.where(over, x, 0.0)
        tl.store(values_BF + at, x, mask=there)
        tl.store(mask_BF + at, over.to(tl.uint8), mask=there)
        total += x
        count += over.to(tl.float32)
    tl.store(parts_2PF + tl.program_id(1) * F + cols, total, mask=cols < F)
    tl.store(parts_2PF + (tl.num_programs(1) + tl.program_id(1)) * F + cols, count, mask=cols < F)


@triton.jit
def _count_positive_kernel(x_BF, parts_PF, B, F: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Count the positive values of some columns over some rows."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(1) * ROWS
    count = tl.zeros([BLOCK], tl.float32)
    for row in range(first, tl.minimum(first + ROWS, B)):
        x = tl.load(x_BF + tl.cast(row, tl.int64) * F + cols, mask=cols < F, other=0).to(tl.float32)
        count += (x > 0).to(tl.float32)
    tl.store(parts_PF + tl.program_id(1) * F + cols, count, mask=cols < F)


@triton.jit
def _select_kernel(
    mask_BF,
    x_BF,
    also_BF,
    add_F,
    out_BF,
    parts_PF,
    B,
    stride_B,
    STRIDE_F: tl.constexpr,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write a block of some rows, plus those of another array and a number of each column, where the mask is
    set, and sum over the rows."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(1) * ROWS
    total = tl.zeros([BLOCK], tl.float32)
    add = total if add_F is None else tl.load(add_F + cols, mask=cols < F, other=0)
    for row in range(first, tl.minimum(first + ROWS, B)):
        at = tl.cast(row, tl.int64) * F + cols
        place = tl.cast(row, tl.int64) * stride_B + cols * STRIDE_F
        x = tl.load(x_BF + place, mask=cols < F, other=0).to(tl.float32)
        if also_BF is not None:
            x += tl.load(also_BF + place, mask=cols < F, other=0).to(tl.float32)
        x = tl.where(tl.load(mask_BF + at, mask=cols < F, other=0) != 0, x + add, 0.0)
        tl.store(out_BF + at, x, mask=cols < F)
        total += x
    tl.store(parts_PF + tl.program_id(1) * F + cols, total, mask=cols < F)


def threshold_dense(
    pre_BF: Tensor, threshold: Tensor | float, values_BF: Tensor, mask_BF: Tensor
) -> tuple[Tensor, Tensor]:
    """Write where the pre-activations are above a threshold, and what they are there and zero elsewhere, [B,
    F]; their sums and counts."""
    key_bits(pre_BF)
    require_floats(values_BF=values_BF)
    (B, F), threshold, block = pre_BF.shape, on_device(threshold, pre_BF), columns(pre_BF.shape[1])
    parts_2PF = values_BF.new_empty(2, cdiv(B, ROWS), F, dtype=torch.float32)
    outputs, each = (values_BF, mask_BF.view(torch.uint8), parts_2PF), threshold.ndim
    grid = (cdiv(F, block), cdiv(B, ROWS))
    _split_kernel[grid](pre_BF, threshold, *outputs, B, F=F, EACH=each, ROWS=ROWS, BLOCK=block)
    sums_F, counts_F = parts_2PF.sum(1)
    return sums_F, counts_F


def masked_copy(
    mask_BF: Tensor,
    x_BF: Tensor,
    out_BF: Tensor,
    add_F: Tensor | None = None,
    also_BF: Tensor | None = None,
) -> Tensor:
    """Write x, plus another array and a number of each latent, where the mask is set and zero elsewhere;
    returns the sums, [F]. x may have any strides, and the other array has the same."""
    require_floats(out_BF=out_BF)
    assert mask_BF.is_contiguous() and x_BF.dtype in (torch.float32, torch.bfloat16), (
        "mask_BF: not contiguous, or x_BF: neither float32 nor bfloat16"
    )
    (B, F), block = out_BF.shape, columns(out_BF.shape[1])
    parts_PF = out_BF.new_empty(cdiv(B, ROWS), F, dtype=torch.float32)
    assert also_BF is None or also_BF.stride() == x_BF.stride(), "also_BF: other strides than x_BF"
    grid, (stride_B, stride_F) = (cdiv(F, block), len(parts_PF)), x_BF.stride()
    mask = mask_BF.view(torch.uint8)
    _select_kernel[grid](
        mask,
        x_BF,
        also_BF,
        add_F,
        out_BF,
        parts_PF,
        B,
        stride_B,
        STRIDE_F=stride_F,
        F=F,
        ROWS=ROWS,
        BLOCK=block,
    )
    return parts_PF.sum(0)


@triton.jit
def _scale_kernel(x_BF, factor, out_BF, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_BF + at, mask=at < n, other=0).to(tl.float32)
    tl.store(out_BF + at, x * tl.load(factor).to(tl.float32), mask=at < n)


def scale(x_BF: Tensor, factor: Tensor, out_BF: Tensor) -> Tensor:
    """Write x times a scalar, which is not rounded to x's precision, and return it."""
    require_floats(x_BF=x_BF, out_BF=out_BF)
    n = x_BF.numel()
    _scale_kernel[(cdiv(n, SCALED),)](x_BF, factor, out_BF, n, BLOCK=SCALED)
    return out_BF


def count_positive(x_BF: Tensor) -> Tensor:
    """Return on how many tokens each latent is positive, float32 [F]."""
    require_floats(x_BF=x_BF)
    (B, F), block = x_BF.shape, columns(x_BF.shape[1])
    parts_PF = x_BF.new_empty(cdiv(B, ROWS), F, dtype=torch.float32)
    _count_positive_kernel[(cdiv(F, block), len(parts_PF))](x_BF, parts_PF, B, F=F, ROWS=ROWS, BLOCK=block)
    return parts_PF.sum(0)
