"""What every launch needs: block sizes, warps, and the checks of its tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from triton import next_power_of_2


def block_size(wanted: int, least: int, most: int, F: int) -> int:
    """Return a power of two, no longer than a row needs."""
    return min(max(next_power_of_2(wanted), least), most, next_power_of_2(F))


ROWS = 32  # of [B, F] that a program of the dense layout takes


def columns(F: int) -> int:
    """Return the columns of [B, F] that such a program takes."""
    return block_size(512, 1, 512, F)


def warps_for(elements: int) -> int:
    """Return the warps of a program that works on so many elements at a time."""
    return min(max(elements // 512, 1), 16)


def key_bits(pre_BF: Tensor) -> int:
    """Return how many bits tell pre-activations apart, which kernels can take as they are."""
    assert pre_BF.is_contiguous(), "pre_BF: not contiguous"
    assert pre_BF.dtype in (torch.bfloat16, torch.float32), f"pre_BF: {pre_BF.dtype}"
    assert pre_BF.numel() < 2**31, "pre_BF: more elements than int32 can number"
    return 16 if pre_BF.dtype == torch.bfloat16 else 32


def on_device(threshold: Tensor | float, pre_BF: Tensor) -> Tensor:
    """Return the threshold on the device; a single number as torch compares with it, rounded to the precision
    of what is compared."""
    if not isinstance(threshold, Tensor):
        threshold = torch.full((), threshold, device=pre_BF.device)
    return threshold.contiguous() if threshold.ndim else threshold.to(pre_BF.dtype)


def require_floats(**tensors: Tensor) -> None:
    """Assert that tensors are contiguous and of a precision that kernels read and compute on in float32."""
    for name, t in tensors.items():
        known = t.dtype in (torch.float32, torch.bfloat16)
        assert t.is_contiguous() and known, f"{name}: not contiguous, or neither float32 nor bfloat16"


def require_float32(**tensors: Tensor) -> None:
    """Assert that tensors are contiguous and of float32, as kernels read them."""
    for name, t in tensors.items():
        assert t.is_contiguous() and t.dtype == torch.float32, f"{name}: not contiguous or not float32"
