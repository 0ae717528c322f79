"""Selections: the k largest of each token or of a batch, and what is above a threshold.

B tokens, F latents, k or n latents to select, N entries (capacity), R bags.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton import cdiv

from monosemy.ops.pattern import Selection
from monosemy.ops.triton.launch import block_size, key_bits, on_device, warps_for
from monosemy.ops.triton.selection_kernels import (
    above_kernel,
    bound_batch_kernel,
    bound_rows_kernel,
    count_above_kernel,
    count_kernel,
    histogram_kernel,
    list_kernel,
    maxima_kernel,
    pick_kernel,
    starts_kernel,
)


def _sizes(F: int, k: int) -> tuple[int, int]:
    """Return how many shares (M) and places in its list (C) a row has, of which about k are kept."""
    return block_size(4 * k, 2048, 8192, F), block_size(2 * k, 1024, 8192, F)


def _room(pre_BF: Tensor, *sizes: int) -> list[Tensor]:
    """Room for a list of each token: how many, then which."""
    return [torch.empty(len(pre_BF), size + 1, dtype=torch.int32, device=pre_BF.device) for size in sizes]


def _starts(greater_B: Tensor, equal_B: Tensor | None, limit: int) -> Tensor:
    """Return where each token's entries begin, and where the last's end, [B + 1]."""
    B = len(greater_B)
    offsets_B1 = greater_B.new_empty(B + 1)
    starts_kernel[(1,)](greater_B, equal_B, offsets_B1, B, limit, BLOCK=1024)
    return offsets_B1


def _padding(offsets_B1: Tensor, N: int) -> Selection:
    """Return a list with nothing written into it yet."""
    return Selection(offsets_B1.new_zeros(N), offsets_B1, offsets_B1.new_zeros(N, dtype=torch.float32))


def _whole(offsets_B1: Tensor, N: int) -> Selection:
    """Return a list that will be filled."""
    return Selection(offsets_B1.new_empty(N), offsets_B1, offsets_B1.new_empty(N, dtype=torch.float32))


def top_k(pre_BF: Tensor, k: int, among_F: Tensor | None = None) -> Selection:
    """Select the k largest of each token; with a mask `among_F` those of its latents alone, as many as there
    are up to k. Capacity B k."""
    (B, F), k, bits = pre_BF.shape, min(k, pre_BF.shape[1]), key_bits(pre_BF)
    chosen = k if among_F is None else among_F.sum(dtype=torch.int32).clamp(max=k)
    if among_F is None and k:
        steps_B1 = torch.arange(0, B * k + 1, k, dtype=torch.int32, device=pre_BF.device)
        picked = _whole(steps_B1, B * k)
    else:
        steps_B1 = torch.arange(B + 1, dtype=torch.int32, device=pre_BF.device)
        picked = _padding(steps_B1 * chosen, B * k)
    indices_N, offsets_B1, values_N = picked
    among = None if among_F is None else among_F.view(torch.uint8)
    M, C = _sizes(F, k)
    shares_BM, lists_BC = _room(pre_BF, M, C)
    bounds_B = torch.empty(B, device=pre_BF.device)
    bound_rows_kernel[(B,)](
        pre_BF, among, offsets_B1, bounds_B, shares_BM, F=F, M=M, BITS=bits, num_warps=warps_for(M)
    )
    list_kernel[(B,)](
        pre_BF, among, bounds_B, shares_BM, lists_BC, F=F, C=C, M=M, BLOCK=min(M, 256), num_warps=2
    )
    pick_kernel[(B,)](
        pre_BF,
        among,
        lists_BC,
        None,
        0,
        offsets_B1,
        indices_N,
        values_N,
        F=F,
        C=C,
        BITS=bits,
        num_warps=warps_for(C),
    )
    return picked


def batch_top_k(pre_BF: Tensor, n: int) -> Selection:
    """Select the n largest of the whole batch. Capacity n."""
    (B, F), n, bits = pre_BF.shape, min(n, pre_BF.numel()), key_bits(pre_BF)
    (M, C), coarse, programs = _sizes(F, cdiv(n, B)), block_size(4 * cdiv(n, B), 128, 8192, F), min(B, 512)
    counts_P256 = torch.zeros(2 + bits // 8, 256, dtype=torch.int32, device=pre_BF.device)
    exact_P256 = counts_P256[2:]
    shares_BM, lists_BC = _room(pre_BF, M, C)
    bounds_B = torch.empty(B, device=pre_BF.device)
    maxima_BM, coarse_BM = pre_BF.new_empty(B, M), pre_BF.new_empty(B, coarse)

    maxima_kernel[(B,)](pre_BF, maxima_BM, coarse_BM, F=F, M=M, COARSE=coarse, num_warps=warps_for(M))
    for p in range(2):
        histogram_kernel[(programs,)](
            coarse_BM, None, counts_P256, n, B, F=coarse, C=0, BITS=16, PASS=p, BLOCK=min(coarse, 1024)
        )
    bound_batch_kernel[(B,)](maxima_BM, counts_P256, n, bounds_B, shares_BM, M=M, num_warps=warps_for(M))
    list_kernel[(B,)](
        pre_BF, None, bounds_B, shares_BM, lists_BC, F=F, C=C, M=M, BLOCK=min(M, 256), num_warps=2
    )
    for p in range(bits // 8):
        histogram_kernel[(programs,)](
            pre_BF, lists_BC, exact_P256, n, B, F=F, C=C, BITS=bits, PASS=p, BLOCK=min(C, 1024)
        )
    greater_B, equal_B = counts_P256.new_empty(2, B)
    count_kernel[(B,)](
        pre_BF, lists_BC, exact_P256, n, greater_B, equal_B, F=F, C=C, BITS=bits, BLOCK=min(C, 1024)
    )
    indices_N, offsets_B1, values_N = picked = _whole(_starts(greater_B, equal_B, n), n)
    pick_kernel[(B,)](
        pre_BF,
        None,
        lists_BC,
        exact_P256,
        n,
        offsets_B1,
        indices_N,
        values_N,
        F=F,
        C=C,
        BITS=bits,
        num_warps=warps_for(C),
    )
    return picked


def _count_above(pre_BF: Tensor, threshold: Tensor | float) -> tuple[Tensor, Tensor, Tensor, dict[str, int]]:
    """Return how many of each token are above, and for `above_kernel` the threshold on the device, the
    shares, and the constants."""
    key_bits(pre_BF)
    (B, F), threshold = pre_BF.shape, on_device(threshold, pre_BF)
    sizes = {"F": F, "M": _sizes(F, 1)[0], "EACH": threshold.ndim}
    numbers_B = torch.empty(B, dtype=torch.int32, device=pre_BF.device)
    (shares_BM,) = _room(pre_BF, sizes["M"])
    count_above_kernel[(B,)](
        pre_BF, threshold, numbers_B, shares_BM, **sizes, num_warps=warps_for(sizes["M"])
    )
    return numbers_B, threshold, shares_BM, sizes


def count_above(pre_BF: Tensor, threshold: Tensor | float) -> Tensor:
    """Return how many entries `above` would list if it had the capacity, int64 []."""
    return _count_above(pre_BF, threshold)[0].sum()


def above(pre_BF: Tensor, threshold: Tensor | float, capacity: int | None = None) -> Selection:
    """Select everything above a threshold: a number, or one for each latent [F]. What exceeds the capacity
    (else B F) is left out.

    So if `offsets_B1[-1]` is the capacity, something may be missing; `count_above` knows.
    """
    numbers_B, threshold, shares_BM, sizes = _count_above(pre_BF, threshold)
    capacity = pre_BF.numel() if capacity is None else capacity
    indices_N, offsets_B1, values_N = picked = _padding(_starts(numbers_B, None, capacity), capacity)
    outputs, block = (offsets_B1, indices_N, values_N), min(sizes["M"], 256)
    above_kernel[(len(pre_BF),)](pre_BF, threshold, shares_BM, *outputs, **sizes, BLOCK=block, num_warps=2)
    return picked
