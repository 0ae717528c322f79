"""What each op means, in plain torch. Backward passes of the sparse ops are sparse too: no tensor of [B, F] appears in them.

B tokens, D d_in, F latents, K kept of each token, N active entries. Weights are stored a latent per row: W_enc_FD, W_dec_FD.
An entry is a token and a latent; entries are sorted by token. A *bag* is what one decoded row sums: a token, or a token and a group.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.autograd import Function


def preactivations(x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor | None, *, bf16: bool = False) -> Tensor:
    """x W_enc^T + b_enc, [B, F], outside autograd; with `bf16` the product is taken of bfloat16 operands (and rounded to it)."""
    with torch.no_grad():
        if bf16:
            return nnf.linear(x_BD.bfloat16(), W_enc_FD.bfloat16(), None if b_enc_F is None else b_enc_F.bfloat16())
        return nnf.linear(x_BD, W_enc_FD, b_enc_F)


# --- selections: flat positions (token * F + latent) of the chosen entries ---------------------------------------------------


def top_k(pre_BF: Tensor, k: int) -> Tensor:
    """Flat positions of the k largest of each token, [B * k], in order of tokens."""
    B, F = pre_BF.shape
    rows_B1 = torch.arange(0, B * F, F, device=pre_BF.device)[:, None]
    return (pre_BF.topk(k, dim=1, sorted=False).indices + rows_B1).flatten()


def batch_top_k(pre_BF: Tensor, n: int) -> Tensor:
    """Flat positions of the n largest of the whole batch, [n], ascending.

    The k-th largest of a strided sample bounds the search from below, so that the exact selection looks at few candidates.
    """
    flat = pre_BF.flatten()
    stride = max(len(flat) // 65_536, 1)
    sample = flat[::stride]
    guess = sample.topk(min(len(sample), int(1.3 * n / stride) + 16)).values[-1]
    candidates = nonzero(pre_BF, guess)
    if len(candidates) < n:
        return flat.topk(n, sorted=False).indices.sort().values
    return candidates[flat[candidates].topk(n, sorted=False).indices].sort().values


def nonzero(pre_BF: Tensor, above: Tensor | float) -> Tensor:
    """Flat positions of everything above a threshold (a number or [F]), ascending."""
    return (pre_BF > above).flatten().nonzero().squeeze(1)


# --- gradients by latent -----------------------------------------------------------------------------------------------------


def sum_by(values_N: Tensor, index_N: Tensor, size: int) -> Tensor:
    """The sum of the values of each index, [size]."""
    return values_N.new_zeros(size).index_add_(0, index_N, values_N)


class Entries:
    """Where the active entries are: their latents, the bags that they are summed into, and where each bag begins.

    Entries are in order of bags. What groups them by latent, too, is made once, when the first weight gradient asks for it.
    """

    def __init__(self, latents_N: Tensor, bags_N: Tensor, starts: Tensor, F: int) -> None:
        self.latents_N, self.bags_N, self.starts, self.F = latents_N, bags_N, starts, F

    @cached_property
    def _by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        latents, order_N = self.latents_N.to(torch.int32).sort(stable=True)
        starts_F = self.latents_N.new_zeros(self.F)
        torch.cumsum(torch.bincount(latents, minlength=self.F)[:-1], 0, out=starts_F[1:])
        return order_N, self.bags_N[order_N], starts_F

    def weight_gradient(self, values_N: Tensor, rows_RD: Tensor) -> Tensor:
        """The sum over each latent's entries of value times the row of the entry's bag, [F, D]: an embedding bag whose bags are latents."""
        order_N, bags_N, starts_F = self._by_latent
        return nnf.embedding_bag(bags_N, rows_RD, starts_F, mode="sum", per_sample_weights=values_N[order_N])


class _Take(Function):
    @staticmethod
    def forward(ctx: Any, w_F: Tensor, latents_N: Tensor) -> Tensor:
        ctx.save_for_backward(latents_N)
        ctx.size = len(w_F)
        return w_F[latents_N]

    @staticmethod
    def backward(ctx: Any, g_N: Tensor) -> tuple[Tensor, None]:
        (latents_N,) = ctx.saved_tensors
        return sum_by(g_N, latents_N, ctx.size), None


def take(w_F: Tensor, latents_N: Tensor) -> Tensor:
    """w of each entry's latent, [N]; its gradient is summed by latent."""
    return _Take.apply(w_F, latents_N)


