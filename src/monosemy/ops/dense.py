"""The dense layout's ops with their gradients.

On a CPU a pass over [B, F] costs what memory costs, and a fresh array as much again. So elementwise work
goes by a few rows at a time, which stay in the cache through all of its operations, and arrays of [B, F]
are workspaces from a `Buffer`.

B tokens, D d_in, F latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from monosemy.ops.backends import backend_for
from monosemy.ops.pattern import by_rows
from monosemy.ops.selections import d_b_dec, product
from monosemy.ops.sparse import WeightGradient

Buffer = Callable[..., Tensor]  # (like, dtype) -> an array of [B, F]


def _weight_gradient(
    gradient: WeightGradient | None, of_latents_BF: Tensor, of_tokens_BD: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """Return a weight's gradient, [F, D], as `gradient` wants it."""
    compute = partial(product, of_latents_BF.T, of_tokens_BD, dtype)
    return compute() if gradient is None else gradient.joined(compute)


def _operands(bf16: bool, *tensors: Tensor) -> list[Tensor]:
    return [t.bfloat16() for t in tensors] if bf16 else list(tensors)


class _EncodeDense(Function):
    @staticmethod
    def forward(
        ctx: Any,
        W_FD: Tensor,
        b_F: Tensor,
        b_dec_D: Tensor | None,
        x_BD: Tensor,
        pre_BF: Tensor,
        threshold: Tensor | float,
        buffer: Buffer,
        bf16: bool,
        rows_FD: Tensor | None,
        gradient: WeightGradient | None,
    ) -> tuple[Tensor, ...]:
        # on a GPU, where what is above the threshold is kept as it is, in bfloat16, too
        values_BF = buffer(pre_BF if pre_BF.is_cuda else W_FD)
        mask_BF = buffer(W_FD, torch.bool)
        sums_F, counts_F = backend_for(W_FD).threshold_dense(pre_BF, threshold, values_BF, mask_BF)
        ctx.save_for_backward(W_FD, x_BD, mask_BF)
        ctx.mark_non_differentiable(mask_BF, counts_F)
        ctx.set_materialize_grads(False)
        ctx.bf16, ctx.buffer, ctx.rows_FD, ctx.like = bf16, buffer, rows_FD, values_BF.new_empty(0)
        ctx.gradient = gradient if ctx.needs_input_grad[0] else None
        if ctx.gradient is not None:
            ctx.gradient.uses += 1
        return values_BF, values_BF.view_as(values_BF), mask_BF, sums_F.to(W_FD.dtype), counts_F

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        W_FD, x_BD, mask_BF = ctx.saved_tensors
        first_BF, second_BF, _, g_F, _ = grads
        d_BF = ctx.buffer(ctx.like)
        g_BF, *also_BF = [g for g in (first_BF, second_BF) if g is not None] or [
            d_BF.new_zeros(()).expand(mask_BF.shape)
        ]
        g_F = None if g_F is None else g_F.contiguous()
        # what is infinite off the support (p < 1) does not count
        d_b_F = backend_for(W_FD).masked_copy(mask_BF, g_BF, d_BF, g_F, *also_BF)
        d_BF, x_BD = _operands(ctx.bf16, d_BF, x_BD)
        d_b_dec_D = d_b_dec(d_b_F, W_FD, ctx.rows_FD) if ctx.needs_input_grad[2] else None
        d_W_FD = _weight_gradient(ctx.gradient, d_BF, x_BD, W_FD.dtype)
        return d_W_FD, d_b_F, d_b_dec_D, *[None] * 7


