"""Sums over entries: decoding, its gradients and those of the encoder, in bags of tokens or by latent.

D d_in, F latents, N entries (capacity), R bags.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2

from monosemy.ops.pattern import Constraint, RowNorms, SparsePattern
from monosemy.ops.triton.launch import require_float32, require_floats

CHUNK = 128  # entries of a latent that one program takes


@triton.jit
def _sum_kernel(
    values_N,
    order_N,
    offsets_F1,
    sums_F,
    F,
    COUNT: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sum the values of some latents, or count the positive ones."""
    latents = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    begin = tl.load(offsets_F1 + latents, mask=latents < F, other=0)
    number = tl.load(offsets_F1 + latents + 1, mask=latents < F, other=0) - begin
    total = tl.zeros([BLOCK_F], tl.float32)
    for first in range(0, tl.max(number, 0), BLOCK_N):
        at = first + tl.arange(0, BLOCK_N)[None, :]
        there = at < number[:, None]
        place = tl.load(order_N + begin[:, None] + at, mask=there, other=0)
        values = tl.load(values_N + place, mask=there, other=0)
        if COUNT:
            values = (values > 0).to(tl.float32)
        total += tl.sum(values, 1)
    tl.store(sums_F + latents, total, mask=latents < F)


@triton.jit
def _smallest_kernel(values_N, offsets_R1, least_R, BLOCK: tl.constexpr):
    """Find the smallest positive value of a bag."""
    bag = tl.program_id(0)
    end = tl.load(offsets_R1 + bag + 1)
    least = tl.full([BLOCK], float("inf"), tl.float32)
    for first in range(tl.load(offsets_R1 + bag), end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        values = tl.load(values_N + at, mask=at < end, other=0)
        least = tl.minimum(least, tl.where(values > 0, values, float("inf")))
    tl.store(least_R + bag, tl.min(least, 0))


@triton.jit
def _bags_kernel(offsets_R1, bags_N, R, N, BLOCK: tl.constexpr):
    """Write the bag of each of its entries; programs after those of the bags write the last one to a block of
    the padding."""
    program = tl.program_id(0)
    bag = tl.minimum(program, R - 1)
    begin, end = tl.load(offsets_R1 + bag), tl.load(offsets_R1 + bag + 1)
    if program >= R:
        begin, end = tl.maximum((program - R) * BLOCK, end), tl.minimum((program - R + 1) * BLOCK, N)
    for first in range(begin, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        tl.store(bags_N + at, bag, mask=at < end)


@triton.jit
def _sort_keys_kernel(indices_N, offsets_R1, keys_N, R, N, F, BLOCK: tl.constexpr):
    """Write what entries are sorted by: the latent, and F for padding."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    latents = tl.load(indices_N + at, mask=at < N, other=0)
    keys = tl.where(at < tl.load(offsets_R1 + R), latents, F)
    tl.store(keys_N + at, keys.to(keys_N.dtype.element_ty), mask=at < N)


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
        total_D += tl.sum(values[:, None] * W.to(tl.float32), 0)
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
def _store_squares(total_D, p_FD, squares, latent, d, filled, F, D: tl.constexpr):
    """Write the norm of a block of a latent's row; with p the sums of squares and of products that the norm
    of what the update takes is made of. 0 of a row that is not filled."""
    at = squares + latent.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    square = tl.sum(total_D * total_D, 0)
    if p_FD is None:
        tl.store(at, tl.sqrt(square))
    else:
        p_D = tl.load(p_FD + latent.to(tl.int64) * D + d, mask=d < filled, other=0)
        number = F * tl.num_programs(1)
        tl.store(at, square)
        tl.store(at + number, tl.sum(total_D * p_D, 0))
        tl.store(at + 2 * number, tl.sum(p_D * p_D, 0))


@triton.jit
def _norms_kernel(
    squares_3FK,
    norms_F,
    F,
    K: tl.constexpr,
    CONSTRAINT: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute the norms of rows without their part along p from what `_store_squares` wrote."""
    latents = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    k = tl.arange(0, BLOCK_K)
    at = squares_3FK + latents[:, None] * K + k[None, :]
    there = (latents < F)[:, None] & (k < K)[None, :]
    square = tl.sum(tl.load(at, mask=there, other=0), 1)
    product = tl.sum(tl.load(at + F * K, mask=there, other=0), 1)
    of_p = tl.sum(tl.load(at + 2 * F * K, mask=there, other=0), 1)
    norm = tl.sqrt(of_p)
    if CONSTRAINT == "project":
        norm += 1e-6
    along = tl.where(product != 0, product / norm / norm, 0.0)
    square += along * (along * of_p - 2 * product)
    # rounding may leave less than nothing; what is not a number stays
    tl.store(norms_F + latents, tl.sqrt(tl.where(square > 0, square, square * 0)), mask=latents < F)


@triton.jit
def _dots_kernel(
    rows_RD,
    W_FD,
    indices_N,
    offsets_R1,
    dots_N,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """For the entries of a bag: the products of its row with the latents' rows of W."""
    bag = tl.program_id(0).to(tl.int64)
    end = tl.load(offsets_R1 + bag + 1)
    for first in range(tl.load(offsets_R1 + bag), end, BLOCK_N):
        at = first + tl.arange(0, BLOCK_N)
        latents = tl.load(indices_N + at, mask=at < end, other=0).to(tl.int64)
        total_N = tl.zeros([BLOCK_N], tl.float32)
        for begin in range(0, D, BLOCK_D):
            d = begin + tl.arange(0, BLOCK_D)
            row_D = tl.load(rows_RD + bag * D + d, mask=d < D, other=0).to(tl.float32)
            W = tl.load(
                W_FD + latents[:, None] * D + d[None, :], mask=(at < end)[:, None] & (d < D)[None, :], other=0
            )
            total_N += tl.sum(W.to(tl.float32) * row_D[None, :], 1)
        tl.store(dots_N + at, total_N, mask=at < end)


@triton.jit
def _by_latent_kernel(
    rows_RD,
    values_N,
    indices_N,
    bags_N,
    order_N,
    offsets_F1,
    out_FD,
    rest_D,
    p_FD,
    squares,
    F,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum value times their bags' rows over the entries of a piece, for a block of D, and take the sum's
    norm."""
    piece = tl.program_id(0)
    _, begin, end = _piece(piece, indices_N, order_N, offsets_F1, F, CHUNK)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total_D = tl.zeros([BLOCK_D], tl.float32)
    for first in range(begin, end, BLOCK_N):
        at = first + tl.arange(0, BLOCK_N)
        place = tl.load(order_N + at, mask=at < end, other=0)
        values = tl.load(values_N + place, mask=at < end, other=0)
        bags = tl.load(bags_N + at, mask=at < end, other=0).to(tl.int64)
        rows = tl.load(
            rows_RD + bags[:, None] * D + d[None, :], mask=(at < end)[:, None] & (d < D)[None, :], other=0
        )
        total_D += tl.sum(values[:, None] * rows.to(tl.float32), 0)
    filled = tl.where(begin < end, D, 0)
    if piece < F:
        here = out_FD + piece.to(tl.int64) * D + d
        if ADD:
            total_D += tl.load(here, mask=d < filled, other=0)
            tl.store(here, total_D, mask=d < filled)
        else:
            tl.store(here, total_D, mask=d < D)
        if squares is not None:
            _store_squares(total_D, p_FD, squares, piece, d, filled, F, D)
    else:
        tl.store(rest_D + (piece - F).to(tl.int64) * D + d, total_D, mask=d < filled)


@triton.jit
def _join_kernel(
    indices_N,
    order_N,
    offsets_F1,
    out_FD,
    rest_D,
    p_FD,
    squares,
    F,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add a latent's later pieces to its first, and take the norm of all; the program of the second does
    so."""
    piece = F + tl.program_id(0)
    latent, begin, end = _piece(piece, indices_N, order_N, offsets_F1, F, CHUNK)
    if (begin < end) & (tl.load(offsets_F1 + latent) >= begin - CHUNK):
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        total_D = tl.load(out_FD + latent.to(tl.int64) * D + d, mask=d < D, other=0)
        for cut in range(begin, tl.load(offsets_F1 + latent + 1), CHUNK):
            total_D += tl.load(rest_D + tl.cast(cut // CHUNK, tl.int64) * D + d, mask=d < D, other=0)
        tl.store(out_FD + latent.to(tl.int64) * D + d, total_D, mask=d < D)
        if squares is not None:
            _store_squares(total_D, p_FD, squares, latent, d, D, F, D)


def _tile(D: int, dtype: torch.dtype, *, by_bag: bool = False) -> dict[str, int]:
    """Blocks of entries by blocks of D, and warps.

    A row in bfloat16 is read by one warp, so that none has to add up what others read; measured on an H200.
    """
    block = next_power_of_2(D)
    if dtype == torch.bfloat16:
        return {"BLOCK_D": min(block, 256 if by_bag else 512), "BLOCK_N": 8 if by_bag else 4, "num_warps": 1}
    block = min(block, 1024)
    return {"BLOCK_D": block, "BLOCK_N": min(max(4096 // block, 1), 32), "num_warps": 4}


def sort_by_latent(indices_N: Tensor, offsets_R1: Tensor, F: int) -> tuple[Tensor, Tensor]:
    """Return the places of the entries in order of latents, int32 [N], padding last, and where each latent's
    begin, int32 [F + 1]."""
    narrow = torch.int16 if F < 2**15 else torch.int32  # half the digits to sort by
    N, keys_N = len(indices_N), torch.empty_like(indices_N, dtype=narrow)
    if N:
        _sort_keys_kernel[(cdiv(N, 1024),)](
            indices_N, offsets_R1, keys_N, len(offsets_R1) - 1, N, F, BLOCK=1024
        )
    sorted_N, order_N = keys_N.sort(stable=True)
    return order_N.int(), torch.searchsorted(
        sorted_N, torch.arange(F + 1, dtype=narrow, device=indices_N.device), out_int32=True
    )


def sum_by_latent(values_N: Tensor, e: SparsePattern) -> Tensor:
    """Return the sum of each latent's values, [F]."""
    return _sums(values_N, e, count=False)


def count_by_latent(values_N: Tensor, e: SparsePattern) -> Tensor:
    """Count each latent's positive values, float32 [F]."""
    return _sums(values_N, e, count=True)


def _sums(values_N: Tensor, e: SparsePattern, *, count: bool) -> Tensor:
    require_float32(values_N=values_N)
    sums_F, by_latent = values_N.new_empty(e.F), e.by_latent(sort_by_latent)
    _sum_kernel[(cdiv(e.F, 16),)](values_N, *by_latent, sums_F, e.F, COUNT=count, BLOCK_F=16, BLOCK_N=64)
    return sums_F


def smallest(values_N: Tensor, e: SparsePattern) -> Tensor:
    """Return the smallest positive value of each bag, [R]; infinity where it has none."""
    require_float32(values_N=values_N)
    least_R = values_N.new_empty(e.R)
    _smallest_kernel[(e.R,)](values_N, e.offsets_R1, least_R, BLOCK=128)
    return least_R


def _bags(e: SparsePattern) -> Tensor:
    """Return the bag of each entry, int32 [N], of padding the last; made once."""
    if "bags_N" not in e.__dict__:  # where the cached property keeps it
        N, block = len(e.indices_N), 1024
        e.bags_N = torch.empty_like(e.indices_N)
        _bags_kernel[(e.R + cdiv(N, block),)](e.offsets_R1, e.bags_N, e.R, N, BLOCK=block)
    return e.bags_N


def _bags_by_latent(e: SparsePattern) -> Tensor:
    """Return the bag of each entry in order of latents, int32 [N]; made once."""
    if "bags_by_latent_N" not in e.__dict__:
        e.__dict__["bags_by_latent_N"] = _bags(e)[e.by_latent(sort_by_latent)[0]]
    return e.__dict__["bags_by_latent_N"]


@triton.jit
def _mean_of_finite_kernel(values_B, mean, B, BLOCK: tl.constexpr):
    """Take the mean of what is below infinity."""
    total = tl.zeros([BLOCK], tl.float32)
    number = tl.zeros([BLOCK], tl.float32)
    for first in range(0, B, BLOCK):
        at = first + tl.arange(0, BLOCK)
        value = tl.load(values_B + at, mask=at < B, other=float("inf"))
        total += tl.where(value < float("inf"), value, 0.0)
        number += (value < float("inf")).to(tl.float32)
    tl.store(mean, tl.sum(total, 0) / tl.sum(number, 0))


def mean_of_finite(values_B: Tensor) -> Tensor:
    """Return the mean of what is below infinity; NaN where nothing is."""
    require_float32(values_B=values_B)
    mean = values_B.new_empty(())
    _mean_of_finite_kernel[(1,)](values_B, mean, len(values_B), BLOCK=2048)
    return mean


def decode(values_N: Tensor, W_FD: Tensor, e: SparsePattern) -> Tensor:
    """Sum by bag: value times the latent's row of W, [R, D]."""
    require_float32(values_N=values_N)
    require_floats(W_FD=W_FD)
    D = W_FD.shape[1]
    out_RD, tile = values_N.new_empty(e.R, D), _tile(D, W_FD.dtype, by_bag=True)
    _decode_kernel[(e.R, cdiv(D, tile["BLOCK_D"]))](
        values_N, W_FD, e.indices_N, e.offsets_R1, out_RD, D=D, **tile
    )
    return out_RD


def _dots(rows_RD: Tensor, W_FD: Tensor, e: SparsePattern) -> Tensor:
    """Return the product of each entry's bag's row with its latent's row of W, float32 [N]; 0 of padding."""
    D, dots_N = W_FD.shape[1], torch.zeros_like(e.indices_N, dtype=torch.float32)
    tile = _tile(D, rows_RD.dtype)
    _dots_kernel[(e.R,)](rows_RD, W_FD, e.indices_N, e.offsets_R1, dots_N, D=D, **tile)
    return dots_N


def _by_latent(
    rows_RD: Tensor,
    values_N: Tensor,
    e: SparsePattern,
    into_FD: Tensor | None = None,
    norms: RowNorms | None = None,
) -> Tensor:
    """Sum value times its bag's row by latent, [F, D], or add it to an array; leave the norms in `norms`."""
    (order_N, offsets_F1), N, D = e.by_latent(sort_by_latent), len(values_N), rows_RD.shape[1]
    tile = _tile(D, rows_RD.dtype)
    cuts, blocks = cdiv(N, CHUNK), cdiv(D, tile["BLOCK_D"])
    out_FD = values_N.new_empty(e.F, D) if into_FD is None else into_FD
    rest_D = values_N.new_empty(cuts, D)
    p_FD = squares = None
    if norms is not None:
        p_FD = None if norms.constraint == "free" else norms.p_FD
        squares = values_N.new_empty(1 if p_FD is None else 3, e.F, blocks)
        require_float32(p_FD=norms.p_FD)
    outputs = (out_FD, rest_D, p_FD, squares, e.F)
    _by_latent_kernel[(e.F + cuts, blocks)](
        rows_RD,
        values_N,
        e.indices_N,
        _bags_by_latent(e),
        order_N,
        offsets_F1,
        *outputs,
        D=D,
        CHUNK=CHUNK,
        ADD=into_FD is not None,
        **tile,
    )
    where, block = (e.indices_N, order_N, offsets_F1), tile["BLOCK_D"]
    _join_kernel[(cuts, blocks)](*where, *outputs, D=D, CHUNK=CHUNK, BLOCK_D=block)
    if norms is not None and squares is not None:
        norms.gradient_FD, norms.of_parts_FK = out_FD, squares[0]
        if p_FD is not None:
            norms.of_parts_FK = _norms(squares, norms.constraint)[:, None]
    return out_FD


def _norms(squares_3FK: Tensor, constraint: Constraint) -> Tensor:
    """Return the norms of rows as the update takes them, [F]."""
    _, F, K = squares_3FK.shape
    norms_F, block = squares_3FK.new_empty(F), next_power_of_2(K)
    tile = {"BLOCK_F": 512, "BLOCK_K": block}
    _norms_kernel[(cdiv(F, 512),)](squares_3FK, norms_F, F, K=K, CONSTRAINT=constraint, **tile)
    return norms_F


def decode_backward(
    g_RD: Tensor,
    values_N: Tensor,
    W_FD: Tensor,
    e: SparsePattern,
    weight: bool,
    norms: RowNorms | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of `decode` with respect to its values, [N], and, where asked for, to W, [F, D],
    whose rows' norms are left in `norms`."""
    require_float32(values_N=values_N)
    require_floats(g_RD=g_RD, W_FD=W_FD)
    return _dots(g_RD, W_FD, e), _by_latent(g_RD, values_N, e, norms=norms) if weight else None


def encode_backward(
    g_N: Tensor, x_BD: Tensor, e: SparsePattern, norms: RowNorms | None = None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the entries' pre-activations x W_enc^T + b_enc with respect to W_enc, [F, D],
    whose rows' norms are left in `norms`, and b_enc, [F]. Bags are tokens."""
    require_float32(g_N=g_N)
    require_floats(x_BD=x_BD)
    return _by_latent(x_BD, g_N, e, norms=norms), sum_by_latent(g_N, e)


def add_rows(values_N: Tensor, rows_RD: Tensor, e: SparsePattern, into_FD: Tensor) -> None:
    """Add to each latent's row of an array the sum of value times its bags' rows."""
    require_float32(values_N=values_N, into_FD=into_FD)
    require_floats(rows_RD=rows_RD)
    _by_latent(rows_RD, values_N, e, into_FD)
