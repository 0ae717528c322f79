"""How much arithmetic training and evaluation take, told before a run starts. Nothing here imports torch.

Floating-point operations, those in float32 counted `FLOAT32` times: a run's default number of held-out
contexts comes from them, so that it depends on the configuration alone and not on how fast or busy a machine
is.

D d_in, F d_sae.
"""

from __future__ import annotations

from collections.abc import Sequence

from monosemy.config import TrainConfig
from monosemy.jobs.memory import GridRow
from monosemy.limits import ArchitectureMemory
from monosemy.lm.info import ModelInfo
from monosemy.lm.site_groups import AnySite, CrossLayer, SitePair, writes

# Contexts. With 20 of 256 tokens the 95 % interval of the loss recovered was +-0.011 where SAEs of L0 40 and
# 80 are 0.06 apart; with 200, +-0.003.
FEWEST, MOST = 20, 200
# of training's arithmetic that evaluation may take: it reaches less of a machine's speed, and loads the model
# once more
SHARE = 0.75
FLOAT32 = 2  # times the arithmetic of bfloat16
# products of [F, D] with a token that a TopK kind's training step costs, measured; its forward is 2, the rest
# AuxK and updates
SPARSE_STEP = 7
DENSE_STEP = 12  # encoder and decoder, forward and backward


def contexts_of_evaluation(
    c: TrainConfig, model: ModelInfo, sites: Sequence[AnySite], grid: Sequence[GridRow], context_length: int
) -> int:
    """Return as many held-out contexts as take, with the latents' pages, about as long as training, FEWEST to
    MOST."""
    spliced, read = (
        context_length * evaluation(c, model, sites, grid, spliced=spliced) for spliced in (True, False)
    )
    budget = SHARE * training(c, model, sites, grid) - pages(c, model, sites, grid)
    n = budget / spliced
    if c.eval_spliced_inputs is not None and n > c.eval_spliced_inputs:  # the others are only encoded
        n = c.eval_spliced_inputs + (budget - spliced * c.eval_spliced_inputs) / read
    return min(max(int(n), FEWEST), MOST)


def training(c: TrainConfig, model: ModelInfo, sites: Sequence[AnySite], grid: Sequence[GridRow]) -> float:
    """Count a whole training: the model up to its deepest site, and every SAE's steps, on each token."""
    read = forward(c, model, sites)
    steps = sum(row.per_site * step(c, model, row.memory, row.width) for row in grid)
    return c.num_tokens * (read + sum(map(_size, sites)) * steps)


def forward(c: TrainConfig, model: ModelInfo, sites: Sequence[AnySite]) -> float:
    """Count one token's forward through the layers up to the deepest site."""
    return _width(c.dtype) * 2 * model.layer_parameters * max(_depth(site, model) for site in sites)


def step(
    c: TrainConfig, model: ModelInfo, memory: ArchitectureMemory, F: int, site: AnySite | None = None
) -> float:
    """Count one token's share of a training step of an SAE, at a site of one layer unless another is
    given."""
    products = DENSE_STEP if memory.dense_arrays else SPARSE_STEP
    return _width(c.precision) * products * model.d_model * F * (1 if site is None else _size(site))


def evaluation(
    c: TrainConfig,
    model: ModelInfo,
    sites: Sequence[AnySite],
    grid: Sequence[GridRow],
    *,
    spliced: bool = True,
) -> float:
    """Count one token's evaluation.

    Spliced, every SAE in each of its modes, zero and mean run through what comes after its site, and the
    head.
    """
    modes = [(row.width, row.per_site * row.memory.modes) for row in grid]
    codes = sum(map(_size, sites)) * sum(FLOAT32 * 4 * model.d_model * F * n for F, n in modes)
    deepest = max(_depth(site, model) for site in sites)
    if not spliced:
        # once for the mean, once for the codes
        return _width(c.dtype) * 2 * model.layer_parameters * 2 * deepest + codes
    runs = 2 + sum(n for _, n in modes)
    # each of several sites is replaced by itself
    replaced = [at for site in sites for at in writes(site)]
    layers = deepest + model.num_layers
    layers += sum(runs * (model.num_layers - _depth(at, model)) for at in replaced)
    heads = len(replaced) * (1 + runs)
    return (
        _width(c.dtype) * 2 * (model.layer_parameters * layers + model.embedding_parameters * heads) + codes
    )


def pages(c: TrainConfig, model: ModelInfo, sites: Sequence[AnySite], grid: Sequence[GridRow]) -> float:
    """Count what does not depend on text: all pairs of decoder rows, and of latents with a page the effects
    on logits and, of a transcoder's, what embeddings do to them."""
    embedded = min(c.report_latents, max(c.dictionary_widths)) * model.embedding_parameters
    ends = len(sites) + sum(isinstance(site, SitePair) for site in sites)
    pairs = sum(r.per_site * FLOAT32 * 2 * r.width * r.width * model.d_model for r in grid)
    products = sum(r.per_site * FLOAT32 * 2 * embedded for r in grid)
    return sum(map(_compared, sites)) * pairs + ends * products


def _compared(site: AnySite) -> float:
    """Return how many times as long as at one site the decoder rows are that are compared with each other."""
    sites = len(writes(site))
    return sites * (sites + 1) / 2 if isinstance(site, CrossLayer) else sites


def _size(site: AnySite) -> float:
    """Return how many times the weights of an SAE at one site what is trained at a site has."""
    sites = len(writes(site))
    return (sites + sites * (sites + 1) / 2) / 2 if isinstance(site, CrossLayer) else sites


def _depth(site: AnySite, model: ModelInfo) -> int:
    return model.num_layers if site.depth is None else site.depth


def _width(dtype: str) -> int:
    return FLOAT32 if dtype == "float32" else 1
