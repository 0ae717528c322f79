"""The dense layout: values [B, F] above a threshold, with their mask and their sums."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from monosemy.ops.triton.launch import block_size, key_bits, on_device, require_float32
from monosemy.ops.triton.selection_kernels import is_above, load_row


@triton.jit
def _split_kernel(
    pre_BF, threshold, values_BF, mask_BF, F: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr
):
    """Write a block of a row where it is above the threshold, and where that is."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x, there = load_row(pre_BF, None, row, cols, F)
    over = is_above(x, there, cols, threshold, EACH)
    tl.store(values_BF + row * F + cols, tl.where(over, x, 0.0), mask=there)
    tl.store(mask_BF + row * F + cols, over.to(tl.uint8), mask=there)


@triton.jit
def _select_kernel(
    mask_BF,
    x_BF,
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
    """Write a block of some rows, plus a number of each column, where the mask is set, and sum over the
    rows."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(1) * ROWS
    total = tl.zeros([BLOCK], tl.float32)
    add = total if add_F is None else tl.load(add_F + cols, mask=cols < F, other=0)
    for row in range(first, tl.minimum(first + ROWS, B)):
        at = tl.cast(row, tl.int64) * F + cols
        x = tl.load(x_BF + tl.cast(row, tl.int64) * stride_B + cols * STRIDE_F, mask=cols < F, other=0)
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
    require_float32(values_BF=values_BF)
    (B, F), threshold, block = (
        pre_BF.shape,
        on_device(threshold, pre_BF),
        block_size(2048, 1, 2048, pre_BF.shape[1]),
    )
    mask = mask_BF.view(torch.uint8)
    _split_kernel[(B, cdiv(F, block))](
        pre_BF, threshold, values_BF, mask, F=F, EACH=threshold.ndim, BLOCK=block
    )
    return values_BF.sum(0), mask_BF.sum(0, dtype=torch.float32)


def masked_copy(mask_BF: Tensor, x_BF: Tensor, out_BF: Tensor, add_F: Tensor | None = None) -> Tensor:
    """Write x, plus a number of each latent, where the mask is set and zero elsewhere; returns the sums, [F].
    x may have any strides."""
    require_float32(out_BF=out_BF)
    assert mask_BF.is_contiguous() and x_BF.dtype == torch.float32, (
        "mask_BF: not contiguous, or x_BF: not float32"
    )
    (B, F), block = out_BF.shape, block_size(512, 1, 512, out_BF.shape[1])
    parts_PF = out_BF.new_empty(cdiv(B, 32), F)
    grid, (stride_B, stride_F) = (cdiv(F, block), len(parts_PF)), x_BF.stride()
    mask = mask_BF.view(torch.uint8)
    _select_kernel[grid](
        mask, x_BF, add_F, out_BF, parts_PF, B, stride_B, STRIDE_F=stride_F, F=F, ROWS=32, BLOCK=block
    )
    return parts_PF.sum(0)


def count_positive(x_BF: Tensor) -> Tensor:
    """Return on how many tokens each latent is positive, float32 [F]."""
    return (x_BF > 0).sum(0, dtype=torch.float32)
