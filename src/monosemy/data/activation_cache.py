"""Keep activations in the order in which training takes them, and train from them without the language model.

Rows are kept as the model gave them, before they are divided by the norm factor, so that batches come out
the same to the bit where the cache has the model's precision, and else from the same rows, rounded.

B tokens of a batch, D width of a site, R rows of a shard.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from monosemy.data.prefetch import Prefetcher
from monosemy.data.shards import (
    TENSOR,
    WRITING,
    Block,
    Buffer,
    Damaged,
    Manifest,
    Shard,
    Store,
    shard_name,
    tensor_in,
)
from monosemy.errors import EndOfData, invalid
from monosemy.lm.site_groups import AnySite


class CachedActivations:
    """Serve scaled batches {site: [B, D]} in float32 of a cache, as `ActivationStream` serves the model's.

    Rows are read in their order, a thread ahead of training, and each shard's digest is checked before its
    first row is served. Raises `Damaged` (a ValueError) for a shard that is not as it was written and
    `ActivationsUnavailable` for one that cannot be read now. Where a batch of another size is asked for than
    the cache was written for, the same rows come in the same order.
    """

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        sites: Sequence[AnySite],
        *,
        batch: int,
        device: torch.device,
        served: Collection[AnySite] | None = None,
    ) -> None:
        """`served` are those of the sites whose rows are read, of one rank of several."""
        self.store, self.manifest, self.sites = store, manifest, tuple(sites)
        self.batch, self.device = batch, device
        self.dtype = getattr(torch, manifest.model["dtype"])
        of = {site: manifest.sites[site] for site in self.sites}
        self.norm_factors = {site: of[site].norm_factor for site in self.sites}
        self.norm_limits = {site: of[site].norm_limit for site in self.sites}
        self.wanted: int | None = None
        """Batches still to be asked for, if known: nothing after them is read ahead."""
        self.on_contexts: Callable[[int], None] = lambda n: None
        """Called by `ActivationStream` alone; here no contexts are read."""
        self.bytes_sent = 0
        """To other ranks: each reads the cache by itself."""
        self._row = 0  # the next to be served
        self._served = [site for site in self.sites if served is None or site in served]
        self._scale = {site: self._divisor(site).to(device) for site in self._served}
        self._shard, self._rows = -1, {site: torch.empty(0) for site in self._served}
        self._ahead: Prefetcher[Buffer] | None = None

    def next(self) -> dict[AnySite, Tensor]:
        """Return the batch of the next step, [B, D] in float32 by site. Raises EndOfData after the last."""
        end = self._row + self.batch
        if end > self.manifest.rows:
            raise EndOfData(f"the cache has no more than {self.manifest.rows:,} rows")
        rows = self._between(self._row, end)
        self._row = end
        if self.wanted is not None:
            self.wanted -= 1
        # as in ActivationStream.next, whose bits these are
        return {site: self._send(x_BD) / self._scale[site] for site, x_BD in rows.items()}

    def widths(self, site: AnySite) -> tuple[int, ...]:
        """Return the widths of the parts of a site's rows."""
        return self.manifest.sites[site].widths

    @property
    def counts(self) -> Counter[str]:
        """Count as `ActivationStream` does, up to the end of the block that the last row is of."""
        block = self._block()
        return Counter(block.counts) if block else Counter()

    @property
    def text_counts(self) -> dict[str, int]:
        """Count what was read of the text up to there."""
        block = self._block()
        return block.text_counts if block else {}

    def damage(self) -> list[str]:
        """Describe the sources that were damaged when the cache was written."""
        return list(self.manifest.damage)

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to go on with the next batch."""
        return {"cache": self.manifest.digest, "row": self._row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, at once. Raises ValueError where it is not of this cache."""
        if state.get("cache") != self.manifest.digest:
            remedy = "train in another folder, or name the cache that this run was begun with"
            raise invalid("activations", self.store.url, "the cache that the checkpoint is of", remedy)
        self._row, self._shard = state["row"], -1
        self.close()

    def close(self) -> None:
        """End the reading thread."""
        if self._ahead is not None:
            self._ahead.close()
        self._ahead = None

    def _block(self) -> Block | None:
        number = bisect_right([block.row for block in self.manifest.blocks], max(self._row - 1, 0)) - 1
        return self.manifest.blocks[number] if number >= 0 else None

    def _divisor(self, site: AnySite) -> Tensor:
        """Return what a site's rows are divided by, as ActivationStream does."""
        factors = torch.tensor(self.norm_factors[site], dtype=torch.float32)
        return factors if len(factors) == 1 else factors.repeat_interleave(torch.tensor(self.widths(site)))

    def _send(self, x_BD: Tensor) -> Tensor:
        return x_BD.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else x_BD

    def _between(self, row: int, end: int) -> dict[AnySite, Tensor]:
        """Return the rows from one to another, [B, D] by site, on the host."""
        pieces: dict[AnySite, list[Tensor]] = {site: [] for site in self._served}
        while row < end:
            number, at = divmod(row, self.manifest.rows_per_shard)
            self._open(number)
            n = min(end - row, self.manifest.rows_per_shard - at)
            for site, of in pieces.items():
                of.append(self._rows[site][at : at + n])
            row += n
        return {site: of[0] if len(of) == 1 else torch.cat(of) for site, of in pieces.items()}

    def _open(self, number: int) -> None:
        """Take up the next shard of every site."""
        if number == self._shard:
            return
        if self._ahead is None:
            # a shard of every site ahead; the thread holds one more
            shards = _shards(self.store, self.manifest, self._served, number, self._last_shard())
            self._ahead = Prefetcher(shards, max(len(self._served) - 1, 1))
        try:
            for site in self._served:
                self._rows[site] = torch.empty(0)  # before its successor is held
                self._rows[site] = _rows(next(self._ahead), self.manifest, site)
        except StopIteration:  # more is asked for than was wanted
            self.close()
            return self._open(number)
        except Exception:  # a later call tries again
            self.close()
            raise
        self._shard = number

    def _last_shard(self) -> int:
        rows = self.manifest.rows
        if self.wanted is not None:
            rows = min(rows, self._row + max(self.wanted, 1) * self.batch)
        return -(-rows // self.manifest.rows_per_shard)


def _shards(
    store: Store, manifest: Manifest, sites: Sequence[AnySite], begin: int, end: int
) -> Iterator[Buffer]:
    """Read the shards from one to another, of each site in turn.

    The thread that does it holds no stream, which can go meanwhile, and no tensors, which would take it into
    C++ while the interpreter ends: that aborts the process.
    """
    for number in range(begin, end):
        for site in sites:
            yield read_shard(store, manifest, site, number)


def read_shard(store: Store, manifest: Manifest, site: AnySite, number: int) -> Buffer:
    """Read the bytes of a shard's rows and check its digest.

    Raises `Damaged` and `ActivationsUnavailable`.
    """
    of, name = manifest.sites[site], shard_name(site, number)
    rows = min(manifest.rows_per_shard, manifest.rows - number * manifest.rows_per_shard)
    shape = (rows, sum(of.widths))
    data = store.read(name, of.shards[number])
    try:
        return tensor_in(data, shape, manifest.dtype)
    except ValueError as error:
        allowed = f"{shape[0]} rows of {shape[1]} in {manifest.dtype}"
        raise Damaged(str(invalid(store.field, store.place(name), allowed, f"{error}"))) from error


def _rows(values: Buffer, manifest: Manifest, site: AnySite) -> Tensor:
    """Return the bytes of a shard's rows as what they are, [R, D]; no copy."""
    width = sum(manifest.sites[site].widths)
    return torch.from_numpy(values).view(getattr(torch, manifest.dtype)).view(-1, width)


class CacheWriter:
    """Write rows as shards of equal numbers of rows, with a thread; and after each what is needed to go on.

    `whole` are the digests of the shards that are written, by site.
    """

    def __init__(
        self,
        store: Store,
        widths: Mapping[AnySite, int],
        *,
        dtype: str,
        rows_per_shard: int,
        whole: Mapping[AnySite, Sequence[Shard]] | None = None,
    ) -> None:
        self.store, self.widths, self.rows_per_shard = store, dict(widths), rows_per_shard
        self.dtype = getattr(torch, dtype)
        self.whole = {site: list((whole or {}).get(site, ())) for site in self.widths}
        self._rows, self._filled = self._allocate(), 0
        self._free: list[dict[AnySite, Tensor]] = []  # a second one, once the first is being written
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cache")
        self._pending: Future[None] | None = None

    @property
    def full(self) -> bool:
        """Whether the next rows need another shard."""
        return self._filled == self.rows_per_shard

    def add(self, rows: Mapping[AnySite, Tensor]) -> None:
        """Add rows [B, D] of every site: no more than a shard has room for."""
        n = len(next(iter(rows.values())))
        for site, x_BD in rows.items():
            self._rows[site][self._filled : self._filled + n].copy_(x_BD)
        self._filled += n

    def flush(self, state: Mapping[str, Any]) -> None:
        """Begin to write what was added as a shard of every site, and with it what is needed to go on."""
        if not self._filled:
            return
        self.wait()
        rows, filled, text = self._rows, self._filled, json.dumps(state)
        number = len(next(iter(self.whole.values())))
        self._pending = self._thread.submit(self._write, number, rows, filled, text)
        self._rows, self._filled = (self._free.pop() if self._free else self._allocate()), 0

    def wait(self) -> None:
        """Wait until everything is written. Raises what writing raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """End the thread, once what is under way is written."""
        self._thread.shutdown()

    def _allocate(self) -> dict[AnySite, Tensor]:
        return {
            site: torch.empty(self.rows_per_shard, width, dtype=self.dtype)
            for site, width in self.widths.items()
        }

    def _write(self, number: int, rows: dict[AnySite, Tensor], filled: int, state: str) -> None:
        made = {}
        for site, x_RD in rows.items():
            data = safetensors.torch.save({TENSOR: x_RD[:filled]})
            made[site] = Shard(len(data), hashlib.sha256(data).hexdigest())
            self.store.write(shard_name(site, number), data)
        for site, shard in made.items():
            self.whole[site].append(shard)
        self._free.append(rows)
        shards = {str(site): [vars(shard) for shard in of] for site, of in self.whole.items()}
        self.store.write(WRITING, json.dumps(json.loads(state) | {"shards": shards}).encode())
