"""The kernels: every op of `torch.py` in Triton, for float32 weights on a GPU and pre-activations of float32
or bfloat16.

No function waits for the device and all shapes are known beforehand, so that a whole step can be captured as
a CUDA graph: lists have a fixed capacity, how much of it is used stands on the device, and what lies behind
is padding (latent 0, value 0). Sums have an order that the data alone decides; nothing but whole numbers is
added atomically. B tokens, D d_in, F latents, N entries (capacity), R bags, S SAEs of one shape, M shares of
a row, C places in a row's list, P digits of a key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2

from monosemy.ops.pattern import Selection, SparsePattern
from monosemy.ops.reference import AdamStep, Constraint, estimate  # noqa: F401

# --- selections: the kernels --------------------------------------------------------------------------------
#
# To choose the k largest of a row, its latents are dealt out to M shares: latent f belongs to share f % M.
# The k-th largest of the shares' maxima is a bound that at least k values reach and, as M is several times k,
# few more; and it is reached in few shares. Those are noted, what reaches the bound in them is listed, and
# the exact choice looks at the list alone. So a row is read once, and then a small part of it again. If its
# list overflows, the row itself is searched: the bound decides about speed, never about the result.
#
# The n largest of a batch are found alike, with one bound for all rows, by histograms; and what is above a
# threshold by shares, too.
# Shares and lists of a row are stored as how many there are, then which, ascending.


@triton.jit
def _keys(x, BITS: tl.constexpr):
    """Return the first BITS bits of whole numbers that are ordered as the values are. -0 is 0, and a NaN is
    the largest, as in torch."""
    x = x.to(tl.float32)
    bits = tl.where(x == 0, 0.0, x).to(tl.uint32, bitcast=True)
    keys = tl.where(bits >> 31 != 0, ~bits, bits | 0x80000000)
    return tl.where(x != x, 0xFFFFFFFF, keys) >> (32 - BITS)


@triton.jit
def _least(key, BITS: tl.constexpr):
    """Return the least value with this key; for what is the key of none a NaN, and nothing is less than
    that."""
    bits = key << (32 - BITS)
    return tl.where(bits >> 31 != 0, bits ^ 0x80000000, ~bits).to(tl.float32, bitcast=True)


@triton.jit
def _kth(keys, k, BITS: tl.constexpr):
    """Return the k-th largest of some keys, bit by bit."""
    key = tl.full([], 0, tl.uint32)
    bit = tl.full([], 1 << (BITS - 1), tl.uint32)
    for _ in range(BITS):
        key = tl.where(tl.sum((keys >= (key | bit)).to(tl.int32), 0) >= k, key | bit, key)
        bit = bit >> 1
    return key


@triton.jit
def _in_row(pre_BF, among_F, row, cols, F: tl.constexpr):
    """Return the values of some columns of a row, and which of them may be chosen."""
    allowed = cols < F
    x = tl.load(pre_BF + tl.cast(row, tl.int64) * F + cols, mask=allowed, other=float("-inf")).to(tl.float32)
    if among_F is not None:  # after the load, which so reads in wide words
        allowed = allowed & (tl.load(among_F + cols, mask=allowed, other=0) != 0)
        x = tl.where(allowed, x, float("-inf"))
    return x, allowed


@triton.jit
def _kth_in_row(pre_BF, among_F, row, k, F: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the key of the k-th largest of a row, bit by bit."""
    key = tl.full([], 0, tl.uint32)
    bit = tl.full([], 1 << (BITS - 1), tl.uint32)
    for _ in range(BITS):
        number = 0
        for first in range(0, F, BLOCK):
            x, allowed = _in_row(pre_BF, among_F, row, first + tl.arange(0, BLOCK), F)
            number += tl.sum((allowed & (_keys(x, BITS) >= (key | bit))).to(tl.int32), 0)
        key = tl.where(number >= k, key | bit, key)
        bit = bit >> 1
    return key


@triton.jit
def _maxima(pre_BF, among_F, row, F: tl.constexpr, M: tl.constexpr):
    """Return the largest of each share of a row; a NaN where there is one."""
    largest_M = tl.full([M], float("-inf"), tl.float32)
    for first in range(0, F, M):
        x, _ = _in_row(pre_BF, among_F, row, first + tl.arange(0, M), F)
        largest_M = tl.maximum(largest_M, x, propagate_nan=tl.PropagateNan.ALL)
    return largest_M


@triton.jit
def _note(reached_M, row, shares_BM, M: tl.constexpr):
    """Note the shares that are reached."""
    noted_M = shares_BM + tl.cast(row, tl.int64) * (M + 1)
    one_M = reached_M.to(tl.int32)
    tl.store(noted_M, tl.sum(one_M, 0))
    tl.store(noted_M + tl.cumsum(one_M, 0), tl.arange(0, M), mask=reached_M)


@triton.jit
def _in_shares(pre_BF, among_F, row, noted_M, number, first, at, F: tl.constexpr):
    """Return the columns that some of the noted shares have from `first` on, their values, and which may be
    chosen."""
    cols = first + tl.load(noted_M + 1 + at, mask=at < number, other=F)
    x, allowed = _in_row(pre_BF, among_F, row, cols, F)
    return cols, x, allowed


@triton.jit
def _digits(counts_P256, n, PASSES: tl.constexpr):
    """Return the first digits of the n-th largest key, from how often each digit followed those before."""
    digits_256 = tl.arange(0, 256)
    key = tl.full([], 0, tl.uint32)
    left = n
    for p in tl.static_range(PASSES):
        counts = tl.load(counts_P256 + p * 256 + digits_256)
        at_least = tl.cumsum(counts, 0, reverse=True)
        digit = tl.maximum(tl.sum((at_least >= left).to(tl.int32), 0) - 1, 0)
        left = left - tl.sum(tl.where(digits_256 > digit, counts, 0), 0)
        key = (key << 8) | digit.to(tl.uint32)
    return key


