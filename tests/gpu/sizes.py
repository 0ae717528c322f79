"""The shapes that are checked: those of training on a GPU, tiny ones elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from monosemy.architectures._jump import Jump
from monosemy.architectures.jump_relu import _Step
from monosemy.ops import power

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Sizes:
    every: tuple[int, int]  # B and F of all selections
    ordinary: tuple[tuple[int, int, int], ...]  # B, F and k of those that training uses
    sums: tuple[tuple[int, int, int, int], ...]  # B, D, F, k
    trained: tuple[int, int, int, int]  # B, D, F, k
    host: tuple[int, int, int, int]  # the same, of steps whose waits are counted


GPU = Sizes(
    every=(33, 130),
    ordinary=((64, 5000, 20), (2048, 16384, 80)),
    sums=((33, 24, 130, 7), (512, 576, 5000, 80), (48, 5120, 700, 20)),
    trained=(64, 64, 2048, 8),
    host=(2048, 512, 4096, 80),
)
TINY = Sizes(
    every=(9, 33),
    ordinary=((16, 100, 5),),
    sums=((9, 24, 33, 4),),
    trained=(32, 12, 64, 4),
    host=(64, 24, 128, 4),
)
SIZES = GPU if DEVICE.type == "cuda" else TINY


# the formulas of the dense layout, and of how many numbers of each latent
FORMULAS: list[tuple[str, int, Callable[..., Tensor]]] = [
    ("jump_relu", 1, lambda v, t: Jump.apply(v, t, 0.3)),
    ("jump_relu's L0", 1, lambda v, t: _Step.apply(v, t, 0.3)),
    ("gated", 3, lambda v, scale, b, b_mag: (scale * (v - b) + b_mag).relu()),
    ("p_anneal", 0, lambda v: power(v, 0.8)),
    ("tanh", 1, lambda v, t: torch.tanh(4 * v * t.exp()) + t.sigmoid()),
]
