"""Send the rows that a rank's forward found to the ranks whose SAEs read them.

N rows that a forward leaves, D width of a site, P parts of all sites, W ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

import torch
from torch import Tensor

from monosemy.lm.site_groups import AnySite
from monosemy.system.ranks import Ranks


class _Kind(NamedTuple):
    """What rows of a site are like."""

    width: int
    dtype: torch.dtype


class Exchange:
    """The traffic of activations between ranks, of which one alone has none.

    A round is a forward of each rank, or of each team of `together` neighbors that hold the language model
    together and all have its rows; of the last ones perhaps none. All ranks know how many rows every forward
    leaves, so that nothing but rows and norms travels: rows in the model's type to the ranks that read their
    site, norms in float32 to all. Members of a team send to different ranks.
    """

    def __init__(
        self,
        sites: Sequence[AnySite],
        readers: Mapping[AnySite, Set[int]],
        ranks: Ranks,
        together: int = 1,
    ) -> None:
        self.ranks, self.together = ranks, together
        self.team, self.teams = ranks.rank // together, ranks.size // together
        self.readers = {site: frozenset(readers[site]) for site in sites}
        self.read_here = [site for site in sites if ranks.rank in readers[site]]
        self.bytes_sent = 0
        self._kinds: dict[AnySite, _Kind] = {}

    def rows(self, site: AnySite, x_ND: Tensor | None, counts: Sequence[int]) -> list[Tensor]:
        """Return a site's rows [N, D] of each forward of a round, nothing where the site is not read here.

        `x_ND` are this rank's own, None where it has no forward; `counts` the numbers of rows. A collective.
        """
        if self.ranks.size == 1:
            return [] if x_ND is None else [x_ND]
        if site not in self._kinds:
            told = _Kind(0, torch.float32) if x_ND is None else _Kind(x_ND.shape[1], x_ND.dtype)
            self._kinds[site] = self.ranks.gather(told)[0]  # rank 0 has a forward in every round
        return self._sent(x_ND, counts, self.readers[site], self._kinds[site])

    def norms(self, norms_NP: Tensor | None, counts: Sequence[int], P: int) -> list[Tensor]:
        """Return the norms [N, P] of all parts of all sites, of each forward of a round. A collective."""
        if self.ranks.size == 1:
            return [] if norms_NP is None else [norms_NP]
        everyone = frozenset(range(self.ranks.size))
        return self._sent(norms_NP, counts, everyone, _Kind(P, torch.float32))

    def _sent(
        self,
        x_ND: Tensor | None,
        counts: Sequence[int],
        readers: Set[int],
        kind: _Kind,
    ) -> list[Tensor]:
        """Send rows of this rank to those that read them, and return those of all forwards."""
        width, dtype = kind
        nothing = torch.empty(0, dtype=torch.uint8, device=self.ranks.device)
        own = nothing if x_ND is None else x_ND.contiguous().view(-1).view(torch.uint8)
        here, T, others = self.ranks.rank, self.together, range(self.ranks.size)

        def pairs(rank: int) -> bool:
            """Whether rows travel between this rank and another."""
            return rank // T != self.team and rank % T == here % T

        to_each = [own if rank in readers and pairs(rank) else nothing for rank in others]
        sizes = [
            counts[rank // T] * width * dtype.itemsize
            if here in readers and pairs(rank) and rank // T < len(counts)
            else 0
            for rank in others
        ]
        self.bytes_sent += sum(len(message) for message in to_each)
        received = self.ranks.exchange(to_each, sizes)
        if here not in readers:
            return []
        found = [
            x_ND if team == self.team else received[team * T + here % T].view(dtype).view(N, width)
            for team, N in enumerate(counts)
        ]
        return [x for x in found if x is not None]