@triton.jit
def _bound_rows_kernel(
    pre_BF, among_F, offsets_B1, bounds_B, shares_BM, F: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr
):
    """Return a bound for the k largest of a token, and the shares that reach it."""
    row = tl.program_id(0)
    k = tl.load(offsets_B1 + row + 1) - tl.load(offsets_B1 + row)
    if k > 0:
        largest_M = _maxima(pre_BF, among_F, row, F, M)
        bound = _least(_kth(_keys(largest_M, BITS), k, BITS), BITS)
        tl.store(bounds_B + row, bound)
        _note(~(largest_M < bound), row, shares_BM, M)
    else:
        _note(tl.arange(0, M) < 0, row, shares_BM, M)


@triton.jit
def _maxima_kernel(pre_BF, maxima_BM, coarse_BM, F: tl.constexpr, M: tl.constexpr, COARSE: tl.constexpr):
    """Return the largest of each share of a token's latents, and of fewer shares."""
    row = tl.program_id(0).to(tl.int64)
    largest_M = _maxima(pre_BF, None, row, F, M)
    tl.store(maxima_BM + row * M + tl.arange(0, M), largest_M.to(maxima_BM.dtype.element_ty))
    coarse_M = tl.max(tl.reshape(largest_M, [M // COARSE, COARSE]), 0)
    tl.store(coarse_BM + row * COARSE + tl.arange(0, COARSE), coarse_M.to(coarse_BM.dtype.element_ty))


@triton.jit
def _bound_batch_kernel(maxima_BM, counts_P256, n, bounds_B, shares_BM, M: tl.constexpr):
    """Return the bound for the n largest of the batch, and the shares of a token that reach it."""
    row = tl.program_id(0)
    bound = _least(_digits(counts_P256, n, 2), 16)
    tl.store(bounds_B + row, bound)
    largest_M, _ = _in_row(maxima_BM, None, row, tl.arange(0, M), M)
    _note(~(largest_M < bound), row, shares_BM, M)


@triton.jit
def _list_kernel(
    pre_BF,
    among_F,
    bounds_B,
    shares_BM,
    lists_BC,
    F: tl.constexpr,
    C: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """List what reaches a row's bound. If there is more than the list can hold, the number alone is right."""
    row = tl.program_id(0)
    noted_M = shares_BM + tl.cast(row, tl.int64) * (M + 1)
    list_C = lists_BC + tl.cast(row, tl.int64) * (C + 1)
    number = tl.load(noted_M)
    bound = tl.load(bounds_B + row)
    listed = 0
    for first in range(0, F, M):
        for s in range(0, number, BLOCK):
            cols, x, allowed = _in_shares(
                pre_BF, among_F, row, noted_M, number, first, s + tl.arange(0, BLOCK), F
            )
            reached = allowed & ~(x < bound)
            places = listed + tl.cumsum(reached.to(tl.int32), 0)
            tl.store(list_C + places, cols, mask=reached & (places <= C))
            listed += tl.sum(reached.to(tl.int32), 0)
    tl.store(list_C, listed)


@triton.jit
def _length(lists_BC, row, F: tl.constexpr, C: tl.constexpr):
    """Return the length of a row's list and whether it is used; without a list, or with one that overflowed,
    the row is its own."""
    length = F
    if lists_BC is not None:
        length = tl.load(lists_BC + tl.cast(row, tl.int64) * (C + 1))
    return tl.where(length <= C, length, F), length <= C


@triton.jit
def _in_list(pre_BF, among_F, lists_BC, row, at, F: tl.constexpr, C: tl.constexpr):
    """Return the latents at some places of a row's list, their values, and which there are."""
    latents = at
    if lists_BC is not None:
        length, used = _length(lists_BC, row, F, C)
        listed = at < tl.where(used, length, 0)
        latents = tl.where(
            used, tl.load(lists_BC + tl.cast(row, tl.int64) * (C + 1) + 1 + at, mask=listed, other=F), at
        )
    x, there = _in_row(pre_BF, among_F, row, latents, F)
    return latents, x, there


@triton.jit
def _numbers(
    pre_BF,
    among_F,
    lists_BC,
    row,
    key,
    F: tl.constexpr,
    C: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return how many of a row's list are greater than the key, and how many equal it."""
    length, _used = _length(lists_BC, row, F, C)
    n_greater, n_equal = 0, 0
    for first in range(0, length, BLOCK):
        _latents, x, there = _in_list(pre_BF, among_F, lists_BC, row, first + tl.arange(0, BLOCK), F, C)
        keys = _keys(x, BITS)
        n_greater += tl.sum((there & (keys > key)).to(tl.int32), 0)
        n_equal += tl.sum((there & (keys == key)).to(tl.int32), 0)
    return n_greater, n_equal


@triton.jit
def _histogram_kernel(
    pre_BF,
    lists_BC,
    counts_P256,
    n,
    B,
    F: tl.constexpr,
    C: tl.constexpr,
    BITS: tl.constexpr,
    PASS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count the next digit of what begins with the digits found so far."""
    found = _digits(counts_P256, n, PASS)
    counts = tl.zeros([256], tl.int32)
    for row in range(tl.program_id(0), B, tl.num_programs(0)):
        length, _used = _length(lists_BC, row, F, C)
        for first in range(0, length, BLOCK):
            _latents, x, there = _in_list(pre_BF, None, lists_BC, row, first + tl.arange(0, BLOCK), F, C)
            keys = _keys(x, BITS) >> (BITS - 8 * PASS - 8)
            if PASS > 0:
                there = there & (keys >> 8 == found)
            counts += tl.histogram((keys & 255).to(tl.int32), 256, mask=there)
    tl.atomic_add(counts_P256 + PASS * 256 + tl.arange(0, 256), counts, mask=counts > 0, sem="relaxed")


@triton.jit
def _count_kernel(
    pre_BF,
    lists_BC,
    counts_P256,
    n,
    greater_B,
    equal_B,
    F: tl.constexpr,
    C: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count what of a token is greater than the batch's n-th largest, and what equals it."""
    row = tl.program_id(0)
    n_greater, n_equal = _numbers(
        pre_BF, None, lists_BC, row, _digits(counts_P256, n, BITS // 8), F, C, BITS, BLOCK
    )
    tl.store(greater_B + row, n_greater)
    tl.store(equal_B + row, n_equal)


@triton.jit
def _starts_kernel(greater_B, equal_B, offsets_B1, B, limit, BLOCK: tl.constexpr):
    """Return where each token's entries begin, of all that is greater and, if counted, of the first that are
    equal, up to the limit."""
    left = 0
    if equal_B is not None:
        for first in range(0, B, BLOCK):
            rows = first + tl.arange(0, BLOCK)
            left -= tl.sum(tl.load(greater_B + rows, mask=rows < B, other=0), 0)
        left += limit
    taken, equals = 0, 0
    tl.store(offsets_B1, 0)
    for first in range(0, B, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        numbers = tl.load(greater_B + rows, mask=rows < B, other=0)
        if equal_B is not None:
            equal = tl.load(equal_B + rows, mask=rows < B, other=0)
            before = equals + tl.cumsum(equal, 0) - equal
            numbers += tl.minimum(tl.maximum(left - before, 0), equal)
            equals += tl.sum(equal, 0)
        tl.store(offsets_B1 + 1 + rows, tl.minimum(taken + tl.cumsum(numbers, 0), limit), mask=rows < B)
        taken += tl.sum(numbers, 0)


@triton.jit
def _pick_kernel(
    pre_BF,
    among_F,
    lists_BC,
    counts_P256,
    n,
    offsets_B1,
    indices_N,
    values_N,
    F: tl.constexpr,
    C: tl.constexpr,
    BITS: tl.constexpr,
):
    """Write what a token keeps: as many of its largest as its starts say."""
    row = tl.program_id(0)
    begin = tl.load(offsets_B1 + row)
    k = tl.load(offsets_B1 + row + 1) - begin
    if k > 0:
        length, used = _length(lists_BC, row, F, C)
        if counts_P256 is not None:
            key = _digits(counts_P256, n, BITS // 8)
        elif used:
            _latents, x, there = _in_list(pre_BF, among_F, lists_BC, row, tl.arange(0, C), F, C)
            key = _kth(tl.where(there, _keys(x, BITS), 0), k, BITS)
        else:
            key = _kth_in_row(pre_BF, among_F, row, k, F, BITS, C)
        more, _same = _numbers(pre_BF, among_F, lists_BC, row, key, F, C, BITS, C)
        taken, equals = 0, 0
        for first in range(0, length, C):
            latents, x, there = _in_list(pre_BF, among_F, lists_BC, row, first + tl.arange(0, C), F, C)
            keys = _keys(x, BITS)
            equal = there & (keys == key)
            nth = equals + tl.cumsum(equal.to(tl.int32), 0)
            chosen = (there & (keys > key)) | (equal & (nth <= k - more))
            places = begin + taken + tl.cumsum(chosen.to(tl.int32), 0) - 1
            tl.store(indices_N + places, latents, mask=chosen)
            tl.store(values_N + places, x, mask=chosen)
            taken += tl.sum(chosen.to(tl.int32), 0)
            equals += tl.sum(equal.to(tl.int32), 0)


@triton.jit
def _over(x, allowed, cols, threshold, EACH: tl.constexpr):
    """Return which values are above the threshold."""
    limit = tl.load(threshold + cols, mask=allowed, other=0) if EACH else tl.load(threshold)
    return allowed & (x > limit.to(tl.float32))


@triton.jit
def _count_above_kernel(
    pre_BF, threshold, numbers_B, shares_BM, F: tl.constexpr, M: tl.constexpr, EACH: tl.constexpr
):
    """Count what of a token is above the threshold, and note the shares that it is in."""
    row = tl.program_id(0)
    numbers_M = tl.zeros([M], tl.int32)
    for first in range(0, F, M):
        cols = first + tl.arange(0, M)
        x, allowed = _in_row(pre_BF, None, row, cols, F)
        numbers_M += _over(x, allowed, cols, threshold, EACH).to(tl.int32)
    tl.store(numbers_B + row, tl.sum(numbers_M, 0))
    _note(numbers_M > 0, row, shares_BM, M)


@triton.jit
def _above_kernel(
    pre_BF,
    threshold,
    shares_BM,
    offsets_B1,
    indices_N,
    values_N,
    F: tl.constexpr,
    M: tl.constexpr,
    EACH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write what of a token is above the threshold, as much as there is room for."""
    row = tl.program_id(0)
    noted_M = shares_BM + tl.cast(row, tl.int64) * (M + 1)
    place = tl.load(offsets_B1 + row)
    end = tl.load(offsets_B1 + row + 1)
    number = tl.where(place < end, tl.load(noted_M), 0)
    for first in range(0, F, M):
        for s in range(0, number, BLOCK):
            cols, x, allowed = _in_shares(
                pre_BF, None, row, noted_M, number, first, s + tl.arange(0, BLOCK), F
            )
            over = _over(x, allowed, cols, threshold, EACH)
            places = place + tl.cumsum(over.to(tl.int32), 0) - 1
            tl.store(indices_N + places, cols, mask=over & (places < end))
            tl.store(values_N + places, x, mask=over & (places < end))
            place += tl.sum(over.to(tl.int32), 0)


# --- selections: the functions ------------------------------------------------------------------------------


def _block(wanted: int, least: int, most: int, F: int) -> int:
    """Return a power of two, no longer than a row needs."""
    return min(max(next_power_of_2(wanted), least), most, next_power_of_2(F))


def _sizes(F: int, k: int) -> tuple[int, int]:
    """Return how many shares (M) and places in its list (C) a row has, of which about k are kept."""
    return _block(4 * k, 2048, 8192, F), _block(2 * k, 1024, 8192, F)


def _warps(elements: int) -> int:
    """Warps for a program that works on so many elements at a time."""
    return min(max(elements // 512, 1), 16)


def _bits(pre_BF: Tensor) -> int:
    assert pre_BF.is_contiguous(), "pre_BF: not contiguous"
    assert pre_BF.dtype in (torch.bfloat16, torch.float32), f"pre_BF: {pre_BF.dtype}"
    assert pre_BF.numel() < 2**31, "pre_BF: more elements than int32 can number"
    return 16 if pre_BF.dtype == torch.bfloat16 else 32


def _room(pre_BF: Tensor, *sizes: int) -> list[Tensor]:
    """Room for a list of each token: how many, then which."""
    return [torch.empty(len(pre_BF), size + 1, dtype=torch.int32, device=pre_BF.device) for size in sizes]


def _starts(greater_B: Tensor, equal_B: Tensor | None, limit: int) -> Tensor:
    """Return where each token's entries begin, and where the last's end, [B + 1]."""
    B = len(greater_B)
    offsets_B1 = greater_B.new_empty(B + 1)
    _starts_kernel[(1,)](greater_B, equal_B, offsets_B1, B, limit, BLOCK=1024)
    return offsets_B1


def _padding(offsets_B1: Tensor, N: int) -> Selection:
    """Return a list with nothing written into it yet."""
    return Selection(offsets_B1.new_zeros(N), offsets_B1, offsets_B1.new_zeros(N, dtype=torch.float32))


def top_k(pre_BF: Tensor, k: int, among_F: Tensor | None = None) -> Selection:
    """Select the k largest of each token; with a mask `among_F` those of its latents alone, as many as there
    are up to k. Capacity B k."""
    (B, F), k, bits = pre_BF.shape, min(k, pre_BF.shape[1]), _bits(pre_BF)
    chosen = k if among_F is None else among_F.sum(dtype=torch.int32).clamp(max=k)
    indices_N, offsets_B1, values_N = picked = _padding(
        torch.arange(B + 1, dtype=torch.int32, device=pre_BF.device) * chosen, B * k
    )
    among = None if among_F is None else among_F.view(torch.uint8)
    M, C = _sizes(F, k)
    shares_BM, lists_BC = _room(pre_BF, M, C)
    bounds_B = torch.empty(B, device=pre_BF.device)
    _bound_rows_kernel[(B,)](
        pre_BF, among, offsets_B1, bounds_B, shares_BM, F=F, M=M, BITS=bits, num_warps=_warps(M)
    )
    _list_kernel[(B,)](
        pre_BF, among, bounds_B, shares_BM, lists_BC, F=F, C=C, M=M, BLOCK=min(M, 256), num_warps=2
    )
    _pick_kernel[(B,)](
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
        num_warps=_warps(C),
    )
    return picked


def batch_top_k(pre_BF: Tensor, n: int) -> Selection:
    """Select the n largest of the whole batch. Capacity n."""
    (B, F), n, bits = pre_BF.shape, min(n, pre_BF.numel()), _bits(pre_BF)
    (M, C), coarse, programs = _sizes(F, cdiv(n, B)), _block(4 * cdiv(n, B), 128, 8192, F), min(B, 512)
    counts_P256 = torch.zeros(2 + bits // 8, 256, dtype=torch.int32, device=pre_BF.device)
    exact_P256 = counts_P256[2:]
    shares_BM, lists_BC = _room(pre_BF, M, C)
    bounds_B = torch.empty(B, device=pre_BF.device)
    maxima_BM, coarse_BM = pre_BF.new_empty(B, M), pre_BF.new_empty(B, coarse)

    _maxima_kernel[(B,)](pre_BF, maxima_BM, coarse_BM, F=F, M=M, COARSE=coarse, num_warps=_warps(M))
    for p in range(2):
        _histogram_kernel[(programs,)](
            coarse_BM, None, counts_P256, n, B, F=coarse, C=0, BITS=16, PASS=p, BLOCK=min(coarse, 1024)
        )
    _bound_batch_kernel[(B,)](maxima_BM, counts_P256, n, bounds_B, shares_BM, M=M, num_warps=_warps(M))
    _list_kernel[(B,)](
        pre_BF, None, bounds_B, shares_BM, lists_BC, F=F, C=C, M=M, BLOCK=min(M, 256), num_warps=2
    )
    for p in range(bits // 8):
        _histogram_kernel[(programs,)](
            pre_BF, lists_BC, exact_P256, n, B, F=F, C=C, BITS=bits, PASS=p, BLOCK=min(C, 1024)
        )
    greater_B, equal_B = counts_P256.new_empty(2, B)
    _count_kernel[(B,)](
        pre_BF, lists_BC, exact_P256, n, greater_B, equal_B, F=F, C=C, BITS=bits, BLOCK=min(C, 1024)
    )
    indices_N, offsets_B1, values_N = picked = _padding(_starts(greater_B, equal_B, n), n)
    _pick_kernel[(B,)](
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
        num_warps=_warps(C),
    )
    return picked


def _there(threshold: Tensor | float, pre_BF: Tensor) -> Tensor:
    """Return the threshold on the device; a single number as torch compares with it, rounded to the precision
    of what is compared."""
    if not isinstance(threshold, Tensor):
        threshold = torch.full((), threshold, device=pre_BF.device)
    return threshold.contiguous() if threshold.ndim else threshold.to(pre_BF.dtype)


def _count_above(pre_BF: Tensor, threshold: Tensor | float) -> tuple[Tensor, Tensor, Tensor, dict[str, int]]:
    """Return how many of each token are above, and for `_above_kernel` the threshold on the device, the
    shares, and the constants."""
    _bits(pre_BF)
    (B, F), threshold = pre_BF.shape, _there(threshold, pre_BF)
    sizes = {"F": F, "M": _sizes(F, 1)[0], "EACH": threshold.ndim}
    numbers_B = torch.empty(B, dtype=torch.int32, device=pre_BF.device)
    (shares_BM,) = _room(pre_BF, sizes["M"])
    _count_above_kernel[(B,)](pre_BF, threshold, numbers_B, shares_BM, **sizes, num_warps=_warps(sizes["M"]))
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
    _above_kernel[(len(pre_BF),)](pre_BF, threshold, shares_BM, *outputs, **sizes, BLOCK=block, num_warps=2)
    return picked


def sort_by_latent(indices_N: Tensor, offsets_R1: Tensor, F: int) -> tuple[Tensor, Tensor]:
    """Return the places of the entries in order of latents, int32 [N], padding last, and where each latent's
    begin, int32 [F + 1]."""
    narrow = torch.int16 if F < 2**15 else torch.int32  # half the digits to sort by
    padding_N = torch.arange(len(indices_N), device=indices_N.device) >= offsets_R1[-1]
    sorted_N, order_N = indices_N.masked_fill(padding_N, F).to(narrow).sort(stable=True)
    return order_N.int(), torch.searchsorted(
        sorted_N, torch.arange(F + 1, dtype=narrow, device=indices_N.device), out_int32=True
    )


# --- sums over entries --------------------------------------------------------------------------------------

CHUNK = 128  # entries of a latent that one program takes


@triton.jit
def _sum_kernel(values_N, order_N, offsets_F1, sums_F, F, BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr):
    """Sum the values of some latents."""
    latents = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    begin = tl.load(offsets_F1 + latents, mask=latents < F, other=0)
    number = tl.load(offsets_F1 + latents + 1, mask=latents < F, other=0) - begin
    total = tl.zeros([BLOCK_F], tl.float32)
    for first in range(0, tl.max(number, 0), BLOCK_N):
        at = first + tl.arange(0, BLOCK_N)[None, :]
        there = at < number[:, None]
        place = tl.load(order_N + begin[:, None] + at, mask=there, other=0)
        total += tl.sum(tl.load(values_N + place, mask=there, other=0), 1)
    tl.store(sums_F + latents, total, mask=latents < F)


@triton.jit
def _decode_kernel(
    values_N,
    W_FD,
    indices_N,
    offsets_R1,
    out_RD,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum value times row of W over a bag, for a block of D."""
    bag = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    end = tl.load(offsets_R1 + bag + 1)
    total_D = tl.zeros([BLOCK_D], tl.float32)
    for first in range(tl.load(offsets_R1 + bag), end, BLOCK_N):
        at = first + tl.arange(0, BLOCK_N)
        values = tl.load(values_N + at, mask=at < end, other=0)
        latents = tl.load(indices_N + at, mask=at < end, other=0).to(tl.int64)
        W = tl.load(
            W_FD + latents[:, None] * D + d[None, :], mask=(at < end)[:, None] & (d < D)[None, :], other=0
        )
        total_D += tl.sum(values[:, None] * W, 0)
    tl.store(out_RD + bag * D + d, total_D, mask=d < D)


# The entries in order of latents are cut at each latent's beginning and at each multiple of CHUNK. So a
# latent that is active everywhere holds up no program, and what a program does, and in which order, depends
# on the data alone. Piece f < F is the first of latent f; piece F + q begins at place q CHUNK, if a latent
# lies across it. A second kernel adds a latent's pieces to its first.


@triton.jit
def _piece(piece, indices_N, order_N, offsets_F1, F, CHUNK: tl.constexpr):
    """Return the latent of a piece and the places in the order where it begins and ends; these are equal
    where there is nothing."""
    cut = tl.maximum(piece - F, 0) * CHUNK
    inside = (piece >= F) & (cut < tl.load(offsets_F1 + F))
    across = tl.load(indices_N + tl.load(order_N + cut, mask=inside, other=0), mask=inside, other=0)
    latent = tl.where(piece < F, piece, across)
    begin = tl.load(offsets_F1 + latent)
    end = tl.load(offsets_F1 + latent + 1)
    inside = inside & (begin < cut)
    begin = tl.where(piece < F, begin, cut)
    end = tl.minimum(end, (begin // CHUNK + 1) * CHUNK)
    return latent, begin, tl.where((piece < F) | inside, end, begin)


@triton.jit
def _by_latent_kernel(
    rows_RD,
    values_N,
    W_FD,
    indices_N,
    bags_N,
    order_N,
    offsets_F1,
    d_values_N,
    pieces_D,
    F,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """For the entries of a piece: the products of their bags' rows with the latent's row of W, and the sum of
    value times row."""
    piece = tl.program_id(0)
    latent, begin, end = _piece(piece, indices_N, order_N, offsets_F1, F, CHUNK)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total_D = tl.zeros([BLOCK_D], tl.float32)
    if W_FD is not None:
        W_D = tl.load(W_FD + latent.to(tl.int64) * D + d, mask=d < tl.where(begin < end, D, 0), other=0)
    for first in range(begin, end, BLOCK_N):
        at = first + tl.arange(0, BLOCK_N)
        place = tl.load(order_N + at, mask=at < end, other=0)
        bags = tl.load(bags_N + place, mask=at < end, other=0).to(tl.int64)
        rows = tl.load(
            rows_RD + bags[:, None] * D + d[None, :], mask=(at < end)[:, None] & (d < D)[None, :], other=0
        )
        if W_FD is not None:
            tl.store(d_values_N + place, tl.sum(rows * W_D[None, :], 1), mask=at < end)
        if pieces_D is not None:
            total_D += tl.sum(tl.load(values_N + place, mask=at < end, other=0)[:, None] * rows, 0)
    if pieces_D is not None:
        tl.store(
            pieces_D + piece.to(tl.int64) * D + d,
            total_D,
            mask=d < tl.where((piece < F) | (begin < end), D, 0),
        )


@triton.jit
def _join_kernel(
    indices_N, order_N, offsets_F1, pieces_D, F, D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Add a latent's later pieces to its first; the program of the second does so."""
    piece = F + tl.program_id(0)
    latent, begin, end = _piece(piece, indices_N, order_N, offsets_F1, F, CHUNK)
    if (begin < end) & (tl.load(offsets_F1 + latent) >= begin - CHUNK):
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        total_D = tl.load(pieces_D + latent.to(tl.int64) * D + d, mask=d < D, other=0)
        for cut in range(begin, tl.load(offsets_F1 + latent + 1), CHUNK):
            total_D += tl.load(pieces_D + tl.cast(F + cut // CHUNK, tl.int64) * D + d, mask=d < D, other=0)
        tl.store(pieces_D + latent.to(tl.int64) * D + d, total_D, mask=d < D)


def _floats(**tensors: Tensor) -> None:
    for name, t in tensors.items():
        assert t.is_contiguous() and t.dtype == torch.float32, f"{name}: not contiguous or not float32"


def _tile(D: int, most: int) -> dict[str, int]:
    """Blocks of entries by blocks of D, 4096 elements together where D has no more."""
    block = min(next_power_of_2(D), most)
    return {
        "BLOCK_D": block,
        "BLOCK_N": min(max(4096 // block, 1), 32),
        "num_warps": 4 if block <= 2048 else 8,
    }


def sum_by_latent(values_N: Tensor, e: SparsePattern) -> Tensor:
    """Return the sum of each latent's values, [F]."""
    _floats(values_N=values_N)
    sums_F = values_N.new_empty(e.F)
    _sum_kernel[(cdiv(e.F, 16),)](values_N, *e.by_latent(sort_by_latent), sums_F, e.F, BLOCK_F=16, BLOCK_N=64)
    return sums_F


def decode(values_N: Tensor, W_FD: Tensor, e: SparsePattern) -> Tensor:
    """Sum by bag: value times the latent's row of W, [R, D]."""
    _floats(values_N=values_N, W_FD=W_FD)
    D = W_FD.shape[1]
    out_RD, tile = W_FD.new_empty(e.R, D), _tile(D, 1024)
    _decode_kernel[(e.R, cdiv(D, tile["BLOCK_D"]))](
        values_N, W_FD, e.indices_N, e.offsets_R1, out_RD, D=D, **tile
    )
    return out_RD


def _by_latent(
    rows_RD: Tensor, values_N: Tensor, W_FD: Tensor | None, e: SparsePattern, weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """By latent: the products of its bags' rows with its row of W, [N], and the sum of value times row, [F,
    D]; each if wanted."""
    (order_N, offsets_F1), N, D = e.by_latent(sort_by_latent), len(values_N), rows_RD.shape[1]
    tile = _tile(D, 1024 if W_FD is None else next_power_of_2(D))
    cuts, blocks = cdiv(N, CHUNK), cdiv(D, tile["BLOCK_D"])
    d_values_N = None if W_FD is None else torch.zeros_like(values_N)
    pieces_D = rows_RD.new_empty(e.F + cuts, D) if weight else None
    where = (e.indices_N, e.bags_N, order_N, offsets_F1)
    _by_latent_kernel[(e.F + cuts, blocks)](
        rows_RD, values_N, W_FD, *where, d_values_N, pieces_D, e.F, D=D, CHUNK=CHUNK, **tile
    )
    if pieces_D is None:
        return d_values_N, None
    _join_kernel[(cuts, blocks)](
        e.indices_N, order_N, offsets_F1, pieces_D, e.F, D=D, CHUNK=CHUNK, BLOCK_D=tile["BLOCK_D"]
    )
    return d_values_N, pieces_D[: e.F]


def decode_backward(
    g_RD: Tensor, values_N: Tensor, W_FD: Tensor, e: SparsePattern, weight: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of `decode` with respect to its values, [N], and, where asked for, to W, [F,
    D]."""
    _floats(g_RD=g_RD, values_N=values_N, W_FD=W_FD)
    d_values_N, d_W_FD = _by_latent(g_RD, values_N, W_FD, e, weight)
    assert d_values_N is not None
    return d_values_N, d_W_FD


def encode_backward(g_N: Tensor, x_BD: Tensor, e: SparsePattern) -> tuple[Tensor, Tensor]:
    """Return the gradients of the entries' pre-activations x W_enc^T + b_enc with respect to W_enc, [F, D],
    and b_enc, [F]. Bags are tokens."""
    _floats(g_N=g_N, x_BD=x_BD)
    d_W_FD = _by_latent(x_BD, g_N, None, e, True)[1]
    assert d_W_FD is not None
    return d_W_FD, sum_by_latent(g_N, e)


# --- the dense layout ---------------------------------------------------------------------------------------


@triton.jit
def _split_kernel(
    pre_BF, threshold, values_BF, mask_BF, F: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr
):
    """Write a block of a row where it is above the threshold, and where that is."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x, there = _in_row(pre_BF, None, row, cols, F)
    over = _over(x, there, cols, threshold, EACH)
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
    _bits(pre_BF)
    _floats(values_BF=values_BF)
    (B, F), threshold, block = pre_BF.shape, _there(threshold, pre_BF), _block(2048, 1, 2048, pre_BF.shape[1])
    mask = mask_BF.view(torch.uint8)
    _split_kernel[(B, cdiv(F, block))](
        pre_BF, threshold, values_BF, mask, F=F, EACH=threshold.ndim, BLOCK=block
    )
    return values_BF.sum(0), mask_BF.sum(0, dtype=torch.float32)


def masked_copy(mask_BF: Tensor, x_BF: Tensor, out_BF: Tensor, add_F: Tensor | None = None) -> Tensor:
    """Write x, plus a number of each latent, where the mask is set and zero elsewhere; returns the sums, [F].
    x may have any strides."""
    _floats(out_BF=out_BF)
    assert mask_BF.is_contiguous() and x_BF.dtype == torch.float32, (
        "mask_BF: not contiguous, or x_BF: not float32"
    )
    (B, F), block = out_BF.shape, _block(512, 1, 512, out_BF.shape[1])
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


# --- the update ---------------------------------------------------------------------------------------------
#
# One launch for all SAEs: their parameters stand one behind the other, their gradients where autograd left
# them. R rows of C numbers.


@triton.jit
def _addresses_kernel(table, g0, g1, g2, g3, g4, g5, g6, g7):
    """Note where tensors stand.

    A launch is part of a captured graph; a copy from the host would be read again at each replay.
    """
    tl.store(table + 0, g0.to(tl.int64))
    tl.store(table + 1, g1.to(tl.int64))
    tl.store(table + 2, g2.to(tl.int64))
    tl.store(table + 3, g3.to(tl.int64))
    tl.store(table + 4, g4.to(tl.int64))
    tl.store(table + 5, g5.to(tl.int64))
    tl.store(table + 6, g6.to(tl.int64))
    tl.store(table + 7, g7.to(tl.int64))


@triton.jit
def _elements(n: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return where the elements of some rows stand, of n in all, and which there are."""
    at = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None] * C + tl.arange(0, BLOCK_C)[None, :]
    return at, (tl.arange(0, BLOCK_C) < C)[None, :] & (at < n)


@triton.jit
def _gradient(table, s, at, there, p, CONSTRAINT: tl.constexpr, ALIGNED: tl.constexpr):
    """Return some rows of an SAE's gradient, without its part along the rows of p."""
    address = tl.load(table + s).to(tl.pointer_type(tl.float32))
    g = tl.load(tl.multiple_of(address, ALIGNED) + at, mask=there, other=0)
    if CONSTRAINT != "free":
        norm = tl.sqrt(tl.sum(p * p, 1))
        if CONSTRAINT == "project":
            norm += 1e-6
        g -= (tl.sum(g * p, 1) / norm / norm)[:, None] * p
    return g


@triton.jit
def _square_norms_kernel(
    p,
    table,
    parts_SP,
    n: tl.constexpr,
    C: tl.constexpr,
    CONSTRAINT: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum the squares of the gradient over some rows."""
    s = tl.program_id(1).to(tl.int64)
    at, there = _elements(n, C, ROWS, BLOCK_C)
    p_RC = tl.load(p + s * n + at, mask=there, other=0)
    g_RC = _gradient(table, s, at, there, p_RC, CONSTRAINT, ALIGNED)
    part = tl.sum(tl.sum(tl.where(there, g_RC * g_RC, 0.0), 1), 0)
    tl.store(parts_SP + s * tl.num_programs(0) + tl.program_id(0), part)


@triton.jit
def _bias(steps, BETA: tl.constexpr):
    """1 - beta^steps; in float64, as little is left where beta is near 1."""
    return (1.0 - tl.exp(steps.to(tl.float64) * tl.log(tl.full([], BETA, tl.float64)))).to(tl.float32)


@triton.jit
def _update_kernel(
    p,
    table,
    m,
    v,
    bf16_copy,
    lr_S,
    scale_S,
    steps_S,
    n: tl.constexpr,
    C: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    CONSTRAINT: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Update some rows of an SAE."""
    s = tl.program_id(1).to(tl.int64)
    scale = tl.load(scale_S + s)
    if tl.abs(scale) < float("inf"):
        at, there = _elements(n, C, ROWS, BLOCK_C)
        here = s * n + at
        p_RC = tl.load(p + here, mask=there, other=0)
        g_RC = _gradient(table, s, at, there, p_RC, CONSTRAINT, ALIGNED) * scale
        v_RC = tl.load(v + here, mask=there, other=0) * BETA2 + g_RC * g_RC * (1 - BETA2)
        tl.store(v + here, v_RC, mask=there)
        steps, lr = tl.load(steps_S + s), tl.load(lr_S + s)
        if m is not None:
            m_RC = tl.load(m + here, mask=there, other=0)
            g_RC = m_RC + (g_RC - m_RC) * (1 - BETA1)
            tl.store(m + here, g_RC, mask=there)
            lr = lr / _bias(steps, BETA1)
        p_RC -= lr * g_RC / (tl.sqrt(v_RC) / tl.sqrt(_bias(steps, BETA2)) + EPS)
        if CONSTRAINT != "free":
            norm = tl.sqrt(tl.sum(p_RC * p_RC, 1))
            if CONSTRAINT == "project":
                norm += 1.1920929e-07
            p_RC = p_RC / norm[:, None]
        tl.store(p + here, p_RC, mask=there)
        if bf16_copy is not None:
            tl.store(bf16_copy + here, p_RC.to(tl.bfloat16), mask=there)


def _addresses(grads: Sequence[Tensor]) -> Tensor:
    """Return where each tensor stands, int64 [S] and some more, on their device."""
    table = torch.empty(8 * cdiv(len(grads), 8), dtype=torch.int64, device=grads[0].device)
    for first in range(0, len(grads), 8):
        eight = (list(grads[first : first + 8]) + [grads[0]] * 7)[:8]
        _addresses_kernel[(1,)](table[first:], *eight, num_warps=1)
    return table


def _shape(n: int, C: int, constraint: Constraint) -> dict[str, Any]:
    """How programs share n elements: whole rows of C to each, or any pieces where there is no constraint on
    rows."""
    C = min(next_power_of_2(n), 2048) if constraint == "free" else C
    block = next_power_of_2(C)
    rows = min(max(2048 // block, 1), next_power_of_2(cdiv(n, C)))
    return {
        "n": n,
        "C": C,
        "CONSTRAINT": constraint,
        "ROWS": rows,
        "BLOCK_C": block,
        "num_warps": _warps(rows * block),
    }


def _rows(
    p: Tensor, grads: Sequence[Tensor], constraint: Constraint
) -> tuple[Tensor, tuple[int, int], dict[str, Any]]:
    """Return the gradients' addresses, the grid, and what else both kernels are told."""
    _floats(p=p, **{f"grads[{s}]": g for s, g in enumerate(grads)})
    assert len(grads) == len(p) and all(g.shape == p.shape[1:] for g in grads), (
        "grads: not one of each SAE, of its shape"
    )
    n = p[0].numel()
    shape = _shape(n, p.shape[-1], constraint)
    aligned = 16 if all(g.data_ptr() % 16 == 0 for g in grads) else 4
    return _addresses(grads), (cdiv(cdiv(n, shape["C"]), shape["ROWS"]), len(p)), {"ALIGNED": aligned} | shape


def square_norms(p: Tensor, grads: Sequence[Tensor], constraint: Constraint) -> Tensor:
    """Return each SAE's squared norm of the gradient that `update` will use, [S].

    `p` is [S, ..], gradients one of each SAE.
    """
    table, grid, meta = _rows(p, grads, constraint)
    parts_SP = p.new_empty(grid[::-1])
    _square_norms_kernel[grid](p, table, parts_SP, **meta)
    return parts_SP.sum(1)


def update(
    p: Tensor, grads: Sequence[Tensor], m: Tensor | None, v: Tensor, bf16_copy: Tensor | None, adam: AdamStep
) -> None:
    """Project, scale (clip), Adam, renormalize, and write a bfloat16 copy: one parameter of S SAEs of one
    shape, in place.

    `steps_S` counts this step too. An SAE whose scale is not finite stays as it is. Without `m` (beta1 = 0)
    the first moment is the gradient itself. Gradients are only read.
    """
    _floats(v=v, lr_S=adam.lr_S, scale_S=adam.scale_S, **({} if m is None else {"m": m}))
    assert bf16_copy is None or (bf16_copy.is_contiguous() and bf16_copy.dtype == torch.bfloat16), (
        "bf16_copy: not contiguous or not bfloat16"
    )
    table, grid, meta = _rows(p, grads, adam.constraint)
    per_sae = (adam.lr_S, adam.scale_S, adam.steps_S)
    _update_kernel[grid](
        p, table, m, v, bf16_copy, *per_sae, BETA1=adam.betas[0], BETA2=adam.betas[1], EPS=adam.eps, **meta
    )


# --- ahead of time ------------------------------------------------------------------------------------------

_TYPES = {
    "*u8": "among_F mask_BF",
    "*i32": "offsets_B1 shares_BM lists_BC counts_P256 greater_B equal_B numbers_B indices_N bags_N order_N "
    "offsets_F1 offsets_R1",
    "*i64": "table",
    "*bf16": "bf16_copy",
    "*fp32": "bounds_B values_N values_BF x_BF out_BF parts_PF W_FD rows_RD out_RD d_values_N pieces_D "
    "sums_F add_F "
    "p m v parts_SP lr_S scale_S steps_S g0 g1 g2 g3 g4 g5 g6 g7",
    "i32": "n B F limit stride_B",
}


class Variant(NamedTuple):
    """Return a kernel with what it is compiled for: the type of each argument and the constants, `num_warps`
    beside them."""

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int


def variants(D: int = 512, F: int = 16384, k: int = 80) -> list[Variant]:
    """Every kernel as the functions above launch it at one size."""
    types = {name: kind for kind, names in _TYPES.items() for name in names.split()}
    found = []

    def add(kernel: Any, pre: str = "*bf16", num_warps: int = 4, **constexprs: Any) -> None:
        of = (
            types
            | dict.fromkeys(("pre_BF", "maxima_BM", "coarse_BM", "threshold"), pre)
            | dict.fromkeys(constexprs, "constexpr")
        )
        found.append(Variant(kernel, {name: of[name] for name in kernel.arg_names}, constexprs, num_warps))

    M, C = _sizes(F, k)
    coarse = _block(4 * k, 128, 8192, F)
    row: dict[str, Any] = {"F": F, "M": M, "num_warps": _warps(M)}
    some: dict[str, Any] = {"BLOCK": min(M, 256), "num_warps": 2}
    for pre, bits, each in (("*bf16", 16, 0), ("*fp32", 32, 1)):
        pick: dict[str, Any] = {"F": F, "C": C, "BITS": bits}
        add(_bound_rows_kernel, pre, BITS=bits, **row)
        add(_list_kernel, pre, F=F, C=C, M=M, **some)
        add(_pick_kernel, pre, counts_P256=None, **pick, num_warps=_warps(C))
        add(_maxima_kernel, pre, COARSE=coarse, **row)
        add(_histogram_kernel, pre, lists_BC=None, F=coarse, C=0, BITS=16, PASS=0, BLOCK=min(coarse, 1024))
        add(_bound_batch_kernel, pre, M=M, num_warps=_warps(M))
        add(_histogram_kernel, pre, PASS=bits // 8 - 1, BLOCK=min(C, 1024), **pick)
        add(_count_kernel, pre, BLOCK=min(C, 1024), **pick)
        add(_pick_kernel, pre, among_F=None, **pick, num_warps=_warps(C))
        add(_count_above_kernel, pre, EACH=each, **row)
        add(_above_kernel, pre, EACH=each, **row | some)
        add(_split_kernel, pre, F=F, EACH=each, BLOCK=_block(2048, 1, 2048, F))
    rows: dict[str, Any] = {"STRIDE_F": 1, "F": F, "ROWS": 32, "BLOCK": _block(512, 1, 512, F)}
    add(_select_kernel, **rows)
    add(_select_kernel, add_F=None, **rows)
    add(_bound_rows_kernel, among_F=None, BITS=16, **row)
    add(_list_kernel, among_F=None, F=F, C=C, M=M, **some)
    add(_starts_kernel, BLOCK=1024)
    add(_starts_kernel, equal_B=None, BLOCK=1024)
    add(_sum_kernel, BLOCK_F=16, BLOCK_N=64)
    whole: dict[str, Any] = _tile(D, next_power_of_2(D))
    part: dict[str, Any] = _tile(D, 1024)
    add(_decode_kernel, D=D, **part)
    add(_by_latent_kernel, D=D, CHUNK=CHUNK, **whole)
    add(_by_latent_kernel, D=D, CHUNK=CHUNK, pieces_D=None, **whole)
    add(_by_latent_kernel, D=D, CHUNK=CHUNK, W_FD=None, d_values_N=None, **part)
    add(_join_kernel, D=D, CHUNK=CHUNK, BLOCK_D=whole["BLOCK_D"])
    add(_addresses_kernel, num_warps=1)
    constraints: tuple[Constraint, ...] = ("project", "constrain", "free")
    adam: dict[str, Any] = {"BETA1": 0.9, "BETA2": 0.999, "EPS": 1e-8}
    for constraint in constraints:
        shape = {"ALIGNED": 16} | _shape(F * D, D, constraint)
        add(_square_norms_kernel, **shape)
        add(_update_kernel, **shape, **adam)
    add(_update_kernel, m=None, bf16_copy=None, **shape, **adam)
    return found
