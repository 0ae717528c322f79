"""What weights are before the first step: draws, unit rows, and the center of a batch.

B tokens, D d_in, F d_sae.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from monosemy.ops import LatentShards

if TYPE_CHECKING:
    from monosemy.sae import SAE

EPS = torch.finfo(torch.float32).eps
BLOCK = 2**24  # numbers that one shard draws at a time
ROWS = 16  # of a block at least: torch draws normal numbers by sixteens


class ShardGenerator(torch.Generator):
    """A generator of whose draws `uniform` and `normal` keep the latents of one shard."""

    shards: LatentShards

    @classmethod
    def of(cls, shards: LatentShards) -> ShardGenerator:
        generator = cls()
        generator.shards = shards
        return generator


def uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator, latents: int = 0) -> Tensor:
    """Draws from U(-bound, bound); `latents` is the dimension that a shard keeps a part of.

    An nn.Linear of n inputs takes its weight [out, in], then its bias, with bound n^-1/2.
    """
    return _drawn(shape, generator, latents, lambda x: x.uniform_(-bound, bound, generator=generator))


def normal(shape: tuple[int, ...], generator: torch.Generator, latents: int = 0) -> Tensor:
    """Draws from N(0, 1); `latents` is the dimension that a shard keeps a part of."""
    return _drawn(shape, generator, latents, lambda x: x.normal_(generator=generator))


def _drawn(
    shape: tuple[int, ...], generator: torch.Generator, latents: int, draw: Callable[[Tensor], Tensor]
) -> Tensor:
    """Draw an array. A shard draws all of it, some rows at a time, and keeps its part: the same bits."""
    if not isinstance(generator, ShardGenerator):
        return draw(torch.empty(shape))
    kept, rows = generator.shards.part(shape[latents]), shape[0]
    block = max(BLOCK * rows // max(torch.Size(shape).numel(), 1) // ROWS * ROWS, ROWS)
    starts = [*range(0, max(rows - block + 1, 1), block), rows]  # the last takes what is left
    parts = []
    for start, end in pairwise(starts):
        drawn = draw(torch.empty(end - start, *shape[1:]))
        if latents == 0:
            parts.append(drawn[max(kept.start - start, 0) : max(kept.stop - start, 0)].clone())
        else:
            parts.append(drawn[:, kept].clone())
    return torch.cat(parts)


def unit(x: Tensor, dim: int, eps: float = 0.0) -> Tensor:
    """Divide x by its norms along a dimension, plus eps."""
    return x / (torch.linalg.vector_norm(x, dim=dim, keepdim=True) + eps)


def reset_relu(sae: SAE, generator: torch.Generator) -> None:
    """Draw the initial weights of the ReLU kinds: decoder rows of norm 0.1, the encoder their transpose, a
    small random encoder bias.

    Drawn in dictionary_learning's order, which makes two linear layers first and keeps only the bias of one.
    """
    D, F = sae.d_in, sae.d_sae
    uniform((F, D), D**-0.5, generator)
    sae.b_enc.data.copy_(uniform((F,), D**-0.5, generator))
    uniform((D, F), F**-0.5, generator, latents=1)
    rows_FD = 0.1 * unit(normal((D, F), generator, latents=1), 0).T
    sae.init_directions(rows_FD)


@torch.no_grad()
def geometric_median(x_BD: Tensor, max_iter: int = 100, tol: float = 1e-5) -> Tensor:
    """Return the point with the least summed distance to the rows of x, [D], by Weiszfeld's iteration from
    their mean.

    A row that the guess falls on would weigh infinitely much and is kept at the largest finite weight of its
    distance.
    """
    guess_D = x_BD.mean(0)
    for _ in range(max_iter):
        weight_B = 1 / torch.linalg.vector_norm(x_BD - guess_D, dim=1).clamp(
            min=torch.finfo(x_BD.dtype).tiny ** 0.5
        )
        before_D, guess_D = guess_D, ((weight_B / weight_B.sum())[:, None] * x_BD).sum(0)
        if torch.linalg.vector_norm(guess_D - before_D) < tol:
            break
    return guess_D
