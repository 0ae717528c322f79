"""The ops on a CPU without a compiler, from torch's own kernels: embedding bags by token and by latent, a
sampled bound for selections.

Nothing but the encoder's product costs as much as there are latents. `reference.py` says what each function
means. Ties of `top_k` are taken as torch's topk takes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as nnf
from torch import Tensor

from monosemy.ops import reference
from monosemy.ops.pattern import Selection, SparsePattern, by_rows
from monosemy.ops.reference import (  # noqa: F401
    AdamStep,
    Constraint,
    count_step,
    estimate,
    firing,
    follow_threshold,
    fused,
    mean_of_finite,
    scale,
    smallest,
    squared_error,
)


def _picked(pre_BF: Tensor, flat_N: Tensor) -> Selection:
    """Return the entries at flat positions, which are ascending."""
    B, F = pre_BF.shape
    tokens_N = torch.div(flat_N, F, rounding_mode="floor")
    offsets_B1 = torch.searchsorted(tokens_N, torch.arange(B + 1), out_int32=True)
    return Selection((flat_N - tokens_N * F).int(), offsets_B1, pre_BF.flatten()[flat_N].float())


def top_k(pre_BF: Tensor, k: int, among_F: Tensor | None = None) -> Selection:
    among = None if among_F is None else among_F.nonzero().squeeze(1)
    columns_BM = pre_BF if among is None else pre_BF[:, among]
    k = min(k, columns_BM.shape[1])
    latents_BK = columns_BM.topk(k, dim=1, sorted=False).indices.int().sort(dim=1).values
    values_BK = columns_BM.gather(1, latents_BK.long())
    if among is not None:
        latents_BK = among[latents_BK].int()
    offsets_B1 = (
        torch.arange(0, (len(pre_BF) + 1) * k, k, dtype=torch.int32)
        if k
        else torch.zeros(len(pre_BF) + 1, dtype=torch.int32)
    )
    return Selection(latents_BK.flatten(), offsets_B1, values_BK.flatten().float())


def batch_top_k(pre_BF: Tensor, n: int) -> Selection:
    """Select the k-th largest of a strided sample bounds the search from below, so that the exact selection
    looks at few candidates."""
    flat = pre_BF.flatten()
    stride = max(len(flat) // 65_536, 1) | 1  # odd, to look at different latents
    sample = flat[::stride]
    guess = sample.topk(min(len(sample), int(1.3 * n / stride) + 16)).values[-1]
    candidates = (flat >= guess).nonzero().squeeze(1)
    if len(candidates) < n:
        candidates = torch.arange(len(flat))
    least = flat[candidates].topk(n, sorted=False).values.min()
    over, tied = (flat[candidates] > least), (flat[candidates] == least).nonzero().squeeze(1)
    over[tied[: n - int(over.sum())]] = True
    return _picked(pre_BF, candidates[over])


def above(pre_BF: Tensor, threshold: Tensor | float, capacity: int | None = None) -> Selection:
    return _picked(pre_BF, (pre_BF > threshold).flatten().nonzero().squeeze(1))


def sort_by_latent(indices_N: Tensor, offsets_R1: Tensor, F: int) -> tuple[Tensor, Tensor]:
    latents, order_N = indices_N.sort(stable=True)
    return order_N.int(), torch.searchsorted(latents, torch.arange(F + 1, dtype=torch.int32), out_int32=True)


def sum_by_latent(values_N: Tensor, e: SparsePattern) -> Tensor:
    return values_N.new_zeros(e.F).index_add_(0, e.indices_N, values_N)


def count_by_latent(values_N: Tensor, e: SparsePattern) -> Tensor:
    return sum_by_latent((values_N > 0).to(values_N.dtype), e)


def decode(values_N: Tensor, W_FD: Tensor, e: SparsePattern) -> Tensor:
    return nnf.embedding_bag(e.indices_N, W_FD, e.offsets_R1[:-1], mode="sum", per_sample_weights=values_N)


def _by_latent(values_N: Tensor, rows_RD: Tensor, e: SparsePattern) -> Tensor:
    """Return the sum over each latent's entries of value times the row of the entry's bag, [F, D]: an
    embedding bag whose bags are latents."""
    order_N, offsets_F1 = e.by_latent(sort_by_latent)
    return nnf.embedding_bag(
        e.bags_N[order_N], rows_RD, offsets_F1[:-1], mode="sum", per_sample_weights=values_N[order_N]
    )


def decode_backward(
    g_RD: Tensor, values_N: Tensor, W_FD: Tensor, e: SparsePattern, weight: bool
) -> tuple[Tensor, Tensor | None]:
    d_values_N = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        g_RD, W_FD, e.indices_N, e.offsets_R1[:-1], e.bags_N, 0
    )
    return d_values_N, _by_latent(values_N, g_RD, e) if weight else None


def encode_backward(g_N: Tensor, x_BD: Tensor, e: SparsePattern) -> tuple[Tensor, Tensor]:
    return _by_latent(g_N, x_BD, e), sum_by_latent(g_N, e)


def threshold_dense(
    pre_BF: Tensor, threshold: Tensor | float, values_BF: Tensor, mask_BF: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a few rows at a time, which stay in the cache."""
    parts = [
        reference.threshold_dense(pre_BF[rows], threshold, values_BF[rows], mask_BF[rows])
        for rows in by_rows(pre_BF)
    ]
    sums, counts = (torch.stack(part).sum(0) for part in zip(*parts, strict=True))
    return sums, counts


