"""Activations that have a sparse code: what tests train on where no language model is needed."""

from __future__ import annotations

import torch
from torch import Tensor

from monosemy.system.rng import generator


def batch(
    step: int, B: int, D: int, *, directions: int = 48, density: float = 0.08, scale: float = 1.0
) -> Tensor:
    """Sparse combinations [B, D] of fixed directions, of mean square norm about 1 at the density given.

    A function of its arguments alone: the same step is the same batch in every process.
    """
    table = torch.randn(directions, D, generator=generator(0, "directions"))
    draw = generator(0, "batch", step)
    strength = torch.rand(B, directions, generator=draw)
    strength = strength * (torch.rand(B, directions, generator=draw) < density)
    return scale * (strength @ torch.nn.functional.normalize(table, dim=1))
