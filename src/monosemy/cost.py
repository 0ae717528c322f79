"""How much arithmetic training and evaluation take, told before a run starts. Nothing here imports torch.

Floating-point operations, those in float32 counted `FLOAT32` times: a run's default number of held-out contexts comes from them, so that it
depends on the configuration alone and not on how fast or busy a machine is.

D d_in, F d_sae.
"""

from __future__ import annotations

from collections.abc import Sequence

from monosemy.config import TrainConfig
from monosemy.lm_info import ModelInfo, Site
from monosemy.memory import architecture_kind

# Contexts. With 20 of 256 tokens the 95 % interval of the loss recovered was +-0.011 where SAEs of L0 40 and 80 are 0.06 apart; with 200, +-0.003.
FEWEST, MOST = 20, 200
SHARE = 0.75  # of training's arithmetic that evaluation may take: it reaches less of a machine's speed, and loads the model once more
FLOAT32 = 2  # times the arithmetic of bfloat16
SPARSE_STEP = (
    7  # products of [F, D] with a token that a TopK kind's training step costs, measured; its forward is 2, the rest AuxK and updates
)
DENSE_STEP = 12  # encoder and decoder, forward and backward


def contexts_of_evaluation(c: TrainConfig, model: ModelInfo, sites: Sequence[Site]) -> int:
    """As many held-out contexts as take, with the latents' pages, about as long as training, FEWEST to MOST."""
    spliced, read = ((c.context_length or 2) * evaluation(c, model, sites, spliced=spliced) for spliced in (True, False))
    budget = SHARE * training(c, model, sites) - pages(c, model, sites)
    n = budget / spliced
    if c.eval_spliced_inputs is not None and n > c.eval_spliced_inputs:  # the others are only encoded
        n = c.eval_spliced_inputs + (budget - spliced * c.eval_spliced_inputs) / read
    return min(max(int(n), FEWEST), MOST)


def training(c: TrainConfig, model: ModelInfo, sites: Sequence[Site]) -> float:
    """Of a whole training: the model up to its deepest site, and every SAE's steps, on each token."""
    read = _width(c.dtype) * 2 * model.layer_parameters * max(_depth(site, model) for site in sites)
    steps = sum(
        n * _width(c.precision) * (DENSE_STEP if architecture_kind(a).lent else SPARSE_STEP) * model.d_model * F for a, F, n in _grid(c)
    )
    return c.num_tokens * (read + len(sites) * steps)


def evaluation(c: TrainConfig, model: ModelInfo, sites: Sequence[Site], *, spliced: bool = True) -> float:
    """Of one token's evaluation. Spliced, every SAE in each of its modes, zero and mean run through what comes after its site, and the head."""
    modes = [(F, n * architecture_kind(a).modes) for a, F, n in _grid(c)]
    codes = len(sites) * sum(FLOAT32 * 4 * model.d_model * F * n for F, n in modes)
    deepest = max(_depth(site, model) for site in sites)
    if not spliced:
        return _width(c.dtype) * 2 * model.layer_parameters * 2 * deepest + codes  # once for the mean, once for the codes
    runs = 2 + sum(n for _, n in modes)
    layers = deepest + model.num_layers + sum(runs * (model.num_layers - _depth(site, model)) for site in sites)
    heads = len(sites) * (1 + runs)
    return _width(c.dtype) * 2 * (model.layer_parameters * layers + model.embedding_parameters * heads) + codes


def pages(c: TrainConfig, model: ModelInfo, sites: Sequence[Site]) -> float:
    """Of what does not depend on text: all pairs of decoder rows, and what the latents with a page add to the logits."""
    embedded = min(c.report_latents, max(c.dictionary_widths)) * model.embedding_parameters
    return len(sites) * sum(n * FLOAT32 * 2 * (F * F * model.d_model + embedded) for _, F, n in _grid(c))


def _grid(c: TrainConfig) -> list[tuple[str, int, int]]:
    """Architecture, width and how many SAEs of both a site has."""
    each = len(c.random_seeds) * max(len(c.learning_rates), 1)
    return [(a, F, each * len(c.sparsities(a))) for a in c.architectures for F in c.dictionary_widths]


def _depth(site: Site, model: ModelInfo) -> int:
    return model.num_layers if site.depth is None else site.depth


def _width(dtype: str) -> int:
    return FLOAT32 if dtype == "float32" else 1
