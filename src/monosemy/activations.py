"""The stream of activations: for every step a batch for each site, as a function of the data seed and the step alone.

Contexts come in blocks. All sites read the same contexts; each drops rows of its own (norm outliers) and permutes what it keeps by
(seed, site, block), so every site is served a number of batches that the tokens alone decide: 0.98 of what the rules on tokens leave.
A site's surplus is dropped, its shortage repeats from the front, and both are counted.

The rows of a site lie in the slots of a ring that is allocated once. A batch that was served frees its slots, and rows of the next block are
written there: the language model runs a forward now and then, and no step waits for a whole block. When a row is read changes nothing
about when it is served.

B tokens of a batch, M contexts of a forward, L context, N rows that a forward leaves, D width of a site, R rows of a block, S slots.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from monosemy.contexts import ContextStream, StreamEnded
from monosemy.errors import invalid
from monosemy.lm_info import Site
from monosemy.lm_model import LanguageModel
from monosemy.rng import generator

SERVED = 0.98  # of the rows that the rules on tokens leave; the rest covers what sites drop by themselves


@dataclass
class _Block:
    """A block, as far as it has been read."""

    number: int
    start: dict[str, Any]  # the contexts' state before it
    missing: int  # forwards that it still lacks
    rows: int = 0
    last: bool = False  # the text ended in it
    counts: Counter[str] = field(default_factory=Counter)


class ActivationStream:
    """Scaled, shuffled batches {site: [B, D]} in float32, one for each optimizer step.

    The first block measures each site's norm limit (a multiple of its median) and its norm factor sqrt(E ||x||^2); both are then
    frozen, recorded, and the block is trained on. Batches are divided by the norm factor.

    `counts` and `text_counts` are of all that was read up to the end of the block being served.
    """

    def __init__(
        self,
        lm: LanguageModel,
        contexts: ContextStream,
        sites: Sequence[Site],
        *,
        batch: int,
        contexts_per_forward: int,
        contexts_per_block: int,
        seed: int = 0,
        keep_special: bool = False,
        norm_multiple: float = 10.0,
    ) -> None:
        self.lm, self.contexts, self.sites, self.batch, self.seed = lm, contexts, tuple(sites), batch, seed
        self.contexts_per_forward = contexts_per_forward
        self.contexts_per_block = -(-contexts_per_block // contexts_per_forward) * contexts_per_forward
        self.keep_special, self.norm_multiple = keep_special, norm_multiple
        self.norm_factor: dict[Site, float] = {}
        self.norm_limit: dict[Site, float] = {}
        self.counts: Counter[str] = Counter()
        self.on_contexts: Callable[[int], None] = lambda n: None  # told of contexts as they are read
        self.wanted: int | None = None  # how many more batches will be asked for, where that is known: what lies after is not read ahead
        self._special = contexts.special_ids
        self._aside = _Aside(lm.device)
        self._forward_rows = contexts_per_forward * contexts.context_length  # at most
        self._slots = self.contexts_per_block * contexts.context_length + self._forward_rows
        self._rings: dict[Site, Tensor] = {}  # [S, D]
        self._norms = torch.empty(0)  # [sites, S]: of the rows of the block being read, in their order
        self._place = {site: torch.arange(self._slots) for site in self.sites}  # slots for the rows of the block being read, in their order
        self._order: dict[Site, Tensor] = {}  # slots of the block being served, in the order of serving
        self._scale: dict[Site, Tensor] = {}  # the norm factors, [1]
        self._begin(_Block(-1, contexts.state_dict(), 0))  # nothing is served yet

    def next(self) -> dict[Site, Tensor]:
        """The batch of the next step. Raises StreamEnded when a source ran dry and all that it gave has been served.

        On a GPU the host waits for nothing here, but for the last forward of a block where one ends.
        """
        if self._next == self._batches:
            self._turn()
        if self._next > self._first and (self.wanted is None or self.wanted > self._batches - self._next):
            self._read_ahead()
        if self.wanted is not None:
            self.wanted -= 1
        taken = slice(self._next * self.batch, (self._next + 1) * self.batch)
        self._next += 1
        # a factor of one dimension makes half precision float32 in the division itself
        return {site: self._rings[site].index_select(0, self._order[site][taken]) / self._scale[site] for site in self.sites}

    def width(self, site: Site) -> int:
        """How wide a site's activations are. They need not have been read: a state at a block's end is restored without a forward."""
        return self.lm.d_in(site)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on with the next batch: JSON, with no activations in it."""
        return {
            "block": self._block.number,
            "next": self._next,
            "contexts": self._block.start,
            "counts": dict(self.counts),
            "norm_factor": {str(s): v for s, v in self.norm_factor.items()},
            "norm_limit": {str(s): v for s, v in self.norm_limit.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state: one block is read again. What had been read of the next follows with the batches after the first."""
        self.contexts.load_state_dict(state["contexts"])
        self.norm_factor = {s: state["norm_factor"][str(s)] for s in self.sites if str(s) in state["norm_factor"]}
        self.norm_limit = {s: state["norm_limit"][str(s)] for s in self.sites if str(s) in state["norm_limit"]}
        self._begin(_Block(-1, state["contexts"], 0))
        if state["block"] >= 0:
            self._coming.number = state["block"]
            forwards = list(iter(self._take, None))
            if state["next"] < self._batches_of(self._coming):  # otherwise all of it was served, and the model need not run for it
                for forward in forwards:
                    self._forward(*forward)
                self._turn()
            else:
                self._begin(self._coming)
        self._next = self._first = state["next"]
        self.counts = Counter(state["counts"])

    # blocks

    def _begin(self, block: _Block) -> None:
        """Make a block that was read the one to serve, and go over to reading the one after it."""
        self._block: _Block = block
        self._batches: int = self._batches_of(block)
        self._next = self._first = 0  # the next batch, and the first one since this block was read
        self._coming: _Block = _Block(block.number + 1, self.contexts.state_dict(), self.contexts_per_block // self.contexts_per_forward)
        self.text_counts = self.contexts.counts

    def _batches_of(self, block: _Block) -> int:
        return int(SERVED * block.rows) // self.batch

    def _turn(self) -> None:
        """Go over to the next block, read to its end."""
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
        for site, norm_R in zip(self.sites, norms, strict=True):
            self._order[site] = self._aside.send(self._ordered(site, norm_R))
            self._scale[site] = self._aside.send(torch.tensor([self.norm_factor[site]], dtype=torch.float32))

    def _ordered(self, site: Site, norm_R: Tensor) -> Tensor:
        """The slots of the rows that the site serves of a block, in their order. Rows of the next block take them as they come free."""
        finite_R = norm_R.isfinite()
        if site not in self.norm_factor:
            if not finite_R.any():
                raise invalid("dtype", str(self.lm.dtype), f"a precision in which activations of {site} are finite", "try float32")
            limit = self.norm_multiple * float(norm_R[finite_R].median()) if self.norm_multiple else float("inf")
            self.norm_limit[site] = limit
            self.norm_factor[site] = float(norm_R[finite_R & (norm_R <= limit)].double().pow(2).mean().sqrt()) or 1.0
        kept = (finite_R & (norm_R <= self.norm_limit[site])).nonzero().squeeze(1)
        if not len(kept):
            kept = torch.arange(len(norm_R))  # a block without a sound row is served as it is, for its steps to be refused
        order = kept[torch.randperm(len(kept), generator=generator(self.seed, "permutation", str(site), self._block.number))]
        wanted = self._batches * self.batch
        self.counts[f"{site}: rows"] += len(norm_R)
        self.counts[f"{site}: norm outliers left out"] += len(norm_R) - len(kept)
        self.counts[f"{site}: rows repeated"] += max(wanted - len(order), 0)
        self.counts[f"{site}: surplus rows"] += max(len(order) - wanted, 0)
        if len(order) < wanted:
            order = order.repeat(-(-wanted // max(len(order), 1)))
        slots = self._place[site][order[:wanted]]
        free_S = torch.ones(self._slots, dtype=torch.bool)
        free_S[slots] = False
        last_time = slots[max(wanted - len(kept), 0) :]  # each slot once, where repeated rows are served for the last time
        self._place[site] = torch.cat([free_S.nonzero().squeeze(1), last_time])
        return slots

    # reading

    def _read_ahead(self) -> None:
        """This step's share of the next block, as far as slots are free: spread evenly over the batches that are left of this one."""
        left = self._batches - self._next
        for _ in range(-(-self._coming.missing // left)):
            if self._coming.rows + self._forward_rows <= self._slots - left * self.batch:
                self._read()

    def _read(self) -> None:
        """One forward for the block being read."""
        if forward := self._take():
            self._forward(*forward)

    def _take(self) -> tuple[Tensor, Tensor, slice] | None:
        """Contexts [M, L] of the block being read, which of their tokens are kept, [N], and their place in it; None where it ends."""
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
        keep_N = keep_ML.flatten().nonzero().squeeze(1)  # of ids on the host, so that the number is known without asking the device
        rows = slice(block.rows, block.rows + len(keep_N))
        block.missing -= 1
        block.rows = rows.stop
        block.counts["tokens"] += ids_ML.numel()
        block.counts["tokens left out as special"] += ids_ML.numel() - len(keep_N)
        self.on_contexts(len(ids_ML))
        return ids_ML, keep_N, rows

    def _forward(self, ids_ML: Tensor, keep_N: Tensor, rows: slice) -> None:
        """Run the model and write the rows that are kept to their slots."""
        with self._aside():
            found = self.lm.activations(self._aside.send(ids_ML))
        if not self._rings:
            self._rings = {site: self._aside.share(found[site].new_empty(self._slots, found[site].shape[-1])) for site in self.sites}
            self._norms = self._aside.share(torch.empty(len(self.sites), self._slots, device=self.lm.device))
        with self._aside(after_caller=True):  # who may still be gathering from these slots
            kept = self._aside.send(keep_N)
            for site, norm_S in zip(self.sites, self._norms, strict=True):
                x_ND = found[site].flatten(0, 1).index_select(0, kept)
                self._rings[site].index_copy_(0, self._aside.send(self._place[site][rows]), x_ND)
                norm_S[rows] = torch.linalg.vector_norm(x_ND, dim=1, dtype=torch.float32)


class _Aside:
    """Where the language model runs: on a GPU in a CUDA stream of its own, beside the caller's, so that both work at the same time.

    The device keeps their order by events; the host only queues. On any other device there is one order, and nothing to do.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(device))  # the model's weights may still be on their way

    def __call__(self, *, after_caller: bool = False) -> AbstractContextManager[Any]:
        """A context that queues here; `after_caller` behind all that the caller's stream has been given until now."""
        if self.stream is None:
            return nullcontext()
        if after_caller:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self.stream)

    def join(self) -> None:
        """What the caller's stream is given from now on comes after all that was queued here."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def share(self, x: Tensor) -> Tensor:
        """A tensor of the caller's that is used here, too: once it is dropped, its memory stays taken until what is queued here has ended."""
        if self.stream is not None:
            x.record_stream(self.stream)
        return x

    def send(self, x: Tensor) -> Tensor:
        """A tensor of the host on the device; from pinned memory, as the host would have to wait for any other."""
        return x.to(self.device) if self.stream is None else x.pin_memory().to(self.device, non_blocking=True)
