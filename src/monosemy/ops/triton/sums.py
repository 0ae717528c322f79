"""Sums over entries: decoding, its gradients and those of the encoder, in bags of tokens or by latent.

D d_in, F latents, N entries (capacity), R bags.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2

from monosemy.ops.pattern import RowNorms, SparsePattern
from monosemy.ops.triton.launch import require_float32, require_floats
from monosemy.ops.triton.norms import tangential

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
def _square(total_D, p_FD, latent, d, filled, D: tl.constexpr, CONSTRAINT: tl.constexpr):
    """Return the sum of squares of what the update takes of a latent's row; 0 of one that is not filled."""
    if CONSTRAINT != "free":
        p_D = tl.load(p_FD + latent.to(tl.int64) * D + d, mask=d < filled, other=0)
        total_D = tl.sum(tangential(total_D[None, :], p_D[None, :], CONSTRAINT), 0)
    return tl.where(filled > 0, tl.sum(total_D * total_D, 0), 0.0)


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
    out_FD,
    rest_D,
    p_FD,
    norms_FK,
    F,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    ADD: tl.constexpr,
    CONSTRAINT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """For the entries of a piece: the products of their bags' rows with the latent's row of W, the sum of
    value times row, and its norm."""
    piece = tl.program_id(0)
    latent, begin, end = _piece(piece, indices_N, order_N, offsets_F1, F, CHUNK)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total_D = tl.zeros([BLOCK_D], tl.float32)
    if W_FD is not None:
        there = d < tl.where(begin < end, D, 0)
        W_D = tl.load(W_FD + latent.to(tl.int64) * D + d, mask=there, other=0).to(tl.float32)
    for first in range(begin, end, BLOCK_N):
        at = first + tl.arange(0, BLOCK_N)
        place = tl.load(order_N + at, mask=at < end, other=0)
        bags = tl.load(bags_N + at, mask=at < end, other=0).to(tl.int64)
        rows = tl.load(
            rows_RD + bags[:, None] * D + d[None, :], mask=(at < end)[:, None] & (d < D)[None, :], other=0
        ).to(tl.float32)
        if W_FD is not None:
            tl.store(d_values_N + place, tl.sum(rows * W_D[None, :], 1), mask=at < end)
        if out_FD is not None:
            total_D += tl.sum(tl.load(values_N + place, mask=at < end, other=0)[:, None] * rows, 0)
    if out_FD is not None:
        filled = d < tl.where(begin < end, D, 0)
        if piece < F:
            here = out_FD + piece.to(tl.int64) * D + d
            if ADD:
                total_D += tl.load(here, mask=filled, other=0)
                tl.store(here, total_D, mask=filled)
            else:
                tl.store(here, total_D, mask=d < D)
            if norms_FK is not None:
                norm = tl.sqrt(_square(total_D, p_FD, piece, d, tl.where(begin < end, D, 0), D, CONSTRAINT))
                tl.store(norms_FK + piece * tl.num_programs(1) + tl.program_id(1), norm)
        else:
            tl.store(rest_D + (piece - F).to(tl.int64) * D + d, total_D, mask=filled)


