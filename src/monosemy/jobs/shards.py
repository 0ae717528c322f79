"""One task's share of a run: some of its sites, or some of the SAEs of a site, as a run of its own.

Each share is an ordinary run in a folder of its own, SAVE_DIR/shard_I_of_N. So no two processes write one
folder, and a share that is complete is passed over when all are started again. An SAE depends on nothing but
its own settings and the order of the text, which the shares have in common: all shares together have the SAEs
of one run, to the bit. Each share runs the language model by itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monosemy.config import TrainConfig
from monosemy.errors import invalid
from monosemy.jobs.balance import deal
from monosemy.lm.site_groups import AnySite, SiteGroup, SitePair, single_sites

if TYPE_CHECKING:
    from monosemy.sae import SAE


AXES = ("random_seeds", "learning_rates", "architectures", "dictionary_widths")


@dataclass(frozen=True)
class Share:
    """Some of a run's sites, and of its grid as much as these settings say."""

    sites: tuple[AnySite, ...]
    settings: Mapping[str, tuple[Any, ...]]


def share_of(
    c: TrainConfig, sites: Sequence[AnySite], kinds: Mapping[str, type[SAE]], contexts: int
) -> TrainConfig:
    """Return the configuration of the share that `c.shard` names, of a run at `sites`, evaluated on as many
    held-out contexts.

    Raises ValueError for more shares than SAEs.
    """
    assert c.shard is not None
    index, number = map(int, c.shard.split("/"))
    axes = {name: getattr(c, name) for name in AXES}
    sweeps = {kind.sweep_flag: kind.sweep_of(c) for kind in kinds.values() if kind.sweep_flag}
    shares = split(Share(tuple(sites), axes | sweeps), number, kinds)
    if len(shares) < number:
        allowed = f"I/N with N up to {len(shares)}, the shares that the run's sites and SAEs make"
        raise invalid("shard", c.shard, allowed, "start fewer tasks")
    share = shares[index]
    changes: dict[str, Any] = dict(share.settings) | {
        "layers": (),
        "transcode": (),
        "cross_layer": False,
        "crosscode": (),
        "sites": tuple(map(str, share.sites)),
    }
    # what the share has no use for, which would be refused
    if not any(isinstance(site, SitePair) for site in share.sites):
        changes["skip_connection"] = False
    if not any(isinstance(site, SiteGroup) for site in share.sites):
        changes["crosscoder_mask"] = "full"
    if not any(site.other for site in single_sites(share.sites)):
        changes |= {"diff_model": None, "diff_revision": None}
    folder = str(Path(c.save_dir) / f"shard_{index}_of_{number}")
    return dataclasses.replace(c, **changes, save_dir=folder, shard=None, eval_num_inputs=contexts)


def split(whole: Share, number: int, kinds: Mapping[str, type[SAE]]) -> list[Share]:
    """Split a run into shares of whole sites, in order; where there are more shares than sites, then by
    seeds, learning rates, architectures, widths and at last sparsities.

    Returns fewer than `number` where there are not enough SAEs. Layers stay together, for the deepest of a
    share says how much of the language model runs.
    """
    axis = "sites" if len(whole.sites) > 1 else _axis(whole, kinds)
    if number == 1 or axis is None:
        return [whole]
    if axis == "sites":
        pieces = [dataclasses.replace(whole, sites=part) for part in _runs(whole.sites, number)]
    else:
        values = whole.settings[axis]
        parts = _by_cost(values, number) if axis == "dictionary_widths" else _runs(values, number)
        pieces = [dataclasses.replace(whole, settings=dict(whole.settings) | {axis: part}) for part in parts]
    numbers = _numbers([_count(piece, kinds) for piece in pieces], number)
    return [share for piece, n in zip(pieces, numbers, strict=True) for share in split(piece, n, kinds)]


def _axis(share: Share, kinds: Mapping[str, type[SAE]]) -> str | None:
    """Return the first setting by which a site's SAEs can be split; sparsities only of a single
    architecture."""
    (*others, last) = share.settings["architectures"]
    flag = [] if others or not kinds[last].sweep_flag else [kinds[last].sweep_flag]
    return next((name for name in [*AXES, *flag] if len(share.settings[name]) > 1), None)


def _count(share: Share, kinds: Mapping[str, type[SAE]]) -> int:
    """Return how many SAEs a share could be split into."""
    settings = share.settings
    of_kinds = [
        len(settings[kinds[name].sweep_flag]) if kinds[name].sweep_flag else 1
        for name in settings["architectures"]
    ]
    lengths = [len(settings[name]) or 1 for name in AXES if name != "architectures"]
    return len(share.sites) * math.prod(lengths) * sum(of_kinds)


def _numbers(sizes: Sequence[int], number: int) -> list[int]:
    """Return into how many shares each piece is split: one at least, and one more of the piece whose shares
    are the largest until then."""
    numbers = [1] * len(sizes)
    for _ in range(number - len(sizes)):
        ahead = [i for i, size in enumerate(sizes) if numbers[i] < size]
        if not ahead:
            break
        numbers[max(ahead, key=lambda i: sizes[i] / numbers[i])] += 1
    return numbers


def _runs(values: tuple[Any, ...], number: int) -> list[tuple[Any, ...]]:
    """Part values into at most `number` runs of neighbors whose lengths differ by one at most."""
    number = min(number, len(values))
    ends = [len(values) * i // number for i in range(number + 1)]
    return [values[a:b] for a, b in pairwise(ends)]


def _by_cost(widths: tuple[int, ...], number: int) -> list[tuple[int, ...]]:
    """Part widths into at most `number` parts that cost about the same."""
    dealt = deal(widths, number := min(number, len(widths)))
    return [tuple(w for w, at in zip(widths, dealt, strict=True) if at == part) for part in range(number)]
