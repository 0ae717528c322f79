"""The sparse layout's ops with their gradients. Everything costs as much as there are active entries, and no
tensor of [B, F] appears in a backward pass.

B tokens, D d_in, F latents, N entries, R bags.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from monosemy.ops.backends import backend_for
from monosemy.ops.pattern import RowNorms, SparsePattern
from monosemy.ops.selections import d_b_dec


class _Take(Function):
    @staticmethod
    def forward(ctx: Any, w_F: Tensor, pattern: SparsePattern) -> Tensor:
        ctx.pattern = pattern
        return w_F[pattern.indices_N]

    @staticmethod
    def backward(ctx: Any, g_N: Tensor) -> tuple[Tensor, None]:
        return sum_by_latent(g_N, ctx.pattern), None


def gather(w_F: Tensor, pattern: SparsePattern) -> Tensor:
    """Gather w of each entry's latent, [N]; its gradient is summed by latent."""
    return _Take.apply(w_F, pattern)


class _SumByLatent(Function):
    @staticmethod
    def forward(ctx: Any, values_N: Tensor, pattern: SparsePattern) -> Tensor:
        ctx.pattern = pattern
        return backend_for(values_N).sum_by_latent(values_N.contiguous(), pattern)

    @staticmethod
    def backward(ctx: Any, g_F: Tensor) -> tuple[Tensor, None]:
        g_N = g_F[ctx.pattern.indices_N]
        return g_N if ctx.pattern.valid_N is None else torch.where(ctx.pattern.valid_N, g_N, 0), None


def sort_by_latent(pattern: SparsePattern) -> tuple[Tensor, Tensor]:
    """Return the places of the entries in order of latents, int32 [N], and the latents' offsets, int32 [F +
    1]."""
    return pattern.by_latent(backend_for(pattern.indices_N).sort_by_latent)


def sort_aside(pattern: SparsePattern) -> None:
    """Begin to sort the entries by latent, on a GPU beside what follows."""
    pattern.sort_aside(backend_for(pattern.indices_N).sort_by_latent)


def sum_by_latent(values_N: Tensor, pattern: SparsePattern) -> Tensor:
    """Return the sum of each latent's values, [F]."""
    return _SumByLatent.apply(values_N, pattern)


@torch.no_grad()
def count_by_latent(values_N: Tensor, pattern: SparsePattern) -> Tensor:
    """Count each latent's positive values, [F]."""
    return backend_for(values_N).count_by_latent(values_N, pattern)


@torch.no_grad()
def smallest(values_N: Tensor, pattern: SparsePattern) -> Tensor:
    """Return the smallest positive value of each bag, [R]; infinity where it has none."""
    return backend_for(values_N).smallest(values_N, pattern)


class WeightGradient:
    """The gradient of one weight in a step, which its uses add up in one array instead of in one each.

    autograd comes to the last use first, which is AuxK's and has few entries. So all but the last that it
    comes to wait, and are added to what that one writes. `lent_FD` is where that goes, if not to a fresh
    array, and `norms` where the norms of its rows are left.
    """

    def __init__(self, lent_FD: Tensor | None = None, norms: RowNorms | None = None) -> None:
        self.uses = 0  # whose backward pass is to come
        self.lent = () if lent_FD is None else (lent_FD,)
        self.norms = norms
        self._waiting: list[Callable[[Tensor], object]] = []

    @property
    def options(self) -> dict[str, Any]:
        """What a kernel of the sparse layout that makes the last use's gradient is given; no norms where
        something will be added to it."""
        lent = dict(zip(("lent_FD",), self.lent, strict=False))
        return lent if self.norms is None or self._waiting else lent | {"norms": self.norms}

    def last(self) -> bool:
        """Count the backward pass of a use, and return whether it is the last."""
        self.uses -= 1
        return self.uses == 0

    def joined(self, compute: Callable[..., Tensor]) -> Tensor | None:
        """Return a use's whole gradient with what waits added to it, or have it wait, too. `compute` may be
        given an array for it."""
        if self.last():
            return self.add_to(compute(*self.lent))
        d_W_FD = compute()
        self.wait(lambda total_FD: total_FD.add_(d_W_FD))
        return None

    def wait(self, add: Callable[[Tensor], object]) -> None:
        """Have a use's part added to the array later."""
        self._waiting.append(add)

    def add_to(self, d_W_FD: Tensor) -> Tensor:
        """Add what waits to the last use's gradient, and return that."""
        for add in reversed(self._waiting):
            add(d_W_FD)
        self._waiting.clear()
        return d_W_FD


