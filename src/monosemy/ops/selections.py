"""The encoder's product and selections of it, outside autograd; products of weights and their gradients.

B tokens, D d_in, F latents.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from monosemy.ops.backends import backend_for
from monosemy.ops.pattern import Estimate, Selection


class Workspace:
    """Large arrays that SAEs in training use one after the other, so that none is allocated in a step.

    A fresh array of [B, F] on a CPU costs as much as several passes over it: the system hands out its pages
    one by one.
    """

    def __init__(self) -> None:
        self.array: dict[tuple[Any, ...], Tensor] = {}
        self.parts: dict[str, Workspace] = {}

    def part(self, name: str) -> Workspace:
        """Return a workspace for what is used beside this one's arrays and not after them, the same one
        whenever the name is the same."""
        return self.parts.setdefault(name, Workspace())

    def __call__(self, name: str, like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return an array with any content, the same one whenever the name and the needs are the same."""
        dtype = dtype or like.dtype
        key, numel = (name, dtype, like.device), torch.Size(shape).numel()
        array = self.array.get(key)
        if array is None or array.numel() < numel:
            array = self.array[key] = torch.empty(numel, dtype=dtype, device=like.device)
        return array[:numel].view(shape)


@torch.no_grad()
def preactivations(
    x_BD: Tensor,
    W_FD: Tensor,
    b_F: Tensor,
    *,
    bf16: bool = False,
    bf16_copies: tuple[Tensor | None, Tensor | None] = (None, None),
    use_estimate: bool = False,
    workspace: Workspace | None = None,
) -> Tensor | Estimate:
    """Compute x W^T + b, [B, F], outside autograd; with `bf16` the product is of bfloat16 operands, and
    rounded to it. `bf16_copies` are those of W and b, as far as there are some.

    With `use_estimate`, where few are to be picked, an estimate may do, from which selections find the same
    ones as from the product of float32.
    """
    workspace = workspace or Workspace()
    bf16_FD, bf16_F = bf16_copies
    if bf16 and bf16_FD is None:
        bf16_FD = W_FD.bfloat16()
    if (
        use_estimate
        and (estimate := backend_for(x_BD).estimate(x_BD, W_FD, b_F, workspace, bf16_FD)) is not None
    ):
        return estimate
    if bf16_FD is not None:
        x_BD, W_FD, b_F = x_BD.bfloat16(), bf16_FD, b_F.bfloat16() if bf16_F is None else bf16_F
    return torch.addmm(b_F, x_BD, W_FD.T, out=workspace("pre", x_BD, len(x_BD), len(W_FD)))


def top_k(pre: Tensor | Estimate, k: int, among_F: Tensor | None = None) -> Selection:
    """Select the k largest of each token; with a mask `among_F` those of its latents alone, as many as there
    are up to k."""
    return backend_for(pre).top_k(pre, k, among_F)


def batch_top_k(pre: Tensor | Estimate, n: int) -> Selection:
    """Select the n largest of the whole batch."""
    return backend_for(pre).batch_top_k(pre, n)


def above(pre: Tensor | Estimate, threshold: Tensor | float, capacity: int | None = None) -> Selection:
    """Select everything above a threshold: a number, or one for each latent [F].

    On a GPU the lists hold `capacity` entries.
    """
    return backend_for(pre).above(pre, threshold, capacity)


def product(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Multiply matrices. On a GPU a product of bfloat16 ones is not rounded to it on the way to `dtype`."""
    if a.dtype != dtype and a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    if out is None:
        return (a @ b).to(dtype)
    return torch.mm(a, b, out=out) if a.dtype == dtype else out.copy_(a @ b)


def d_b_dec(d_b_F: Tensor, W_FD: Tensor, rows_FD: Tensor | None) -> Tensor:
    """Return b_dec's gradient from that of b_enc: b_dec enters every pre-activation by W_enc."""
    if rows_FD is None:
        return -(d_b_F @ W_FD)
    return -product(d_b_F.to(rows_FD.dtype)[None], rows_FD, d_b_F.dtype)[0]