class _EncodeSparse(Function):
    @staticmethod
    def forward(
        ctx: Any,
        W_enc_FD: Tensor,
        b_enc_F: Tensor,
        b_dec_D: Tensor | None,
        centred_BD: Tensor,
        pre_BF: Tensor,
        flat_N: Tensor,
        entries: Entries,
    ) -> Tensor:
        ctx.save_for_backward(W_enc_FD, centred_BD)
        ctx.entries = entries
        return pre_BF.flatten()[flat_N].to(W_enc_FD.dtype)

    @staticmethod
    def backward(ctx: Any, g_N: Tensor) -> tuple[Tensor | None, ...]:
        W_enc_FD, centred_BD = ctx.saved_tensors
        g_N = g_N.contiguous()
        d_b_enc_F = sum_by(g_N, ctx.entries.latents_N, len(W_enc_FD))
        # x - b_dec enters every token alike, so b_dec's gradient is one product of a vector with W_enc, not of [B, F] with it
        d_b_dec_D = -(d_b_enc_F @ W_enc_FD) if ctx.needs_input_grad[2] else None
        return ctx.entries.weight_gradient(g_N, centred_BD), d_b_enc_F, d_b_dec_D, None, None, None, None


def encode_sparse(
    W_enc_FD: Tensor, b_enc_F: Tensor, b_dec_D: Tensor | None, centred_BD: Tensor, pre_BF: Tensor, flat_N: Tensor, entries: Entries
) -> Tensor:
    """The pre-activations of the selected entries, [N], differentiable in W_enc, b_enc and b_dec (where x was centred by it)."""
    return _EncodeSparse.apply(W_enc_FD, b_enc_F, b_dec_D, centred_BD, pre_BF, flat_N, entries)


class _EncodeDense(Function):
    @staticmethod
    def forward(
        ctx: Any, W_enc_FD: Tensor, b_enc_F: Tensor, b_dec_D: Tensor | None, centred_BD: Tensor, pre_BF: Tensor, mask_BF: Tensor
    ) -> Tensor:
        ctx.save_for_backward(W_enc_FD, centred_BD, mask_BF)
        return torch.where(mask_BF, pre_BF, 0).to(W_enc_FD.dtype)

    @staticmethod
    def backward(ctx: Any, g_BF: Tensor) -> tuple[Tensor | None, ...]:
        W_enc_FD, centred_BD, mask_BF = ctx.saved_tensors
        g_BF = torch.where(mask_BF, g_BF, 0)  # a selection: where p < 1 the gradient at 0 is infinite, and inf times 0 is not 0
        d_b_enc_F = g_BF.sum(0)
        d_b_dec_D = -(d_b_enc_F @ W_enc_FD) if ctx.needs_input_grad[2] else None
        return g_BF.T @ centred_BD, d_b_enc_F, d_b_dec_D, None, None, None


def encode_dense(W_enc_FD: Tensor, b_enc_F: Tensor, b_dec_D: Tensor | None, centred_BD: Tensor, pre_BF: Tensor, mask_BF: Tensor) -> Tensor:
    """The pre-activations where the mask is set and zero elsewhere, [B, F]: `encode_sparse` in the dense layout."""
    return _EncodeDense.apply(W_enc_FD, b_enc_F, b_dec_D, centred_BD, pre_BF, mask_BF)


class _Decode(Function):
    @staticmethod
    def forward(ctx: Any, values_N: Tensor, W_dec_FD: Tensor, entries: Entries) -> Tensor:
        ctx.save_for_backward(values_N, W_dec_FD)
        ctx.entries = entries
        return nnf.embedding_bag(entries.latents_N, W_dec_FD, entries.starts, mode="sum", per_sample_weights=values_N)

    @staticmethod
    def backward(ctx: Any, g_RD: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        values_N, W_dec_FD = ctx.saved_tensors
        e, g_RD = ctx.entries, g_RD.contiguous()
        d_values_N = None
        if ctx.needs_input_grad[0]:
            d_values_N = torch.ops.aten._embedding_bag_per_sample_weights_backward(g_RD, W_dec_FD, e.latents_N, e.starts, e.bags_N, 0)
        d_W_dec_FD = e.weight_gradient(values_N, g_RD) if ctx.needs_input_grad[1] else None
        return d_values_N, d_W_dec_FD, None


def decode(values_N: Tensor, W_dec_FD: Tensor, entries: Entries) -> Tensor:
    """For each bag the sum of value times the latent's decoder row, [bags, D]."""
    return _Decode.apply(values_N, W_dec_FD, entries)
