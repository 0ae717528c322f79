"""What the JumpReLU kinds share: the jump, and the rectangle kernel by which its gradient is estimated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def near(g: Tensor, distance: Tensor, bandwidth: float) -> Tensor:
    """Multiply g by the rectangle kernel: within half a bandwidth of the threshold, 0 elsewhere, in one
    pass."""
    return torch.ops.aten.hardtanh_backward(g, distance, -bandwidth / 2, bandwidth / 2)


class Jump(Function):
    """v 1[v > threshold]; the threshold's gradient is estimated by a rectangle kernel (Rajamanoharan et al.,
    Jumping Ahead, section 3, equation 11)."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(v, threshold)
        ctx.bandwidth = bandwidth
        return torch.ops.aten.threshold_backward(v, v - threshold, 0)  # v where v > threshold, in one pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        v, threshold = ctx.saved_tensors
        distance = v - threshold
        of_threshold = near(g, distance, ctx.bandwidth).sum_to_size(threshold.shape)
        d_threshold = of_threshold * (-threshold / ctx.bandwidth)
        return torch.ops.aten.threshold_backward(g, distance, 0), d_threshold, None