def adds_in_place(W_FD: Tensor) -> bool:
    """Whether a backend can add to a gradient."""
    return hasattr(backend_for(W_FD), "add_rows")


def lends(W_FD: Tensor) -> bool:
    """Whether a backend writes a gradient to an array that it is lent. A fresh one costs a CPU as much as
    the sums that go there: the system hands out its pages one by one."""
    return getattr(backend_for(W_FD), "LENDS", False)


def takes_norms(W_FD: Tensor) -> bool:
    """Whether a backend's kernels leave the norms of a gradient's rows when they write it."""
    return getattr(backend_for(W_FD), "TAKES_NORMS", False)


class _RowNorms(Function):
    @staticmethod
    def forward(ctx: Any, W_FD: Tensor, gradient: WeightGradient) -> Tensor:
        norms_F = backend_for(W_FD).row_norms(W_FD)
        ctx.save_for_backward(W_FD, norms_F)
        ctx.gradient = gradient
        gradient.uses += ctx.needs_input_grad[0]
        return norms_F

    @staticmethod
    def backward(ctx: Any, g_F: Tensor) -> tuple[Tensor | None, None]:
        (W_FD, norms_F), backend = ctx.saved_tensors, backend_for(g_F)
        factors_F = torch.where(norms_F > 0, g_F / norms_F, 0)
        if ctx.gradient.last():
            return ctx.gradient.add_to(factors_F[:, None] * W_FD), None
        ctx.gradient.wait(lambda d_W_FD: backend.add_scaled_rows(W_FD, factors_F, d_W_FD))
        return None, None


def row_norms(W_FD: Tensor, gradient: WeightGradient | None = None) -> Tensor:
    """Return the norm of each row, [F]; to `gradient`, where it is given, W's gradient is added."""
    if gradient is None or not hasattr(backend_for(W_FD), "row_norms"):
        return torch.linalg.vector_norm(W_FD, dim=1)
    return _RowNorms.apply(W_FD, gradient)


ALIGNED = 64  # bytes, as fresh arrays are


class _SumOfPreactivations(Function):
    @staticmethod
    def forward(
        ctx: Any,
        W_FD: Tensor,
        b_F: Tensor,
        b_dec_D: Tensor | None,
        x_BD: Tensor,
        gradient: WeightGradient | None,
    ) -> Tensor:
        sum_D, ctx.tokens = x_BD.sum(0), len(x_BD)
        ctx.save_for_backward(W_FD, sum_D)
        ctx.gradient = gradient if ctx.needs_input_grad[0] else None
        if ctx.gradient is not None:
            ctx.gradient.uses += 1
        # where an array begins shows in the last bit of a CPU's product with a vector
        moved = W_FD.device.type == "cpu" and W_FD.data_ptr() % ALIGNED
        return torch.addmv(b_F, W_FD.clone() if moved else W_FD, sum_D, beta=ctx.tokens)

    @staticmethod
    def backward(ctx: Any, g_F: Tensor) -> tuple[Tensor | None, ...]:
        (W_FD, sum_D), gradient, d_W_FD = ctx.saved_tensors, ctx.gradient, None
        d_b_F = ctx.tokens * g_F
        if gradient is None or gradient.last():
            d_W_FD = torch.outer(g_F, sum_D)
            d_W_FD = d_W_FD if gradient is None else gradient.add_to(d_W_FD)
        else:
            gradient.wait(lambda d_W_FD: d_W_FD.addr_(g_F, sum_D))
        return d_W_FD, d_b_F, d_b_dec(d_b_F, W_FD, None) if ctx.needs_input_grad[2] else None, None, None


def sum_of_preactivations(
    W_FD: Tensor,
    b_F: Tensor,
    b_dec_D: Tensor | None,
    centered_BD: Tensor,
    gradient: WeightGradient | None = None,
) -> Tensor:
    """Return the sum over a batch of each latent's pre-activations, [F], by one product of a matrix with a
    vector.

    It is differentiable in W_enc, b_enc and b_dec (where x was centered by it). To `gradient`, where it is
    given, W_enc's gradient, which has rank one, is added.
    """
    return _SumOfPreactivations.apply(W_FD, b_F, b_dec_D, centered_BD, gradient)


