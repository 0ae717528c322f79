"""Settings and plan of `monosemy cache`. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from monosemy.config import ActivationsConfig, DataConfig, ModelConfig, TrainConfig
from monosemy.data.shards import DTYPES, WRITING, Store
from monosemy.errors import invalid
from monosemy.jobs.cached import kept_settings, model_facts
from monosemy.jobs.memory import size
from monosemy.jobs.plan import Plan
from monosemy.lm.site_groups import AnySite, parts
from monosemy.rules import ABOVE_0, Rule, check
from monosemy.system.files import LOCK

OURS = (LOCK, f".{WRITING}.part")  # what a cache leaves that was killed at once


@dataclass(frozen=True)
class CacheOutput:
    """Where activations are kept, and how."""

    to: Annotated[str, Rule(bool, "a folder's path or a URL", "name one, such as --to activations")]
    """Folder or URL of the cache, such as s3://BUCKET/PREFIX. Where it was begun, it goes on."""
    _: KW_ONLY
    store_dtype: Literal["bfloat16", "model"] = "bfloat16"
    """Precision of what is kept; with model, that of the model, so that batches are those of a live run to
    the bit."""
    shard_mib: Annotated[float, ABOVE_0] = 128
    """Size of a file in MiB, of the widest site; two of each site are held in memory. Larger ones suit object
    stores."""
    dry_run: bool = False
    """Check everything, print what will be kept and how much room it takes, and stop."""


CACHE_GROUPS: dict[str, type] = {
    "cache": CacheOutput,
    "model": ModelConfig,
    "data": DataConfig,
    "activations": ActivationsConfig,
}


@dataclass(frozen=True)
class CacheConfig(ActivationsConfig, DataConfig, ModelConfig, CacheOutput):
    """Keep a model's activations on a disk or an object store, shuffled, in the order in which training takes
    them, for `monosemy train --activations`.

    Flags are those of `monosemy train`; a run with the same ones trains on the same batches.
    """

    def __post_init__(self) -> None:
        check(self)

    def of_run(self) -> TrainConfig:
        """Return the settings of a run on the same activations."""
        own = {field.name for field in dataclasses.fields(CacheOutput)}
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in own}
        return TrainConfig(save_dir=".", eval_num_inputs=1, **shared)


@dataclass(frozen=True)
class CachePlan:
    """What will be kept: a configuration with its blanks filled in, and its sizes."""

    config: CacheConfig
    run: Plan
    store: Store

    @classmethod
    def from_config(cls, config: CacheConfig) -> CachePlan:
        """Check a configuration and fill its blanks in. Writes nothing.

        Raises ValueError for what the configuration has wrong, and where the disk has no room.
        """
        store = Store(config.to, "to", config.retry_seconds)
        return cls(config, Plan.for_cache(config.of_run()), store)

    @property
    def dtype(self) -> str:
        """The precision of what is kept."""
        return self.run.config.dtype if self.config.store_dtype == "model" else "bfloat16"

    @property
    def rows(self) -> int:
        """Rows of each site."""
        return self.run.steps * self.run.config.sae_batch_size

    @cached_property
    def widths(self) -> dict[AnySite, int]:
        """The width of each site's rows, as far as it is known before the model is loaded."""
        return {site: self.run.model.d_model * len(parts(site)) for site in self.run.sites}

    @property
    def bytes(self) -> int:
        """Bytes of all rows."""
        return self.rows * sum(self.widths.values()) * DTYPES[self.dtype][1]

    def rows_per_shard(self, widths: Mapping[AnySite, int]) -> int:
        """Return how many rows a shard of every site has: whole batches, of the widest site `shard_mib` at
        most."""
        batch = self.run.config.sae_batch_size
        fit = int(self.config.shard_mib * 2**20) // (max(widths.values()) * DTYPES[self.dtype][1])
        return min(max(fit // batch, 1), self.run.steps) * batch

    def settings(self) -> dict[str, Any]:
        """Return all that what is kept depends on, as JSON has it."""
        run = self.run
        facts = model_facts(run.model, run.other, run.config.dtype)
        sites = [str(site) for site in run.sites]
        how = {"dtype": self.dtype, "shard_mib": self.config.shard_mib, "sites": sites}
        return {"model": facts, "config": kept_settings(run.config), **how}

    def check_room(self, written: int = 0) -> None:
        """Check that the disk has room for what is not yet written. Raises ValueError."""
        needed, free = self.bytes - written, self.free
        if free is not None and needed > free:
            allowed = f"a disk with {size(needed)} free; this one has {size(free)}"
            remedy = "keep fewer tokens or sites, or name another place"
            raise invalid("to", self.config.to, allowed, remedy)

    def check_place(self) -> None:
        """Check that nothing else is in the cache's folder. Raises ValueError."""
        folder = self.store.local
        if folder is None or not folder.exists():
            return
        if not folder.is_dir() or any(path.name not in OURS for path in folder.iterdir()):
            remedy = "it holds something else: name another; nothing is overwritten"
            raise invalid("to", str(folder), "a new or empty folder, or one with this cache", remedy)

    @property
    def free(self) -> int | None:
        """Bytes that the disk has free; None where that is not known."""
        folder = self.store.local
        if folder is None:
            return None
        there = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())
        return shutil.disk_usage(there).free

    def describe(self) -> str:
        """Describe what will be kept in words."""
        c, run = self.run.config, self.run
        per_shard = self.rows_per_shard(self.widths)
        rounded = "" if self.dtype == c.dtype else f", rounded from the model's {c.dtype}"
        free = "" if self.free is None else f"; its disk has {size(self.free)} free"
        shards = -(-self.rows // per_shard)
        memory = min(shards, 2) * per_shard * sum(self.widths.values()) * DTYPES[self.dtype][1]
        chat = f" and {c.chat_dataset}" if c.mixed_dataset else ""
        return (
            f"{run.model.name} in {c.dtype}: {', '.join(map(str, run.sites))}\n"
            f"{self.rows:,} activations of each site in {self.dtype}{rounded}, shuffled within "
            f"{run.contexts_per_block} contexts\n"
            f"text: {c.dataset}{chat}, contexts of {c.context_length}\n"
            f"{size(self.bytes)} in {shards * len(run.sites)} shards of {per_shard:,} rows{free}\n"
            f"memory of shards: {size(memory)}\n"
            f"to: {self.config.to}"
        )
