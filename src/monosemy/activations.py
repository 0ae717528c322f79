"""The stream of activations: for every step a batch for each site, as a function of the data seed and the step alone.

Contexts come in blocks. All sites read the same contexts; each drops rows of its own (norm outliers) and permutes what it keeps by
(seed, site, block), so every site is served a number of batches that the tokens alone decide: 0.98 of what the rules on tokens leave.
A site's surplus is dropped, its shortage repeats from the front, and both are counted.

B tokens of a batch, L context, D width of a site, R rows of a block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from monosemy.lm import LanguageModel, Site
from monosemy.rng import generator
from monosemy.tokens import ContextStream, StreamEnded

SERVED = 0.98  # of the rows that the rules on tokens leave; the rest covers what sites drop by themselves


class ActivationStream:
    """Scaled, shuffled batches {site: [B, D]} in float32, one for each optimizer step.

    The first block measures each site's norm limit (a multiple of its median) and its norm factor sqrt(E ||x||^2); both are then
    frozen, recorded, and the block is trained on. Batches are divided by the norm factor.
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
        self._special = contexts.special_ids
        self._rows: dict[Site, Tensor] = {}
        self._order: dict[Site, Tensor] = {}
        self._block, self._next, self._batches, self._ended = -1, 0, 0, False
        self._block_start = contexts.state()

    def next(self) -> dict[Site, Tensor]:
        """The batch of the next step. Raises StreamEnded when a source ran dry and all that it gave has been served."""
        if self._next == self._batches:
            self._fill()
        taken = slice(self._next * self.batch, (self._next + 1) * self.batch)
        self._next += 1
        return {site: self._rows[site][self._order[site][taken]].float() / self.norm_factor[site] for site in self.sites}

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on with the next batch: JSON, with no activations in it."""
        return {
            "block": self._block,
            "next": self._next,
            "contexts": self._block_start,
            "counts": dict(self.counts),
            "norm_factor": {str(s): v for s, v in self.norm_factor.items()},
            "norm_limit": {str(s): v for s, v in self.norm_limit.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state: one block is read again."""
        self.contexts.restore(state["contexts"])
        self.norm_factor = {s: state["norm_factor"][str(s)] for s in self.sites if str(s) in state["norm_factor"]}
        self.norm_limit = {s: state["norm_limit"][str(s)] for s in self.sites if str(s) in state["norm_limit"]}
        self._block, self._batches, self._next, self._ended = max(state["block"], 0) - 1, 0, 0, False
        if state["block"] >= 0:
            self._fill()
        self._next = state["next"]
        self.counts = Counter(state["counts"])

    def _fill(self) -> None:
        if self._ended:
            raise StreamEnded("the text", 0, "train")
        self._block, self._block_start = self._block + 1, self.contexts.state()
        R, L = 0, self.contexts.context_length
        for _ in range(self.contexts_per_block // self.contexts_per_forward):
            try:
                ids_BL = self.contexts.next(self.contexts_per_forward)
            except StreamEnded:
                self._ended = True
                break
            keep_BL = torch.ones_like(ids_BL, dtype=torch.bool)
            if not self.keep_special:
                keep_BL = ~torch.isin(ids_BL, self._special)
                keep_BL[:, 0] = False
            kept = int(keep_BL.sum())
            for site, x_BLD in self.lm.activations(ids_BL).items():
                if site not in self._rows:
                    self._rows[site] = x_BLD.new_empty(self.contexts_per_block * L, x_BLD.shape[-1])
                self._rows[site][R : R + kept] = x_BLD[keep_BL.to(x_BLD.device)]
            R += kept
            self.counts["tokens"] += ids_BL.numel()
            self.counts["tokens left out as special"] += ids_BL.numel() - kept
            self.on_contexts(len(ids_BL))
        self._batches, self._next = int(SERVED * R) // self.batch, 0
        if self._batches == 0:
            self._ended = True
            raise StreamEnded("the text", 0, "train")
        for site in self.sites:
            self._order[site] = self._permuted(site, self._rows[site][:R])

    def _permuted(self, site: Site, rows_RD: Tensor) -> Tensor:
        """Which rows of the block the site serves, in which order."""
        norm_R = torch.linalg.vector_norm(rows_RD, dim=1, dtype=torch.float32)
        if site not in self.norm_factor:
            limit = self.norm_multiple * float(norm_R.median()) if self.norm_multiple else float("inf")
            self.norm_limit[site] = limit
            self.norm_factor[site] = float(norm_R[norm_R <= limit].double().pow(2).mean().sqrt()) or 1.0
        kept = (norm_R <= self.norm_limit[site]).nonzero().squeeze(1).cpu()
        order = kept[torch.randperm(len(kept), generator=generator(self.seed, "permutation", str(site), self._block))]
        wanted = self._batches * self.batch
        self.counts[f"{site}: rows"] += len(rows_RD)
        self.counts[f"{site}: norm outliers left out"] += len(rows_RD) - len(kept)
        self.counts[f"{site}: rows repeated"] += max(wanted - len(order), 0)
        self.counts[f"{site}: surplus rows"] += max(len(order) - wanted, 0)
        if len(order) < wanted:
            order = order.repeat(-(-wanted // max(len(order), 1)))
        return order[:wanted].to(rows_RD.device)
