"""`monosemy cache`: keep a model's activations in the order in which training takes them.

CACHE/manifest.json, SITE/shard-NNNNNN.safetensors; see data/shards.py
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any

from monosemy.config import TrainConfig
from monosemy.data.activation_cache import CacheWriter
from monosemy.data.contexts import StreamEnded
from monosemy.data.shards import MANIFEST, WRITING, Block, Manifest, Shard, SiteRows, Store, shard_name
from monosemy.errors import invalid
from monosemy.jobs.cache_config import CachePlan
from monosemy.jobs.cached import BLANKS, PLACES, RULES, flags
from monosemy.jobs.train import live_stream
from monosemy.lm.site_groups import AnySite
from monosemy.system.files import exclusive_lock
from monosemy.system.progress import Progress

log = logging.getLogger(__name__)


def cache(plan: CachePlan) -> str:
    """Keep a plan's activations. Returns "complete", or "stopped_early" where the text ran out.

    One that was broken off goes on after its last whole shard, to the same bits. Raises ValueError for a
    folder that holds something else, and for a disk without room.
    """
    done = plan.store.find(MANIFEST)
    if done is not None:
        return _already(plan, Manifest.parse(done, plan.store.url))
    with _locked(plan.store):
        progress = _begun(plan)
        plan.check_room(sum(s["bytes"] for of in progress.get("shards", {}).values() for s in of))
        if not progress:  # whose the folder is, before anything else is in it
            plan.store.write(WRITING, json.dumps({"settings": plan.settings(), "row": 0}).encode())
        rows = _Keeping(plan, progress).keep()
    status = "complete" if rows == plan.rows else "stopped_early"
    if status != "complete":
        log.warning("the text ran out after %d of %d activations of each site", rows, plan.rows)
    log.info("%s: %d activations of each site\ntrain: %s", plan.config.to, rows, _command(plan, rows))
    return status


def _already(plan: CachePlan, made: Manifest) -> str:
    """Return the status of a cache that is there. Raises ValueError where it is another one."""
    facts = {"model": made.model, "dtype": made.dtype, "sites": [str(site) for site in made.sites]}
    _check_same(plan, made.config | facts)
    log.info("%s already holds this cache", plan.config.to)
    return "complete" if made.rows == plan.rows else "stopped_early"


def _check_same(plan: CachePlan, was: dict[str, Any]) -> None:
    """Check that a cache was written or begun with a plan's settings. Raises ValueError."""
    now = plan.settings()
    flat = {name: value for name, value in now["config"].items() if name not in PLACES}
    flat |= {name: now[name] for name in ("model", "dtype", "sites")}
    changed = sorted(name for name in flat if flat[name] != was.get(name))
    if changed:
        shown = ", ".join(f"{name}={was.get(name)!r}, now {flat[name]!r}" for name in changed[:4])
        remedy = f"it holds another ({shown}): name another; nothing is overwritten"
        raise invalid("to", plan.config.to, "a new folder, or one with this cache", remedy)


