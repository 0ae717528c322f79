"""Where the active entries of a batch are: what selections make and what the sparse ops sum over.

An entry is a token and a latent. N entries are listed by token, and within a token by latent, both ascending.
A *bag* is what one decoded row sums: a token, or a group of a token's latents. B tokens, F latents, R bags.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from monosemy.limits import IN_CACHE
from monosemy.system.streams import aside

# on rows: none, or the two ways of keeping their norm that the papers' codes differ in
Constraint = Literal["free", "project", "constrain"]
Sort = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def by_rows(values_BF: Tensor) -> Iterator[slice]:
    """Slices of rows that stay in a CPU's cache through several operations; on a GPU all rows at once."""
    B, F = values_BF.shape
    step = B if values_BF.is_cuda else max(IN_CACHE // F, 1)
    return (slice(b, b + step) for b in range(0, B, step))


class Selection(NamedTuple):
    """What a selection gives: the latent of each entry, where each token's entries begin, and the
    pre-activations there.

    `offsets_B1` has one place more than there are tokens, so that its last says how many entries there are.
    On a GPU the lists have a fixed length, N is their capacity, and what lies behind the last entry is
    padding: latent 0, value 0.
    """

    indices_N: Tensor  # int32
    offsets_B1: Tensor  # int32
    values_N: Tensor  # the weights' dtype

    def dense(self, F: int) -> Tensor:
        """Return the values where they were picked and zero elsewhere, [B, F]."""
        B = len(self.offsets_B1) - 1
        tokens_N = SparsePattern(self.indices_N, self.offsets_B1, F).bags_N
        return self.values_N.new_zeros(B, F).index_put_((tokens_N, self.indices_N), self.values_N)


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


@dataclass
class RowNorms:
    """What the optimizer will ask of a weight's gradient, left by the kernel that writes it: the norm of each
    row as the update takes it, by parts of rows, [F, K]; None where no kernel could tell."""

    p_FD: Tensor
    """The weight."""
    constraint: Constraint
    """On its rows."""
    of_parts_FK: Tensor | None = None
    gradient_FD: Tensor | None = None
    """What they are the norms of."""


class _ByLatent:
    """The order of entries by latent, sorted once for all bags that they are in."""

    def __init__(self, indices_N: Tensor, offsets_R1: Tensor, F: int) -> None:
        self.entries = indices_N, offsets_R1, F
        self.begun: Callable[[], tuple[Tensor, Tensor]] | None = None
        self.found: tuple[Tensor, Tensor] | None = None

    def begin(self, sort: Sort) -> None:
        self.begun = aside(partial(sort, *self.entries))

    def sorted(self, sort: Sort) -> tuple[Tensor, Tensor]:
        if self.found is None:
            self.found = sort(*self.entries) if self.begun is None else self.begun()
        return self.found


class SparsePattern:
    """The latents of the entries and the bags that they are summed into.

    What groups them by latent is made once, when first asked for.
    """

    def __init__(self, indices_N: Tensor, offsets_R1: Tensor, F: int, *, padded: bool = False) -> None:
        self.indices_N, self.offsets_R1, self.F, self.padded = indices_N, offsets_R1, F, padded
        self._by_latent = _ByLatent(indices_N, offsets_R1, F)

    @property
    def R(self) -> int:
        return len(self.offsets_R1) - 1

    @cached_property
    def valid_N(self) -> Tensor | None:
        """Which places hold entries; None where all do."""
        return (
            torch.arange(len(self.indices_N), device=self.indices_N.device) < self.offsets_R1[-1]
            if self.padded
            else None
        )

    @cached_property
    def bags_N(self) -> Tensor:
        """The bag of each entry, int32 [N]; of padding the last."""
        if not self.padded:
            bags_R = torch.arange(self.R, dtype=torch.int32, device=self.indices_N.device)
            return torch.repeat_interleave(bags_R, self.offsets_R1.diff(), output_size=len(self.indices_N))
        places_N = torch.arange(len(self.indices_N), dtype=torch.int32, device=self.indices_N.device)
        return torch.searchsorted(self.offsets_R1[1:-1], places_N, right=True, out_int32=True)

    def by_latent(self, sort: Sort) -> tuple[Tensor, Tensor]:
        """Return the places of the entries in order of latents, int32 [N], and the latents' offsets, int32 [F
        + 1].

        `sort` is a backend's `sort_by_latent`; all give the same order, which is kept.
        """
        return self._by_latent.sorted(sort)

    def sort_aside(self, sort: Sort) -> None:
        """Begin to sort, beside what a GPU does until `by_latent` asks for it."""
        self._by_latent.begin(sort)

    def rebagged(self, offsets_R1: Tensor) -> SparsePattern:
        """Return the same entries in other bags."""
        other = SparsePattern(self.indices_N, offsets_R1, self.F, padded=self.padded)
        other._by_latent = self._by_latent
        return other