def encode_dense(
    W_FD: Tensor,
    b_F: Tensor,
    b_dec_D: Tensor | None,
    centered_BD: Tensor,
    pre_BF: Tensor,
    threshold: Tensor | float,
    buffer: Buffer,
    *,
    bf16: bool = False,
    rows_FD: Tensor | None = None,
    gradient: WeightGradient | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the pre-activations above a threshold and zero elsewhere, [B, F]: `encode_sparse` in the dense
    layout.

    They come twice, for two uses, whose gradients are then added in an array that is lent. With them comes
    where they are above, [B, F], and of each latent the sum of its values, which costs its gradient no pass
    of its own, and on how many tokens it is above, [F].
    """
    operands = (W_FD, b_F, b_dec_D, centered_BD, pre_BF, threshold)
    return _EncodeDense.apply(*operands, buffer, bf16, rows_FD, gradient)


def _gradients(
    function: Callable[..., Tensor],
    kernels: Any,
    g_BF: Tensor | None,
    values_BF: Tensor,
    mask_BF: Tensor,
    buffer: Buffer,
    w_F: Sequence[Tensor],
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Return what a function's gradient g becomes for the values and for numbers of each latent, by autograd
    or by its `kernels`, if it has some; without g, the sum's, and the sum."""
    d_BF = buffer(values_BF)
    if kernels is not None:
        total, d_w_F = kernels.gradients(values_BF, mask_BF, g_BF, d_BF, w_F)
        return total, d_BF if kernels.through_values else None, d_w_F
    d_w_F = [torch.zeros_like(w) for w in w_F]
    total = values_BF.new_zeros((), dtype=torch.promote_types(values_BF.dtype, torch.float32))
    one = values_BF.new_ones(())
    d_values = None
    for rows in by_rows(values_BF):
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_() for t in (values_BF[rows], *w_F)]
            made = function(*inputs)
        if g_BF is None:
            total += backend_for(made).masked_copy(mask_BF[rows], made.detach(), d_BF[rows]).sum()
        backend_for(made).masked_copy(
            mask_BF[rows], one.expand(made.shape) if g_BF is None else g_BF[rows], d_BF[rows]
        )
        d_made = d_BF[rows].to(made.dtype)
        d_values, *parts = torch.autograd.grad(made, inputs, d_made, allow_unused=True)
        for d_F, part_F in zip(d_w_F, parts, strict=True):
            d_F += 0 if part_F is None else part_F
        if d_values is not None:
            d_BF[rows] = d_values
    return total, None if d_values is None else d_BF, d_w_F


GRAIN = 32768  # elements of torch's smallest share of a thread
VECTORS = 64  # elements that its widest loop takes at once, twice over


