"""How many bytes the ranks of a run send each other, told before it starts.

Forward i of a block runs on rank i mod W. From there each site's rows go to the ranks whose SAEs read them,
in the language model's precision, and their norms to all ranks in float32; token ids come from rank 0.

B tokens of a batch, D width of a site, k active latents, L context, M contexts of a forward, T ranks that
hold an SAE's latents or the language model together, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from monosemy.data.activations import SERVED
from monosemy.jobs.dealing import saes
from monosemy.jobs.memory import BYTES
from monosemy.jobs.plan import Plan
from monosemy.lm.info import Site
from monosemy.lm.site_groups import AnySite, parts, writes
from monosemy.sae import architecture
from monosemy.training.trainer import SAESpec

ID, NORM = 8, 4  # bytes of a token's id, and of a row's norm
DIGITS, OF_ROWS, OF_BATCH = 4, 4 * 2**8, 2 * 4 * 2**16  # of the histograms by which shards select


@dataclass(frozen=True)
class Exchange:
    """Bytes that all ranks together send to others."""

    rows: int
    norms: int
    ids: int
    busiest: int
    """What comes in at the rank to which most is sent."""

    @property
    def total(self) -> int:
        return self.rows + self.norms + self.ids


def bytes_of_a_block(
    plan: Plan, dealt: Sequence[int], ranks: int, *, latent_shards: int = 1, lm_shards: int = 1
) -> Exchange:
    """Count what ranks exchange for one block of contexts; `dealt` says which of the ranks / T units each SAE
    of the run is trained by.

    Exact but for special tokens inside of contexts, whose rows are not sent.
    """
    c = plan.config
    tokens = c.llm_batch_size * c.context_length
    rows = tokens if c.keep_special_tokens else tokens - c.llm_batch_size
    of_row = {site: sum(width(plan, part) for part in parts(site)) * BYTES[c.dtype] for site in plan.sites}
    readers = ranks_that_read(plan, dealt, latent_shards)
    norms = NORM * rows * sum(len(parts(site)) for site in plan.sites)
    sent, incoming = 0, [0] * ranks
    for rank in range(0, ranks, lm_shards):  # one of those that run a forward together
        forwards = len(range(rank // lm_shards, forwards_of_a_block(plan), ranks // lm_shards))
        for site, of_site in readers.items():
            for reader in of_site - set(range(rank, rank + lm_shards)):
                incoming[reader] += forwards * rows * of_row[site]
                sent += forwards * rows * of_row[site]
        for other in set(range(ranks)) - set(range(rank, rank + lm_shards)):
            incoming[other] += forwards * norms
    others, forwards = ranks - 1, forwards_of_a_block(plan)
    ids = ID * tokens * forwards
    busiest = max(incoming[0], *(n + ids for n in incoming[1:])) if ranks > 1 else 0
    return Exchange(sent, forwards * norms * (ranks - lm_shards), ids * others, busiest)


def ranks_that_read(plan: Plan, dealt: Sequence[int], latent_shards: int = 1) -> dict[AnySite, set[int]]:
    """Return by site the ranks whose SAEs read it."""
    readers: dict[AnySite, set[int]] = {site: set() for site in plan.sites}
    for (site, _), unit in zip(saes(plan), dealt, strict=True):
        readers[site] |= set(range(unit * latent_shards, (unit + 1) * latent_shards))
    return readers


def forwards_of_a_block(plan: Plan) -> int:
    return -(-plan.contexts_per_block // plan.config.llm_batch_size)


def blocks(plan: Plan) -> int:
    """Return how many blocks are read in the whole run."""
    c = plan.config
    of_context = c.context_length - (not c.keep_special_tokens)
    rows = forwards_of_a_block(plan) * c.llm_batch_size * of_context
    return -(-plan.steps // max(int(SERVED * rows) // c.sae_batch_size, 1))


def wire_bytes(
    plan: Plan, dealt: Sequence[int], ranks: int, *, latent_shards: int = 1, lm_shards: int = 1
) -> int:
    """Count all bytes that ranks send each other in the whole run, what shards of SAEs and of the model say
    to each other included."""
    block = bytes_of_a_block(plan, dealt, ranks, latent_shards=latent_shards, lm_shards=lm_shards).total
    of_step = latent_shards * sum(shard_bytes(plan, spec, site, latent_shards) for site, spec in saes(plan))
    return blocks(plan) * (block + lm_bytes(plan, lm_shards)) + plan.steps * of_step


def shard_bytes(plan: Plan, spec: SAESpec, site: AnySite, shards: int) -> int:
    """Count about what one of the ranks that hold an SAE's latents together sends in a step.

    Its part of the sum over reconstructions, of AuxK's too, and of what tells the largest latents of all
    shards.
    """
    if shards == 1:
        return 0
    c, kind = plan.config, architecture(spec.architecture)
    B, ring = c.sae_batch_size, 2 * (shards - 1) / shards  # of an array, each rank's share of adding it up
    of_output = 4 * B * sum(width(plan, part) for part in writes(site))
    if kind.memory.dense_arrays:
        return int(ring * of_output)
    auxk = c.auxk_alpha > 0
    k = int(spec.settings["k"])
    if spec.architecture != "top_k":
        selection = ring * OF_BATCH
    elif shards * k <= 1024:
        selection = (shards - 1) * 4 * B * k
    else:
        selection = ring * DIGITS * B * OF_ROWS
    return int(ring * of_output * (1 + auxk) + selection + auxk * ring * DIGITS * B * OF_ROWS)


def lm_bytes(plan: Plan, shards: int) -> int:
    """Count what all shards of the language model send each other for a block: sums over [M, L, D], two in
    each layer and one of the embedding."""
    c, D = plan.config, plan.model.d_model
    of_sum = 2 * (shards - 1) * c.llm_batch_size * c.context_length * D * BYTES[c.dtype]
    return forwards_of_a_block(plan) * (2 * depth(plan) + 1) * of_sum


def depth(plan: Plan) -> int:
    """Return how many layers of the language model run."""
    return max(plan.model.num_layers if site.depth is None else site.depth for site in plan.sites)


def width(plan: Plan, site: Site) -> int:
    """Return the width of a site: its model's, as far as can be told without weights."""
    return plan.other.d_model if site.other and plan.other is not None else plan.model.d_model
