"""Serve shuffled batches of activations: a function of the data seed, the site and the step alone.

Contexts come in blocks. All sites read the same contexts; each drops rows of its own (norm outliers) and
permutes what it keeps by (seed, site, block), so every site is served a number of batches that the tokens
alone decide: 0.98 of what the rules on tokens leave. A site's surplus is dropped, its shortage repeats from
the front, and both are counted.

A site's rows lie in a `RingBuffer`. The language model runs a forward now and then, and no step waits for a
whole block. When a row is read changes nothing about when it is served.

Of several ranks rank 0 reads the text, forward i of a block runs whole on rank i mod W, so that it has the
bits that it would have on one, and its rows go to the ranks whose SAEs read their site. Where T ranks hold
the model together it runs on team i mod W / T, whose members all have its rows.

B tokens of a batch, M contexts of a forward, L context, N rows that a forward leaves, D width of a site, R
rows of a block, S slots, W ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from monosemy.data.contexts import ContextStream, SharedContexts, StreamEnded
from monosemy.data.exchange import Exchange
from monosemy.errors import invalid
from monosemy.lm.site_groups import AnySite, by_site, of_parts, parts, reads
from monosemy.lm.two_models import Models
from monosemy.system.ranks import ALONE, Ranks
from monosemy.system.rng import generator

SERVED = 0.98  # of the rows that the rules on tokens leave; the rest covers what sites drop by themselves


@dataclass
class _Block:
    """A block of contexts, as far as it has been read."""

    number: int
    start: dict[str, Any]  # the contexts' state before it
    missing: int  # forwards that it still lacks
    rows: int = 0
    last: bool = False  # the text ended in it
    counts: Counter[str] = field(default_factory=Counter)


class _Forward(NamedTuple):
    """The contexts [M, L] of a forward, the indices [N] of tokens to keep, and their rows' numbers in the
    block."""

    ids_ML: Tensor
    keep_N: Tensor
    rows: slice


class ActivationStream:
    """Serve scaled, shuffled batches {site: [B, D]} in float32, one for each optimizer step.

    The first block measures each site's norm limit (a multiple of its median) and its norm factor sqrt(E
    ||x||^2); both are then frozen, recorded, and the block is trained on. Batches are divided by the norm
    factor.

    `counts` and `text_counts` are of all that was read up to the end of the block being served. A rank is
    served the sites that `readers` gives it, by site the ranks that read it; norms, factors and counts of all
    sites are known to all.
    """

    def __init__(
        self,
        lm: Models,
        contexts: ContextStream | SharedContexts,
        sites: Sequence[AnySite],
        *,
        batch: int,
        contexts_per_forward: int,
        contexts_per_block: int,
        seed: int = 0,
        keep_special: bool = False,
        norm_multiple: float = 10.0,
        ranks: Ranks = ALONE,
        readers: Mapping[AnySite, Set[int]] | None = None,
        together: int = 1,
    ) -> None:
        self.lm, self.contexts, self.sites, self.batch, self.seed = lm, contexts, tuple(sites), batch, seed
        self.contexts_per_forward = contexts_per_forward
        self.contexts_per_block = -(-contexts_per_block // contexts_per_forward) * contexts_per_forward
        self.keep_special, self.norm_multiple = keep_special, norm_multiple
        self.norm_factors: dict[AnySite, tuple[float, ...]] = {}
        """Of each part of a row; the limits are of the parts that are read."""
        self.norm_limits: dict[AnySite, tuple[float, ...]] = {}
        self.counts: Counter[str] = Counter()
        # called with the number of contexts of each forward
        self.on_contexts: Callable[[int], None] = lambda n: None
        # batches still to be asked for, if known: nothing after them is read ahead
        self.wanted: int | None = None
        self._special = contexts.special_ids
        self._aside = _Aside(lm.device)
        self._forward_rows = contexts_per_forward * contexts.context_length  # at most
        self._exchange = Exchange(self.sites, readers or {site: {0} for site in self.sites}, ranks, together)
        self._teams = self._exchange.teams
        self._slots = self.contexts_per_block * contexts.context_length + self._teams * self._forward_rows
        self._rings = {site: RingBuffer(self._slots, self._aside) for site in self._exchange.read_here}
        self._parts = [len(parts(site)) for site in self.sites]
        # of the rows of the block being read, in their order: [parts of all sites, S]
        self._norms = torch.empty(0)
        self._scale: dict[AnySite, Tensor] = {}  # the norm factors
        self._begin(_Block(-1, contexts.state_dict(), 0))  # nothing is served yet

    def next(self) -> dict[AnySite, Tensor]:
        """Return the batch of the next step, [B, D] in float32 by site.

        Raises StreamEnded when a source ran dry and all that it gave has been served. On a GPU the host waits
        for nothing here, except for the last forward of a block where one ends.
        """
        rows = self.next_rows()
        # a factor of one dimension makes half precision float32 in the division itself
        return {site: x_BD / self._scale[site] for site, x_BD in rows.items()}

    def next_rows(self) -> dict[AnySite, Tensor]:
        """Return the rows of the next step as the model gave them, [B, D] by site. Raises as `next` does."""
        if self._next == self._batches:
            self._turn()
        if self._next > self._first and (self.wanted is None or self.wanted > self._batches - self._next):
            self._read_ahead()
        if self.wanted is not None:
            self.wanted -= 1
        taken = slice(self._next * self.batch, (self._next + 1) * self.batch)
        self._next += 1
        return {site: ring.read(taken) for site, ring in self._rings.items()}

    @property
    def device(self) -> torch.device:
        """Where batches are."""
        return self.lm.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision that the model runs in."""
        return self.lm.dtype

    def damage(self) -> list[str]:
        """Describe the sources of text that are damaged."""
        return self.contexts.damage()

    @property
    def bytes_sent(self) -> int:
        """Bytes of rows and norms that this rank has sent to others."""
        return self._exchange.bytes_sent

    def widths(self, site: AnySite) -> tuple[int, ...]:
        """Return the widths of the parts of a site's rows.

        None need have been read: a state at a block's end is restored without a forward.
        """
        return tuple(self.lm.d_in(part) for part in parts(site))

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to go on with the next batch: JSON, without activations."""
        state = {
            "block": self._block.number,
            "next": self._next,
            "contexts": self._block.start,
            "counts": dict(self.counts),
            "norm_factor": by_site(self.norm_factors),
            "norm_limit": by_site(self.norm_limits),
        }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state: one block is read again.

        What had been read of the next follows with the batches after the first.
        """
        self.contexts.load_state_dict(state["contexts"])
        self.norm_factors, self.norm_limits = (
            {s: of_parts(state[key][str(s)]) for s in self.sites if str(s) in state[key]}
            for key in ("norm_factor", "norm_limit")
        )
        self._begin(_Block(-1, state["contexts"], 0))
        if state["block"] >= 0:
            self._coming.number = state["block"]
            forwards = list(iter(self._take, None))
            # otherwise all of it was served, and the model need not run for it
            if state["next"] < self._batches_of(self._coming):
                for i in range(0, len(forwards), self._teams):
                    self._forward(forwards[i : i + self._teams])
                self._turn()
            else:
                self._begin(self._coming)
        self._next = self._first = state["next"]
        self.counts = Counter(state["counts"])

    # blocks

    def _begin(self, block: _Block) -> None:
        """Begin to serve a block that was read, and to read the one after it."""
        self._block: _Block = block
        self._batches: int = self._batches_of(block)
        self._next = self._first = 0  # the next batch, and the first one since this block was read
        forwards = self.contexts_per_block // self.contexts_per_forward
        self._coming: _Block = _Block(block.number + 1, self.contexts.state_dict(), forwards)
        self.text_counts = self.contexts.counts

    def _batches_of(self, block: _Block) -> int:
        return int(SERVED * block.rows) // self.batch

    def _turn(self) -> None:
        """Read the next block to its end and begin to serve it. Raises StreamEnded where there is none."""
        if self._block.last or (self._block.number >= 0 and self._batches == 0):
            raise StreamEnded("the text", 0, "train")
        while self._coming.missing:
            self._read()
        self._begin(self._coming)
        self.counts.update(self._block.counts)
        if self._batches == 0:
            raise StreamEnded("the text", 0, "train")
        with self._aside():
            norms = self._norms[:, : self._block.rows].cpu()
        self._aside.join()
        for site, norm_PR in zip(self.sites, norms.split(self._parts), strict=True):
            order, distinct = self._ordered(site, norm_PR)
            if site in self._rings:
                self._rings[site].serve(order, distinct)
                self._scale[site] = self._aside.send(self._divisor(site))

    def _divisor(self, site: AnySite) -> Tensor:
        """Return what a site's rows are divided by, [1]; of several parts each column's own."""
        factors = torch.tensor(self.norm_factors[site], dtype=torch.float32)
        return factors if len(factors) == 1 else factors.repeat_interleave(torch.tensor(self.widths(site)))

    def _ordered(self, site: AnySite, norm_PR: Tensor) -> tuple[Tensor, int]:
        """Return the numbers of the rows that a site serves, in their order, and how many of them differ.

        A row is left out by the norms of what is read.
        """
        finite_R, read_PR = norm_PR.isfinite().all(0), norm_PR[: len(reads(site))]
        if site not in self.norm_factors:
            if not finite_R.any():
                allowed = f"a precision in which activations of {site} are finite"
                raise invalid("dtype", str(self.lm.dtype), allowed, "try float32")
            self.norm_limits[site] = tuple(
                self.norm_multiple * float(norm_R[finite_R].median()) if self.norm_multiple else float("inf")
                for norm_R in read_PR
            )
            kept_R = finite_R & self._within(site, read_PR)
            self.norm_factors[site] = tuple(
                float(norm_R[kept_R].double().pow(2).mean().sqrt()) or 1.0 for norm_R in norm_PR
            )
        rows_N = (finite_R & self._within(site, read_PR)).nonzero().squeeze(1)
        if not len(rows_N):
            # the block is served as it is, for its steps to be skipped
            rows_N = torch.arange(len(finite_R))
        draw = generator(self.seed, "permutation", str(site), self._block.number)
        order = rows_N[torch.randperm(len(rows_N), generator=draw)]
        wanted = self._batches * self.batch
        self.counts[f"{site}: rows"] += len(finite_R)
        self.counts[f"{site}: norm outliers left out"] += len(finite_R) - len(rows_N)
        self.counts[f"{site}: rows repeated"] += max(wanted - len(order), 0)
        self.counts[f"{site}: surplus rows"] += max(len(order) - wanted, 0)
        if len(order) < wanted:
            order = order.repeat(-(-wanted // max(len(order), 1)))
        return order[:wanted], len(rows_N)

    def _within(self, site: AnySite, read_PR: Tensor) -> Tensor:
        """Return the mask of rows whose norms are within the site's limits, [R]."""
        return (read_PR <= torch.tensor(self.norm_limits[site], dtype=torch.float64)[:, None]).all(0)

    # reading

    def _read_ahead(self) -> None:
        """Read this step's share of the next block, as far as slots are free.

        The block is spread evenly over the batches that are left of this one.
        """
        left, W = self._batches - self._next, self._teams
        for _ in range(-(-self._coming.missing // (W * left))):
            if self._coming.rows + W * self._forward_rows <= self._slots - left * self.batch:
                self._read()

    def _read(self) -> None:
        """Run a forward on each team for the block being read."""
        if forwards := [forward for _ in range(self._teams) if (forward := self._take())]:
            self._forward(forwards)

    def _take(self) -> _Forward | None:
        """Take the contexts of a forward. None where the block being read ends."""
        block = self._coming
        if not block.missing:
            return None
        try:
            ids_ML = self.contexts.next(self.contexts_per_forward)
        except StreamEnded:
            block.missing, block.last = 0, True
            return None
        keep_ML = torch.ones_like(ids_ML, dtype=torch.bool)
        if not self.keep_special:
            keep_ML = ~torch.isin(ids_ML, self._special)
            keep_ML[:, 0] = False
        keep_N = keep_ML.flatten().nonzero().squeeze(1)  # on the host: its length is known without a sync
        rows = slice(block.rows, block.rows + len(keep_N))
        block.missing -= 1
        block.rows = rows.stop
        block.counts["tokens"] += ids_ML.numel()
        block.counts["tokens left out as special"] += ids_ML.numel() - len(keep_N)
        self.on_contexts(len(ids_ML))
        return _Forward(ids_ML, keep_N, rows)

    def _forward(self, forwards: Sequence[_Forward]) -> None:
        """Run the model on this team's forward, and write the rows that all of them keep to the rings."""
        team = self._exchange.team
        here = forwards[team] if team < len(forwards) else None
        counts = [len(forward.keep_N) for forward in forwards]
        with self._aside():
            found = self.lm.activations(self._aside.send(here.ids_ML)) if here else {}
        if not len(self._norms):
            norms = torch.empty(sum(self._parts), self._slots, device=self.lm.device)
            self._norms = self._aside.share(norms)
        with self._aside(after_caller=True):  # which may still be gathering from these slots
            rows_N = self._aside.send(here.keep_N) if here else None
            norms_PN = []
            for site in self.sites:
                of_parts = (
                    [] if rows_N is None else [found[part].flatten(0, 1)[rows_N] for part in parts(site)]
                )
                norms_PN += [torch.linalg.vector_norm(x_ND, dim=1, dtype=torch.float32) for x_ND in of_parts]
                self._write(site, forwards, self._exchange.rows(site, _side_by_side(of_parts), counts))
            own_NP = torch.stack(norms_PN, 1) if norms_PN else None
            of_forwards = self._exchange.norms(own_NP, counts, sum(self._parts))
            for forward, norms_NP in zip(forwards, of_forwards, strict=True):
                self._norms[:, forward.rows] = norms_NP.T

    def _write(self, site: AnySite, forwards: Sequence[_Forward], of_forwards: Sequence[Tensor]) -> None:
        """Write a site's rows of some forwards to its ring, where it is read here."""
        if site not in self._rings:
            return
        for forward, x_ND in zip(forwards, of_forwards, strict=True):
            self._rings[site].write(forward.rows, x_ND)


class RingBuffer:
    """Hold rows of two blocks in S slots: of the one being served, and of the next, being read.

    Rows are never moved: a row of the next block is written to a slot whose row was served. For S = 8:

        slot             0    1    2    3    4    5    6    7
        holds           a2    -   a0   a3    -   a1   a4   a5      block a, read to its end
        serving         a3   a0   a5   a1   a2                     its rows in random order; a4 is surplus
        from slots       3    2    7    5    0
        writing to       1    4    6    3    2    7    5    0      free slots, then served ones in that order
        rows of b       b0   b1   b2   b3   b4   b5                b3 can be written once a3 was served

    Row i of the next block may be written once fewer than S - i rows are left to serve, which callers see to.
    """

    def __init__(self, slots: int, aside: _Aside) -> None:
        self._aside = aside
        self._rows = torch.empty(0)  # [S, D], allocated once
        self._writing = torch.arange(slots)  # slots of the rows of the block being read
        self._serving = torch.empty(0)  # slots of the block being served in their order, on the device

    def write(self, rows: slice, x_ND: Tensor) -> None:
        """Write rows of the block being read, by their numbers in it. The first ones say width and type."""
        if not len(self._rows):
            self._rows = self._aside.share(x_ND.new_empty(len(self._writing), x_ND.shape[-1]))
        self._rows.index_copy_(0, self._aside.send(self._writing[rows]), x_ND)

    def serve(self, order: Tensor, distinct: int) -> None:
        """Begin to serve the block that was read, its rows in this order, and to read the next one.

        `order` has `distinct` different rows, and repeats them in the same order where it is longer.
        """
        slots = self._writing[order]
        free_S = torch.ones(len(self._writing), dtype=torch.bool)
        free_S[slots] = False
        last_time = slots[max(len(slots) - distinct, 0) :]  # where repeated rows are served for the last time
        self._writing = torch.cat([free_S.nonzero().squeeze(1), last_time])
        self._serving = self._aside.send(slots)

    def read(self, taken: slice) -> Tensor:
        """Return rows [B, D] of the block being served, by their places in its order."""
        return self._rows.index_select(0, self._serving[taken])


def _side_by_side(of_parts: Sequence[Tensor]) -> Tensor | None:
    return None if not of_parts else of_parts[0] if len(of_parts) == 1 else torch.cat(list(of_parts), 1)


class _Aside:
    """Run the language model in a CUDA stream beside the caller's, so that both work at the same time.

    The device keeps their order by events; the host only queues. On other devices there is one order, and
    nothing to do.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.stream is not None:
            # the model's weights may still be on their way
            self.stream.wait_stream(torch.cuda.current_stream(device))

    def __call__(self, *, after_caller: bool = False) -> AbstractContextManager[Any]:
        """Return a context that queues work here; `after_caller`: behind what the caller has queued."""
        if self.stream is None:
            return nullcontext()
        if after_caller:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self.stream)

    def join(self) -> None:
        """Have what the caller queues from now on wait for all that was queued here."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def share(self, x: Tensor) -> Tensor:
        """Mark a tensor of the caller's as used here: its memory is reused only after what is queued here."""
        if self.stream is not None:
            x.record_stream(self.stream)
        return x

    def send(self, x: Tensor) -> Tensor:
        """Copy a host tensor to the device, from pinned memory, so that the host need not wait."""
        if self.stream is None:
            return x.to(self.device)
        return x.pin_memory().to(self.device, non_blocking=True)