def _pow(x: Tensor, p: float) -> Tensor:
    """Compute x^p, the same bits for any number of threads.

    torch computes what is left over at the end of a thread's share by another routine, which may differ in
    the last bit. So shares are filled up to whole vectors.
    """
    if x.device.type != "cpu":
        return x.pow(p)
    N, threads, padded = x.numel(), 0, x.numel()
    while threads != (shares := max(min(torch.get_num_threads(), -(-padded // GRAIN)), 1)):
        threads = shares
        padded = -(-N // (VECTORS * threads)) * VECTORS * threads
    if padded == N:
        return x.pow(p)
    filled = x.new_ones(padded)
    filled[:N] = x.flatten()
    return filled.pow_(p)[:N].view(x.shape)


class _Power(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        x_p = _pow(x, p)
        ctx.save_for_backward(x, x_p)
        ctx.p = p
        return x_p

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        x, x_p = ctx.saved_tensors
        return (x_p / x).mul_(g).mul_(ctx.p), None


def power(x: Tensor, p: float) -> Tensor:
    """Compute x^p of positive x, elementwise; its gradient p x^p / x needs no power of its own."""
    return _Power.apply(x, p)


class _MapDense(Function):
    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[..., Tensor],
        values_BF: Tensor,
        mask_BF: Tensor,
        buffer: Buffer,
        *w_F: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(values_BF, mask_BF, *w_F)
        ctx.function, ctx.buffer = function, buffer
        out_BF, kernels = buffer(values_BF), backend_for(values_BF).fused(function, len(w_F))
        ctx.kernels = kernels
        if kernels is not None:
            kernels.map(values_BF, mask_BF, out_BF, w_F)
            return out_BF
        for rows in by_rows(values_BF):
            backend_for(values_BF).masked_copy(mask_BF[rows], function(values_BF[rows], *w_F), out_BF[rows])
        return out_BF

    @staticmethod
    def backward(ctx: Any, g_BF: Tensor) -> tuple[Tensor | None, ...]:
        values_BF, mask_BF, *w_F = ctx.saved_tensors
        _, d_BF, d_w_F = _gradients(ctx.function, ctx.kernels, g_BF, values_BF, mask_BF, ctx.buffer, w_F)
        return None, d_BF, None, None, *d_w_F


class _TotalDense(Function):
    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[..., Tensor],
        values_BF: Tensor,
        mask_BF: Tensor,
        buffer: Buffer,
        *w_F: Tensor,
    ) -> Tensor:
        """Compute the gradient at once, too, which is the same but for a factor whatever comes after."""
        kernels = backend_for(values_BF).fused(function, len(w_F))
        if not any(ctx.needs_input_grad) and kernels is not None:
            return kernels.total(values_BF, mask_BF, w_F)
        if not any(ctx.needs_input_grad):
            total = values_BF.new_zeros((), dtype=torch.promote_types(values_BF.dtype, torch.float32))
            out_BF = buffer(values_BF)
            for rows in by_rows(values_BF):
                made = function(values_BF[rows], *w_F)
                total += backend_for(made).masked_copy(mask_BF[rows], made, out_BF[: len(made)]).sum()
            return total
        total, d_BF, d_w_F = _gradients(function, kernels, None, values_BF, mask_BF, buffer, w_F)
        ctx.buffer, ctx.through_values = buffer, d_BF is not None
        ctx.save_for_backward(*d_w_F, *([] if d_BF is None else [d_BF]))
        return total

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        *d_w_F, d_BF = ctx.saved_tensors if ctx.through_values else (*ctx.saved_tensors, None)
        d_values_BF = None if d_BF is None else backend_for(d_BF).scale(d_BF, g, ctx.buffer(d_BF))
        return None, d_values_BF, None, None, *(d_F * g for d_F in d_w_F)


def map_dense(
    function: Callable[..., Tensor], values_BF: Tensor, mask_BF: Tensor, buffer: Buffer, *w_F: Tensor
) -> Tensor:
    """Return an elementwise function of the values and of numbers of each latent, where the mask is set and
    zero elsewhere, [B, F]."""
    return _MapDense.apply(function, values_BF, mask_BF, buffer, *w_F)


def total_dense(
    function: Callable[..., Tensor], values_BF: Tensor, mask_BF: Tensor, buffer: Buffer, *w_F: Tensor
) -> Tensor:
    """Return the sum of such a function, []."""
    return _TotalDense.apply(function, values_BF, mask_BF, buffer, *w_F)


@torch.no_grad()
def count_positive(values_BF: Tensor) -> Tensor:
    """Return on how many tokens each latent is positive, float32 [F]."""
    return backend_for(values_BF).count_positive(values_BF)


class _DecodeDense(Function):
    @staticmethod
    def forward(
        ctx: Any,
        values_BF: Tensor,
        W_FD: Tensor,
        buffer: Buffer,
        bf16: bool,
        bf16_FD: Tensor | None,
        gradient: WeightGradient | None,
    ) -> Tensor:
        v_BF, w_FD = _operands(bf16, values_BF, W_FD if bf16_FD is None else bf16_FD)
        ctx.save_for_backward(v_BF, w_FD)
        ctx.bf16, ctx.dtype, ctx.of_values, ctx.buffer = bf16, W_FD.dtype, values_BF.dtype, buffer
        ctx.gradient = gradient if ctx.needs_input_grad[1] else None
        if ctx.gradient is not None:
            ctx.gradient.uses += 1
        return product(v_BF, w_FD, W_FD.dtype)

    @staticmethod
    def backward(ctx: Any, g_BD: Tensor) -> tuple[Tensor | None, ...]:
        v_BF, w_FD = ctx.saved_tensors
        (g_BD,) = _operands(ctx.bf16, g_BD)
        d_W_FD = _weight_gradient(ctx.gradient, v_BF, g_BD, ctx.dtype) if ctx.needs_input_grad[1] else None
        d_values_BF = torch.mm(g_BD, w_FD.T, out=ctx.buffer(g_BD)).to(ctx.of_values)
        return d_values_BF, d_W_FD, None, None, None, None


def decode_dense(
    values_BF: Tensor,
    W_FD: Tensor,
    buffer: Buffer,
    *,
    bf16: bool = False,
    bf16_FD: Tensor | None = None,
    gradient: WeightGradient | None = None,
) -> Tensor:
    """Compute values W, [B, D]: `decode` in the dense layout.

    With `bf16` its products, of the backward pass too, are of bfloat16 operands; `bf16_FD` is W's copy in it.
    To `gradient`, where it is given, W's gradient is added.
    """
    return _DecodeDense.apply(values_BF, W_FD, buffer, bf16, bf16_FD, gradient)