def masked_copy(
    mask_BF: Tensor,
    x_BF: Tensor,
    out_BF: Tensor,
    add_F: Tensor | None = None,
    also_BF: Tensor | None = None,
) -> Tensor:
    x_BF = x_BF if also_BF is None else torch.add(x_BF, also_BF, out=out_BF)
    return torch.stack(
        [reference.masked_copy(mask_BF[rows], x_BF[rows], out_BF[rows], add_F) for rows in by_rows(x_BF)]
    ).sum(0)


def count_positive(x_BF: Tensor) -> Tensor:
    return torch.stack([reference.count_positive(x_BF[rows]) for rows in by_rows(x_BF)]).sum(0)


def _radial(p_RC: Tensor, g_RC: Tensor, constraint: Constraint) -> Tensor:
    """Return what times p is to be subtracted from the gradient, for each row."""
    norm_R = torch.linalg.vector_norm(p_RC, dim=1) + (1e-6 if constraint == "project" else 0)
    return torch.linalg.vecdot(g_RC, p_RC) / norm_R.square()


def square_norms(p: Tensor, grads: Sequence[Tensor], constraint: Constraint) -> Tensor:
    return torch.stack([_square_norm(p_s, g, constraint) for p_s, g in zip(p, grads, strict=True)])


def _square_norm(p_RC: Tensor, g_RC: Tensor, constraint: Constraint) -> Tensor:
    # vector_norm would add the squares of all of it up one by one
    square = torch.linalg.vecdot(g_RC, g_RC).sum()
    if constraint == "free":
        return square
    radial_R, along_R = _radial(p_RC, g_RC, constraint), torch.linalg.vecdot(g_RC, p_RC)
    return square + (radial_R * (radial_R * torch.linalg.vecdot(p_RC, p_RC) - 2 * along_R)).sum()


def update(
    p: Tensor, grads: Sequence[Tensor], m: Tensor | None, v: Tensor, bf16_copy: Tensor | None, adam: AdamStep
) -> None:
    for s, g in enumerate(grads):
        factor = float(adam.scale_S[s])
        if factor != factor or factor in (float("inf"), -float("inf")):
            continue
        if adam.constraint != "free":
            g.addcmul_(p[s], -_radial(p[s], g, adam.constraint)[:, None])
        torch._fused_adam_(
            [p[s]],
            [g],
            [g if m is None else m[s]],
            [v[s]],
            [],
            [adam.steps_S[s].clone()],
            lr=float(adam.lr_S[s]),
            beta1=adam.betas[0],
            beta2=adam.betas[1],
            weight_decay=0.0,
            eps=adam.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=None if factor == 1 else torch.tensor(1 / factor),
        )
        if adam.constraint != "free":
            norm_R1 = torch.linalg.vector_norm(p[s], dim=1, keepdim=True)
            p[s].div_(norm_R1 + torch.finfo(p.dtype).eps if adam.constraint == "project" else norm_R1)
        if bf16_copy is not None:
            bf16_copy[s].copy_(p[s])


adam_step = partial(reference.adam_step, square_norms=square_norms, update=update)
