"""How well a label foretells a latent: balanced accuracy of a judge's verdicts, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z = 1.959964  # two-sided 95 %
DRAWS = 2000


@dataclass
class Tally:
    """A judge's verdicts on examples of which the latent is active in some (or the marks right), in others
    not."""

    hits: int = 0  # told as active, of `active`
    active: int = 0
    rejected: int = 0  # told as silent, of `silent`
    silent: int = 0

    def add(self, truth: Sequence[bool], verdicts: Sequence[bool]) -> None:
        for is_so, said in zip(truth, verdicts, strict=True):
            self.active += is_so
            self.hits += is_so and said
            self.silent += not is_so
            self.rejected += not is_so and not said

    @property
    def accuracy(self) -> float | None:
        """The mean of the shares told right of both kinds, .5 for guesses; None where a kind is lacking."""
        if not (self.active and self.silent):
            return None
        return (self.hits / self.active + self.rejected / self.silent) / 2

    def interval(self) -> tuple[float, float] | None:
        """Return the 95 % interval of the accuracy, from those of the two shares (Wilson, combined as by
        Zou and Donner 2008: squared distances from estimate to limit add up)."""
        if (middle := self.accuracy) is None:
            return None
        shares = [(self.hits, self.active), (self.rejected, self.silent)]
        limits = [_wilson(k, n) for k, n in shares]
        down = math.hypot(*(k / n - low for (k, n), (low, _) in zip(shares, limits, strict=True))) / 2
        up = math.hypot(*(high - k / n for (k, n), (_, high) in zip(shares, limits, strict=True))) / 2
        return max(middle - down, 0.0), min(middle + up, 1.0)


def _wilson(k: int, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share k / n."""
    p, z = k / n, Z * Z / n
    middle, half = (p + z / 2) / (1 + z), math.sqrt(p * (1 - p) * z + z * z / 4) / (1 + z)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def mean_with_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float | None, float | None]:
    """Return the mean over latents, and where 95 of 100 re-draws of the latents would fall; None for one."""
    x_N = np.asarray(values, np.float64)
    if len(x_N) < 2:
        return float(x_N.mean()), None, None
    draws = np.random.default_rng(seed).integers(0, len(x_N), (DRAWS, len(x_N)))
    low, high = np.quantile(x_N[draws].mean(1), (0.025, 0.975)).tolist()
    return float(x_N.mean()), low, high