def _begun(plan: CachePlan) -> dict[str, Any]:
    """Return how far a cache was written; nothing where it was not begun. Raises ValueError where another one
    was, or what is there cannot be read."""
    data = plan.store.find(WRITING)
    if data is None:
        plan.check_place()
        return {}
    try:
        progress = json.loads(data)
        settings = progress["settings"]
        was = settings["config"] | {name: settings[name] for name in ("model", "dtype", "sites")}
        mib = settings["shard_mib"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        remedy = f"its {WRITING} cannot be read ({error}): name another"
        raise invalid("to", plan.config.to, "a new folder, or one with this cache", remedy) from error
    _check_same(plan, was)
    if mib != plan.config.shard_mib:
        remedy = f"say --shard_mib {mib}, or name another folder"
        raise invalid("shard_mib", plan.config.shard_mib, f"{mib}, with which this cache was begun", remedy)
    return dict(progress)


def _locked(store: Store) -> AbstractContextManager[None]:
    """Keep other processes out of a folder; of what lies elsewhere nothing can tell."""
    return nullcontext() if store.local is None else exclusive_lock(store.local, "to")


class _Keeping:
    """Writes a cache, from its beginning or from where it was broken off."""

    def __init__(self, plan: CachePlan, progress: dict[str, Any]) -> None:
        self.plan, self.stream = plan, live_stream(plan.run)
        self.widths = {site: sum(self.stream.widths(site)) for site in plan.run.sites}
        self.rows_per_shard = plan.rows_per_shard(self.widths)
        self.batch = plan.run.config.sae_batch_size
        self.blocks = [Block(**block) for block in progress.get("blocks", [])]
        whole = {
            site: [Shard(**shard) for shard in progress.get("shards", {}).get(str(site), [])]
            for site in plan.run.sites
        }
        self._check_there(whole)
        self.row: int = progress.get("row", 0)
        if self.row:
            log.info("going on after %d activations of each site", self.row)
            self.stream.load_state_dict(progress["stream"])
        self.stream.wanted = plan.run.steps - self.row // self.batch
        self.writer = CacheWriter(
            plan.store, self.widths, dtype=plan.dtype, rows_per_shard=self.rows_per_shard, whole=whole
        )

    def keep(self) -> int:
        """Write to the end, the manifest last. Returns the rows of each site."""
        with closing(self.writer), Progress(self.plan.rows, "tok", "keeping") as progress:
            progress.update(self.row)
            for _ in self._steps():
                progress.update(self.batch)
            self._flush()
            self.writer.wait()
        if not self.row:
            raise invalid("dataset", self.plan.run.config.dataset, "text for at least one batch", "give more")
        self.plan.store.write(MANIFEST, self._manifest().dumps())
        self.plan.store.remove(WRITING)
        return self.row

    def _steps(self) -> Iterator[None]:
        """Add each step's rows to the shards, and write those that are full."""
        tokens = self.stream.counts["tokens"] if self.row else -1
        while self.row < self.plan.rows:
            try:
                rows = self.stream.next_rows()
            except StreamEnded:
                return
            if self.stream.counts["tokens"] != tokens:  # a block begins
                tokens = self.stream.counts["tokens"]
                self.blocks.append(Block(self.row, dict(self.stream.counts), dict(self.stream.text_counts)))
            self.writer.add(rows)
            self.row += self.batch
            if self.writer.full:
                self._flush()
            yield

    def _flush(self) -> None:
        """Begin to write the shard that was filled, and with it where to go on."""
        state = {
            "row": self.row,
            "settings": self.plan.settings(),
            "stream": self.stream.state_dict(),
            "blocks": [vars(block) for block in self.blocks],
        }
        self.writer.flush(state)

    def _check_there(self, whole: dict[AnySite, list[Shard]]) -> None:
        """Check the sizes of shards that were written before. Raises ValueError for one that is not whole."""
        for site, shards in whole.items():
            for number, shard in enumerate(shards):
                name = shard_name(site, number)
                if self.plan.store.size(name) != shard.bytes:
                    allowed = "the shards that were written before"
                    remedy = "one is not whole: begin in a new folder"
                    raise invalid("to", self.plan.store.place(name), allowed, remedy)

    def _manifest(self) -> Manifest:
        settings, stream = self.plan.settings(), self.stream
        sites = {
            site: SiteRows(
                stream.widths(site), stream.norm_factors[site], stream.norm_limits[site], tuple(shards)
            )
            for site, shards in self.writer.whole.items()
        }
        return Manifest(
            settings["model"],
            settings["config"],
            self.plan.dtype,
            self.row,
            self.rows_per_shard,
            sites,
            tuple(self.blocks),
            tuple(stream.damage()),
        )


def _command(plan: CachePlan, rows: int) -> str:
    """Return the command that trains from a cache."""
    c = plan.run.config
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    needed = {name: getattr(c, name) for name in ("model_name", *RULES) if name not in BLANKS}
    said = {name: value for name, value in needed.items() if value != defaults[name]}
    said = {"activations": plan.config.to} | said | {"num_tokens": rows}
    return f"monosemy train {flags(said)} --save_dir saes"