@triton.jit
def _join_kernel(
    indices_N,
    order_N,
    offsets_F1,
    out_FD,
    rest_D,
    p_FD,
    norms_FK,
    F,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    CONSTRAINT: tl.constexpr,
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
        if norms_FK is not None:
            norm = tl.sqrt(_square(total_D, p_FD, latent, d, D, D, CONSTRAINT))
            tl.store(norms_FK + latent * tl.num_programs(1) + tl.program_id(1), norm)


def _tile(D: int, dtype: torch.dtype, *, whole: bool = False, elements: int = 2048) -> dict[str, int]:
    """Blocks of entries by blocks of D, which are `whole` rows where they have to be.

    Of rows in bfloat16 a program has as many warps as read a row at once, so that none has to add up what
    others read, and so many `elements`; of float32 4096.
    """
    if dtype == torch.bfloat16:
        block = next_power_of_2(D) if whole else min(next_power_of_2(D), 512)
        warps = min(max(block // 256, 1), 4)
        number = min(max(min(elements, 4096 * warps) // block, 2 if block > 1024 else 4), 32)
        return {"BLOCK_D": block, "BLOCK_N": number, "num_warps": warps}
    block = next_power_of_2(D) if whole else min(next_power_of_2(D), 1024)
    return {
        "BLOCK_D": block,
        "BLOCK_N": min(max(4096 // block, 1), 32),
        "num_warps": 4 if block <= 2048 else 8,
    }


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
    out_RD, tile = values_N.new_empty(e.R, D), _tile(D, W_FD.dtype, elements=8192)
    _decode_kernel[(e.R, cdiv(D, tile["BLOCK_D"]))](
        values_N, W_FD, e.indices_N, e.offsets_R1, out_RD, D=D, **tile
    )
    return out_RD


def _by_latent(
    rows_RD: Tensor,
    values_N: Tensor,
    W_FD: Tensor | None,
    e: SparsePattern,
    weight: bool,
    into_FD: Tensor | None = None,
    norms: RowNorms | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """By latent: the products of its bags' rows with its row of W, [N], and the sum of value times row, [F,
    D]; each if wanted. The latter's norms are left in `norms`."""
    (order_N, offsets_F1), N, D = e.by_latent(sort_by_latent), len(values_N), rows_RD.shape[1]
    tile = _tile(D, rows_RD.dtype, whole=W_FD is not None)
    cuts, blocks = cdiv(N, CHUNK), cdiv(D, tile["BLOCK_D"])
    d_values_N = None if W_FD is None else torch.zeros_like(values_N)
    if not weight:
        out_FD = rest_D = None
    else:
        out_FD = values_N.new_empty(e.F, D) if into_FD is None else into_FD
        rest_D = values_N.new_empty(cuts, D)
    entries = (e.indices_N, _bags_by_latent(e), order_N, offsets_F1)
    p_FD = norms_FK = None
    constraint = "free"
    if norms is not None and weight:
        constraint, p_FD = norms.constraint, norms.p_FD
        norms_FK = norms.of_parts_FK = values_N.new_empty(e.F, blocks)
        norms.gradient_FD = out_FD
        require_float32(p_FD=p_FD)
        assert blocks == 1 or constraint == "free", "norms: of parts of rows that keep their norm"
    _by_latent_kernel[(e.F + cuts, blocks)](
        rows_RD,
        values_N,
        W_FD,
        *entries,
        d_values_N,
        out_FD,
        rest_D,
        p_FD,
        norms_FK,
        e.F,
        D=D,
        CHUNK=CHUNK,
        ADD=into_FD is not None,
        CONSTRAINT=constraint,
        **tile,
    )
    if out_FD is not None:
        where = (e.indices_N, order_N, offsets_F1, out_FD, rest_D, p_FD, norms_FK)
        how = {"D": D, "CHUNK": CHUNK, "CONSTRAINT": constraint, "BLOCK_D": tile["BLOCK_D"]}
        _join_kernel[(cuts, blocks)](*where, e.F, **how)
    return d_values_N, out_FD


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
    d_values_N, d_W_FD = _by_latent(g_RD, values_N, W_FD, e, weight, norms=norms)
    assert d_values_N is not None
    return d_values_N, d_W_FD


def encode_backward(
    g_N: Tensor, x_BD: Tensor, e: SparsePattern, norms: RowNorms | None = None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the entries' pre-activations x W_enc^T + b_enc with respect to W_enc, [F, D],
    whose rows' norms are left in `norms`, and b_enc, [F]. Bags are tokens."""
    require_float32(g_N=g_N)
    require_floats(x_BD=x_BD)
    d_W_FD = _by_latent(x_BD, g_N, None, e, True, norms=norms)[1]
    assert d_W_FD is not None
    return d_W_FD, sum_by_latent(g_N, e)


def add_rows(values_N: Tensor, rows_RD: Tensor, e: SparsePattern, into_FD: Tensor) -> None:
    """Add to each latent's row of an array the sum of value times its bags' rows."""
    require_float32(values_N=values_N, into_FD=into_FD)
    require_floats(rows_RD=rows_RD)
    _by_latent(rows_RD, values_N, None, e, True, into_FD)
