"""What a run on several ranks needs beside what one process does: that all mean the same run and see the same
folder, and which SAEs each one trains."""

from __future__ import annotations

import dataclasses
import hashlib
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from monosemy.errors import invalid
from monosemy.jobs.dealing import deal, step_costs
from monosemy.jobs.folder import versions
from monosemy.jobs.forecast import Forecast
from monosemy.jobs.memory import Estimate
from monosemy.jobs.plan import Plan
from monosemy.lm.site_groups import AnySite
from monosemy.ops import LatentShards
from monosemy.rules import check_latent_shards, check_lm_shards
from monosemy.system.files import exclusive_lock
from monosemy.system.ranks import ANSWER, Ranks, agreed, lost

SOURCE = Path(__file__).parents[1]


class Deal:
    """The rank of each SAE of a run, by name, in the run's order."""

    def __init__(self, plan: Plan, ranks: Ranks) -> None:
        """Raises ValueError for more ranks than SAEs have shards, and where these do not divide the ranks."""
        self.plan, self.shards = plan, plan.config.latent_shards
        check_latent_shards(self.shards, min(plan.config.dictionary_widths), ranks=ranks.size)
        check_lm_shards(plan.config.lm_shards, ranks.size)
        units = ranks.size // self.shards
        self.among = ranks
        self.sites: dict[str, AnySite] = {
            f"{site.folder}/trainer_{i}": site for site in plan.sites for i in range(plan.saes_per_site)
        }
        dealt = [0] * len(self.sites) if units == 1 else deal(step_costs(plan), units)
        # the first of those that hold it
        self.ranks = {name: unit * self.shards for name, unit in zip(self.sites, dealt, strict=True)}
        self.own = {name for name in self.ranks if ranks.rank in self.holders(name)}

    def holders(self, name: str) -> range:
        """Return the ranks that hold an SAE: one, or those of its shards."""
        return range(self.ranks[name], self.ranks[name] + self.shards)

    @cached_property
    def memory(self) -> Estimate:
        """The memory that this rank takes, predicted."""
        if self.among.size == 1:
            return self.plan.memory
        c = self.plan.config
        told = Forecast(self.plan, self.among.size, latent_shards=self.shards, lm_shards=c.lm_shards)
        return told.memory[self.among.rank // self.shards]

    @property
    def readers(self) -> dict[AnySite, set[int]]:
        """The ranks that read each site."""
        found: dict[AnySite, set[int]] = {site: set() for site in self.sites.values()}
        for name, rank in self.ranks.items():
            found[self.sites[name]].update(range(rank, rank + self.shards))
        return found


def shards_among(ranks: Ranks, size: int) -> LatentShards | None:
    """Return this rank's place among the `size` neighboring ranks that hold SAEs together; None where each
    is held by one. A collective."""
    if size == 1:
        return None
    return LatentShards(_neighbors(ranks, size), ranks.rank % size, size, ranks.device, lost)


def team_among(ranks: Ranks, size: int) -> DeviceMesh | None:
    """Return the mesh of the `size` neighboring ranks that hold the language model together; None where each
    has all of it. A collective."""
    if size == 1:
        return None
    return DeviceMesh.from_group(_neighbors(ranks, size), ranks.device, mesh_dim_names=("tp",))


def _neighbors(ranks: Ranks, size: int) -> Any:
    """Make a process group of each `size` neighboring ranks, and return this rank's."""
    how: dict[str, Any] = {"backend": "nccl" if ranks.device == "cuda" else "gloo", "timeout": ANSWER}
    with lost():
        groups = [dist.new_group(list(range(r, r + size)), **how) for r in range(0, ranks.size, size)]
    return groups[ranks.rank // size]


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