class _EncodeSparse(Function):
    @staticmethod
    def forward(
        ctx: Any,
        W_FD: Tensor,
        b_F: Tensor,
        b_dec_D: Tensor | None,
        x_BD: Tensor,
        values_N: Tensor,
        pattern: SparsePattern,
        rows_FD: Tensor | None,
        gradient: WeightGradient | None,
    ) -> Tensor:
        ctx.save_for_backward(W_FD, x_BD)
        ctx.pattern, ctx.rows_FD = pattern, rows_FD
        ctx.gradient = gradient if ctx.needs_input_grad[0] else None
        if ctx.gradient is not None:
            ctx.gradient.uses += 1
        return values_N.view_as(values_N)

    @staticmethod
    def backward(ctx: Any, g_N: Tensor) -> tuple[Tensor | None, ...]:
        W_FD, x_BD = ctx.saved_tensors
        if ctx.pattern.valid_N is not None:
            g_N = torch.where(ctx.pattern.valid_N, g_N, 0)
        rows_FD = ctx.rows_FD
        x_BD = x_BD if rows_FD is None else x_BD.to(rows_FD.dtype)
        backend, given, d_W_FD = backend_for(W_FD), (g_N.contiguous(), x_BD, ctx.pattern), None
        if ctx.gradient is None or ctx.gradient.last():
            options = {} if ctx.gradient is None else ctx.gradient.options
            d_W_FD, d_b_F = backend.encode_backward(*given, **options)
            d_W_FD = d_W_FD if ctx.gradient is None else ctx.gradient.add_to(d_W_FD)
        else:
            d_b_F = backend.sum_by_latent(given[0], ctx.pattern)
            ctx.gradient.wait(lambda d_W_FD: backend.add_rows(*given, d_W_FD))
        d_b_dec_D = d_b_dec(d_b_F, W_FD, rows_FD) if ctx.needs_input_grad[2] else None
        return d_W_FD, d_b_F, d_b_dec_D, *[None] * 5


def encode_sparse(
    W_FD: Tensor,
    b_F: Tensor,
    b_dec_D: Tensor | None,
    centered_BD: Tensor,
    values_N: Tensor,
    pattern: SparsePattern,
    rows_FD: Tensor | None = None,
    gradient: WeightGradient | None = None,
) -> Tensor:
    """Return the pre-activations of the entries, [N], differentiable in W_enc, b_enc and b_dec (where x was
    centered by it).

    x - b_dec enters every token alike, so that b_dec's gradient is a product of a vector with W_enc, not of
    [B, F] with it. `rows_FD` is W_enc in the precision in which the backward pass takes it and x; to
    `gradient`, where it is given, W_enc's gradient is added.
    """
    return _EncodeSparse.apply(W_FD, b_F, b_dec_D, centered_BD, values_N, pattern, rows_FD, gradient)


class _Decode(Function):
    @staticmethod
    def forward(
        ctx: Any,
        values_N: Tensor,
        W_FD: Tensor,
        pattern: SparsePattern,
        rows_FD: Tensor | None,
        gradient: WeightGradient | None,
    ) -> Tensor:
        rows_FD = W_FD if rows_FD is None else rows_FD
        ctx.save_for_backward(values_N, rows_FD)
        ctx.pattern, ctx.gradient = pattern, gradient if ctx.needs_input_grad[1] else None
        if ctx.gradient is not None:
            ctx.gradient.uses += 1
        return backend_for(W_FD).decode(values_N, rows_FD, pattern)

    @staticmethod
    def backward(ctx: Any, g_RD: Tensor) -> tuple[Tensor | None, ...]:
        (values_N, rows_FD), gradient, e = ctx.saved_tensors, ctx.gradient, ctx.pattern
        backend, g_RD = backend_for(values_N), g_RD.to(rows_FD.dtype).contiguous()
        now = ctx.needs_input_grad[1] and (gradient is None or gradient.last())
        options = {} if gradient is None else gradient.options
        d_values_N, d_W_FD = backend.decode_backward(g_RD, values_N, rows_FD, e, now, **options)
        if gradient is not None and now:
            gradient.add_to(d_W_FD)
        elif gradient is not None:
            gradient.wait(lambda d_W_FD: backend.add_rows(values_N, g_RD, e, d_W_FD))
        return d_values_N, d_W_FD, None, None, None


def decode(
    values_N: Tensor,
    W_FD: Tensor,
    pattern: SparsePattern,
    rows_FD: Tensor | None = None,
    gradient: WeightGradient | None = None,
) -> Tensor:
    """Sum by bag: value times the latent's row of W, [R, D].

    `rows_FD` is W in the precision in which its rows, and those of the gradient, are gathered; sums are of
    float32. To `gradient`, where it is given, W's gradient is added.
    """
    return _Decode.apply(values_N.contiguous(), W_FD, pattern, rows_FD, gradient)
