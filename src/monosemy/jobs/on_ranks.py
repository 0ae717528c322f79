"""What a run on several ranks needs beside what one process does: that all mean the same run and see the same
folder, and which SAEs each one trains."""

from __future__ import annotations

import dataclasses
import hashlib
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from monosemy.errors import invalid
from monosemy.jobs.dealing import deal, saes, step_costs
from monosemy.jobs.folder import versions
from monosemy.jobs.plan import Plan
from monosemy.lm.site_groups import AnySite, CrossLayer, SiteGroup
from monosemy.ops import LatentShards
from monosemy.rules import check_latent_shards
from monosemy.system.files import exclusive_lock
from monosemy.system.ranks import Ranks, agreed

SOURCE = Path(__file__).parents[1]


class Deal:
    """The unit of each SAE of a run, by name, in the run's order: the rank that trains it, or the next
    `latent_shards` ranks that do so together."""

    def __init__(self, plan: Plan, ranks: Ranks) -> None:
        """Raises ValueError for more units than SAEs, and for latents that cannot be split so."""
        self.among, self.each = ranks, plan.config.latent_shards
        check_shards(plan, ranks.size)
        self.sites: dict[str, AnySite] = {
            f"{site.folder}/trainer_{i}": site for site in plan.sites for i in range(plan.saes_per_site)
        }
        units = ranks.size // self.each
        dealt = [0] * len(self.sites) if units == 1 else deal(step_costs(plan), units)
        self.units = dict(zip(self.sites, dealt, strict=True))
        self.own = {name for name, unit in self.units.items() if unit == ranks.rank // self.each}

    @property
    def readers(self) -> dict[AnySite, set[int]]:
        """The ranks that read each site."""
        found: dict[AnySite, set[int]] = {site: set() for site in self.sites.values()}
        for name, unit in self.units.items():
            found[self.sites[name]] |= set(range(unit * self.each, (unit + 1) * self.each))
        return found

    def shards(self) -> LatentShards | None:
        """Return this rank's place in its unit; None where SAEs are whole. A collective."""
        if self.each == 1:
            return None
        here = self.among.rank // self.each
        groups = [self.among.group(range(u, u + self.each)) for u in range(0, self.among.size, self.each)]
        return LatentShards(groups[here], self.among.rank % self.each, self.each, self.among.device)


def check_shards(plan: Plan, ranks: int) -> None:
    """Raises ValueError for latents that cannot be split as a plan asks, over so many ranks."""
    c = plan.config
    if c.latent_shards > 1 and c.save_checkpoints:
        allowed = "left out where SAEs are sharded: snapshots are whole"
        raise invalid("save_checkpoints", True, allowed, "leave it out")
    for site, spec in saes(plan):
        whole = "crosscoders and cross-layer transcoders" if isinstance(site, SiteGroup | CrossLayer) else ""
        check_latent_shards(c.latent_shards, spec.d_sae, ranks=ranks, whole_kind=whole)


def fingerprint(plan: Plan) -> dict[str, Any]:
    """Return what has to be the same on all ranks."""
    return {
        **{f"--{name}": value for name, value in plan.config.as_dict().items()},
        "folder": str(plan.folder.absolute()),
        **{
            f"version of {name}": found for name, found in (versions() | {"torch": torch.__version__}).items()
        },
        "source of monosemy": _digest(SOURCE),
        "model": dataclasses.asdict(plan.model),
        "other model": plan.other and dataclasses.asdict(plan.other),
    }


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def one_folder(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Lock a run's folder by rank 0.

    Raises ValueError where another run has it, or where not all ranks see the same folder.
    """
    with ExitStack() as stack:

        def locked() -> None:
            if ranks.leads:
                stack.enter_context(exclusive_lock(folder, "save_dir"))

        agreed(locked, ranks)
        if ranks.size > 1:
            mark = folder / ranks.first(lambda: _marked(folder))
            agreed(lambda: _check_seen(mark), ranks)
            if ranks.leads:
                mark.unlink()
        yield


def _marked(folder: Path) -> str:
    mark = folder / f".seen_by_all_ranks_{uuid.uuid4().hex}"
    mark.touch()
    return mark.name


def _check_seen(mark: Path) -> None:
    if not mark.is_file():
        allowed = "one folder that all ranks see, as on a shared disk"
        raise invalid("save_dir", str(mark.parent), allowed, "name one on a disk that all machines mount")
