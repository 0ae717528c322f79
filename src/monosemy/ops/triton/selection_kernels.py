"""The kernels of `top_k`, `batch_top_k`, `above` and `count_above`.

To choose the k largest of a row, its latents are dealt out to M shares: latent f belongs to share f % M. The
k-th largest of the shares' maxima is a bound that at least k values reach and, as M is several times k, few
more; and it is reached in few shares. Those are noted, what reaches the bound in them is listed, and the
exact choice looks at the list alone. So a row is read once, and then a small part of it again. If its list
overflows, the row itself is searched: the bound decides about speed, never about the result.

The n largest of a batch are found alike, with one bound for all rows, by histograms; and what is above a
threshold by shares, too. Shares and lists of a row are stored as how many there are, then which, ascending.

B tokens, F latents, N entries (capacity), M shares of a row, C places in a row's list, P digits of a key.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
def load_row(pre_BF, among_F, row, cols, F: tl.constexpr):
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
            x, allowed = load_row(pre_BF, among_F, row, first + tl.arange(0, BLOCK), F)
            number += tl.sum((allowed & (_keys(x, BITS) >= (key | bit))).to(tl.int32), 0)
        key = tl.where(number >= k, key | bit, key)
        bit = bit >> 1
    return key


@triton.jit
def _maxima(pre_BF, among_F, row, F: tl.constexpr, M: tl.constexpr):
    """Return the largest of each share of a row; a NaN where there is one."""
    largest_M = tl.full([M], float("-inf"), tl.float32)
    for first in range(0, F, M):
        x, _ = load_row(pre_BF, among_F, row, first + tl.arange(0, M), F)
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
    x, allowed = load_row(pre_BF, among_F, row, cols, F)
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
def bound_rows_kernel(
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
def maxima_kernel(pre_BF, maxima_BM, coarse_BM, F: tl.constexpr, M: tl.constexpr, COARSE: tl.constexpr):
    """Return the largest of each share of a token's latents, and of fewer shares."""
    row = tl.program_id(0).to(tl.int64)
    largest_M = _maxima(pre_BF, None, row, F, M)
    tl.store(maxima_BM + row * M + tl.arange(0, M), largest_M.to(maxima_BM.dtype.element_ty))
    coarse_M = tl.max(tl.reshape(largest_M, [M // COARSE, COARSE]), 0)
    tl.store(coarse_BM + row * COARSE + tl.arange(0, COARSE), coarse_M.to(coarse_BM.dtype.element_ty))


@triton.jit
def bound_batch_kernel(maxima_BM, counts_P256, n, bounds_B, shares_BM, M: tl.constexpr):
    """Return the bound for the n largest of the batch, and the shares of a token that reach it."""
    row = tl.program_id(0)
    bound = _least(_digits(counts_P256, n, 2), 16)
    tl.store(bounds_B + row, bound)
    largest_M, _ = load_row(maxima_BM, None, row, tl.arange(0, M), M)
    _note(~(largest_M < bound), row, shares_BM, M)


@triton.jit
def list_kernel(
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
    x, there = load_row(pre_BF, among_F, row, latents, F)
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
def histogram_kernel(
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
def count_kernel(
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
def starts_kernel(greater_B, equal_B, offsets_B1, B, limit, BLOCK: tl.constexpr):
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
def pick_kernel(
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
def is_above(x, allowed, cols, threshold, EACH: tl.constexpr):
    """Return which values are above the threshold."""
    limit = tl.load(threshold + cols, mask=allowed, other=0) if EACH else tl.load(threshold)
    return allowed & (x > limit.to(tl.float32))


@triton.jit
def count_above_kernel(
    pre_BF, threshold, numbers_B, shares_BM, F: tl.constexpr, M: tl.constexpr, EACH: tl.constexpr
):
    """Count what of a token is above the threshold, and note the shares that it is in."""
    row = tl.program_id(0)
    numbers_M = tl.zeros([M], tl.int32)
    for first in range(0, F, M):
        cols = first + tl.arange(0, M)
        x, allowed = load_row(pre_BF, None, row, cols, F)
        numbers_M += is_above(x, allowed, cols, threshold, EACH).to(tl.int32)
    tl.store(numbers_B + row, tl.sum(numbers_M, 0))
    _note(numbers_M > 0, row, shares_BM, M)


@triton.jit
def above_kernel(
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
            over = is_above(x, allowed, cols, threshold, EACH)
            places = place + tl.cumsum(over.to(tl.int32), 0) - 1
            tl.store(indices_N + places, cols, mask=over & (places < end))
            tl.store(values_N + places, x, mask=over & (places < end))
            place += tl.sum(over.to(tl.int32), 0)
