"""Deal work to workers by what it costs. Nothing here imports torch."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from monosemy.errors import invalid


def deal(costs: Sequence[float], ranks: int) -> list[int]:
    """Return the rank of each SAE: the costliest first, each to the rank with the least to do until then.

    The same costs always give the same ranks. Of equal costs the earlier SAE goes first, of equal loads the
    rank with fewer SAEs, then the lower one; so no rank is left without one. Raises ValueError for more ranks
    than SAEs.

    The longest rank has at most 4/3 - 1/(3 ranks) times what the best deal gives it (Graham, Bounds on
    Multiprocessing Timing Anomalies, 1969, theorem 2).
    """
    if not 1 <= ranks <= len(costs):
        allowed = f"1 to {len(costs)}, the SAEs of the run: each lives on one rank"
        remedy = (
            "start fewer processes (torchrun's --nproc_per_node times --nnodes), train more SAEs, or split "
            "each over several ranks by --latent_shards"
        )
        raise invalid("ranks", ranks, allowed, remedy)
    assert all(cost >= 0 for cost in costs), costs
    loads = [(0.0, 0, rank) for rank in range(ranks)]
    dealt = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, number, rank = loads[0]
        dealt[i] = rank
        heapq.heapreplace(loads, (load + costs[i], number + 1, rank))
    return dealt
