"""Evaluation of a set of transcoders as a whole: every component replaced at once, with and without what the
transcoders leave out.

B contexts, L tokens of a context, N counted tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from monosemy.cross_layer import CrossLayerParts
from monosemy.errors import invalid
from monosemy.evaluation.columns import Row, ratio
from monosemy.limits import HEAD_ELEMENTS
from monosemy.lm.model import LanguageModel
from monosemy.lm.replaced import check_replaceable, run_replaced
from monosemy.lm.site_groups import SitePair, parts
from monosemy.lm.splicing import counted_tokens
from monosemy.sae import SAE
from monosemy.system.progress import Progress
from monosemy.transcoder import Transcoder

RUNS = ("replaced", "with_errors", "zero", "mean")


@torch.inference_mode()
def evaluate_replacement(
    lm: LanguageModel,
    transcoders: Mapping[SitePair, SAE | CrossLayerParts],
    contexts_CL: Tensor,
    *,
    ignore_ids: Tensor,
    batch_size: int = 8,
    norm_limits: Mapping[SitePair, float | None] | None = None,
) -> Row:
    """Return a row of the model in which all transcoders stand for their components at once.

    Each reads what the replaced model before it makes; the parts of a cross-layer transcoder
    (`CrossLayerParts.of`) come in the order of layers. Replaced is where a token is counted: not the first of
    its context, not one of `ignore_ids`, and in the untouched model not over the norm limit of what the
    component reads; elsewhere the component itself runs. Columns: the cross-entropies of the untouched
    model and with every component replaced (`ce_replaced`), set to zero or to its mean at counted tokens; the
    loss recovered between these; `kl`, and `top1_agreement`, the share of predictions whose most likely token
    stays. `ce_with_errors` and `errors_kl` are of the model in which each transcoder's error in the untouched
    model is added back, which must be the untouched one: a self-check. `errors_carry` is the share of
    predictions that need the errors: whose most likely token changes without them.
    Raises ValueError for autoencoders, for no transcoder, two for one target, a target that is no output or
    comes before its source, and for contexts without a counted token.
    """
    if not transcoders:
        raise invalid("transcoders", "none", "at least one", "name a run of transcoders")
    for pair, sae in transcoders.items():
        if not isinstance(sae, Transcoder | CrossLayerParts):
            allowed = "transcoders, which stand for what is between two sites"
            raise invalid(f"transcoders: {pair}", sae.name, allowed, "train them with transcode")
    check_replaceable(lm, transcoders)
    contexts_CL, ignore_ids = contexts_CL.to(lm.device), ignore_ids.to(lm.device)
    limits = {pair: (norm_limits or {}).get(pair) or math.inf for pair in transcoders}
    sums = {run: _Sums() for run in ("clean", *RUNS)}
    means = _means(lm, transcoders, contexts_CL, ignore_ids, limits, batch_size)
    with Progress(total=len(contexts_CL), unit="ctx", desc="replacing") as progress:
        for ids_BL in contexts_CL.split(batch_size):
            hidden = _runs(lm, transcoders, ids_BL, ignore_ids, limits, means)
            predicts = counted_tokens(ids_BL, ignore_ids)
            predicts[:, -1] = False
            next_P = ids_BL.roll(-1, 1)[predicts]
            _add(lm, sums, {run: hidden_BLD[predicts] for run, hidden_BLD in hidden.items()}, next_P)
            progress.update(len(ids_BL))
    return {"replaced": [str(pair) for pair in transcoders]} | _columns(sums)


def _means(
    lm: LanguageModel,
    transcoders: Mapping[SitePair, SAE | CrossLayerParts],
    contexts_CL: Tensor,
    ignore_ids: Tensor,
    limits: Mapping[SitePair, float],
    batch_size: int,
) -> dict[SitePair, Tensor]:
    """Return the mean of what each component writes at counted tokens, [D]."""
    total = {pair: torch.zeros((), dtype=torch.float64, device=lm.device) for pair in transcoders}
    tokens = dict.fromkeys(transcoders, 0)
    for ids_BL in contexts_CL.split(batch_size):
        found = lm.activations(ids_BL)
        for pair in transcoders:
            mask_BL = counted_tokens(ids_BL, ignore_ids, [found[pair.source]], [limits[pair]])
            tokens[pair] += int(mask_BL.sum())
            total[pair] = total[pair] + found[pair.target][mask_BL].double().sum(0)
    for pair, n in tokens.items():
        if not n:
            allowed = f"fewer than all tokens at {pair}"
            raise invalid("ignore_ids", "what is left out", allowed, "give more held-out tokens")
    return {pair: (total[pair] / n).float() for pair, n in tokens.items()}


def _runs(
    lm: LanguageModel,
    transcoders: Mapping[SitePair, SAE | CrossLayerParts],
    ids_BL: Tensor,
    ignore_ids: Tensor,
    limits: Mapping[SitePair, float],
    means: Mapping[SitePair, Tensor],
) -> dict[str, Tensor]:
    """Return the final hidden states [B, L, D] of the untouched model and of every replaced one."""
    clean = lm.clean(ids_BL, [part for pair in transcoders for part in parts(pair)])
    masks = {
        pair: counted_tokens(ids_BL, ignore_ids, [clean.activations[pair.source]], [limits[pair]])
        for pair in transcoders
    }
    errors = {
        pair: clean.activations[pair.target].float() - sae(clean.activations[pair.source].float())
        for pair, sae in transcoders.items()
    }

    def replaced(pair: SitePair, run: str, x_BLD: Tensor, y_BLD: Tensor) -> Tensor:
        if run in ("zero", "mean"):
            other_BLD = (means[pair] * (run == "mean")).expand_as(y_BLD)
        else:
            other_BLD = transcoders[pair](x_BLD.float())
            if run == "with_errors":
                other_BLD = other_BLD + errors[pair]
        return torch.where(masks[pair][..., None], other_BLD.to(y_BLD.dtype), y_BLD)

    return {"clean": clean.hidden_BLD} | {
        run: run_replaced(lm, ids_BL, {pair: partial(replaced, pair, run) for pair in transcoders})
        for run in RUNS
    }


class _Sums:
    """What is added up of one run's predictions."""

    def __init__(self) -> None:
        self.tokens, self.ce, self.kl, self.same = 0, 0.0, 0.0, 0

    def add(self, log_p_PV: Tensor, log_q_PV: Tensor, next_P: Tensor) -> None:
        """Add predictions q beside those of the untouched model, p."""
        self.tokens += len(next_P)
        self.ce -= float(log_q_PV.gather(1, next_P[:, None]).double().sum())
        self.kl += float(((log_p_PV - log_q_PV) * log_p_PV.exp()).sum(-1).double().sum())
        self.same += int((log_p_PV.argmax(-1) == log_q_PV.argmax(-1)).sum())


