"""Where the active entries of a batch are: what selections make and what the sparse ops sum over.

An entry is a token and a latent. N entries are listed by token, and within a token by latent, both ascending.
A *bag* is what one decoded row sums: a token, or a group of a token's latents. B tokens, F latents, R bags.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

IN_CACHE = 2**18  # elements


def by_rows(values_BF: Tensor) -> Iterator[slice]:
    """Slices of rows that stay in a CPU's cache through several operations; on a GPU all rows at once."""
    B, F = values_BF.shape
    step = B if values_BF.is_cuda else max(IN_CACHE // F, 1)
    return (slice(b, b + step) for b in range(0, B, step))


class Selection(NamedTuple):
    """What a selection gives: the latent of each entry, where each token's entries begin, and the
    pre-activations there.

    `starts_B1` has one place more than there are tokens, so that its last says how many entries there are. On
    a GPU the lists have a fixed length, N is their capacity, and what lies behind the last entry is padding:
    latent 0, value 0.
    """

    latents_N: Tensor  # int32
    starts_B1: Tensor  # int32
    values_N: Tensor  # the weights' dtype

    def dense(self, F: int) -> Tensor:
        """The values where they were picked and zero elsewhere, [B, F]."""
        B = len(self.starts_B1) - 1
        tokens_N = Entries(self.latents_N, self.starts_B1, F).bags_N
        return self.values_N.new_zeros(B, F).index_put_((tokens_N, self.latents_N), self.values_N)


class Estimate(NamedTuple):
    """Pre-activations x W^T + b that a product of low precision gave, and what tells the exact ones.

    Of token b each is off by at most `error_B[b]` and `relative` of its own size. Selections look up in the
    operands whatever that leaves open, so that the latents and values that they pick are those of float32,
    and nothing in them tells how the estimate was made.
    """

    pre_BF: Tensor  # float32 or bfloat16
    error_B: Tensor  # float32
    relative: float
    x_BD: Tensor  # float32, as W and b
    W_FD: Tensor
    b_F: Tensor


class Entries:
    """The latents of the entries and the bags that they are summed into.

    What groups them by latent is made once, when first asked for.
    """

    def __init__(self, latents_N: Tensor, starts_R1: Tensor, F: int, *, padded: bool = False) -> None:
        self.latents_N, self.starts_R1, self.F, self.padded = latents_N, starts_R1, F, padded

    @property
    def R(self) -> int:
        return len(self.starts_R1) - 1

    @cached_property
    def valid_N(self) -> Tensor | None:
        """Which places hold entries; None where all do."""
        return (
            torch.arange(len(self.latents_N), device=self.latents_N.device) < self.starts_R1[-1]
            if self.padded
            else None
        )

    @cached_property
    def bags_N(self) -> Tensor:
        """The bag of each entry, int32 [N]; of padding the last."""
        if not self.padded:
            bags_R = torch.arange(self.R, dtype=torch.int32, device=self.latents_N.device)
            return torch.repeat_interleave(bags_R, self.starts_R1.diff(), output_size=len(self.latents_N))
        places_N = torch.arange(len(self.latents_N), dtype=torch.int32, device=self.latents_N.device)
        return torch.searchsorted(self.starts_R1[1:-1], places_N, right=True, out_int32=True)

    @cached_property
    def by_latent(self) -> tuple[Tensor, Tensor]:
        """The places of the entries in order of latents, int32 [N], and where each latent's begin, int32 [F +
        1]."""
        from monosemy.ops.forms import form

        return form(self.latents_N).group(self.latents_N, self.starts_R1, self.F)

    def rebagged(self, starts_R1: Tensor) -> Entries:
        """The same entries in other bags."""
        other = Entries(self.latents_N, starts_R1, self.F, padded=self.padded)
        other.__dict__["by_latent"] = self.by_latent
        return other