def _add(lm: LanguageModel, sums: Mapping[str, _Sums], hidden: Mapping[str, Tensor], next_P: Tensor) -> None:
    """Add the predictions of all runs, in pieces that the head's output fits in."""
    for piece in torch.arange(len(next_P)).split(max(1, HEAD_ELEMENTS // lm.config.vocab_size)):
        log_p_PV = lm.logits(hidden["clean"][piece]).float().log_softmax(-1)
        for run, hidden_PD in hidden.items():
            log_q_PV = log_p_PV if run == "clean" else lm.logits(hidden_PD[piece]).float().log_softmax(-1)
            sums[run].add(log_p_PV, log_q_PV, next_P[piece])


def _columns(sums: Mapping[str, _Sums]) -> Row:
    tokens = sums["clean"].tokens
    if not tokens:
        allowed = "contexts with tokens that predict"
        raise invalid("contexts", "no counted token", allowed, "give more held-out tokens")
    ce = {run: of.ce / tokens for run, of in sums.items()}
    agreement = sums["replaced"].same / tokens
    columns: Row = {"spliced_tokens": tokens} | {f"ce_{run}": value for run, value in ce.items()}
    for against in ("zero", "mean"):
        recovered = ratio(ce[against] - ce["replaced"], ce[against] - ce["clean"])
        columns[f"loss_recovered_{against}"] = recovered
    return columns | {
        "kl": sums["replaced"].kl / tokens,
        "errors_kl": sums["with_errors"].kl / tokens,
        "top1_agreement": agreement,
        "errors_carry": sums["with_errors"].same / tokens - agreement,
    }
