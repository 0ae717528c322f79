"""Evaluation on held-out tokens through the whole language model: reconstruction, and losses with each SAE
spliced in.

C contexts, L tokens of a context, G contexts of a group, D width of a site, F latents, N counted tokens, P
positions that predict, V vocabulary, W draws of the bootstrap.

A token is *counted* unless it opens its context, is one of `ignore_ids`, or its norm is over the site's
limit. Only counted tokens enter metrics, and only they are replaced: by the reconstruction, by zero and by
the mean alike, a transcoder's where it writes; all others keep the model's own activations. Cross-entropy
and KL are taken where a counted token predicts the next one, whatever that is: everywhere but at a context's
end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from monosemy.cross_layer import CrossLayerTranscoder
from monosemy.crosscoder import Crosscoder
from monosemy.errors import invalid
from monosemy.evaluation.columns import Row, ratio
from monosemy.evaluation.latent_stats import LatentStats
from monosemy.evaluation.metrics import (
    ROWS,
    ReconstructionSums,
    diffing_columns,
    finite_row,
    make_row,
    mean_of,
    new_sums,
    part_columns,
    reconstruction_columns,
)
from monosemy.evaluation.missing import Missing
from monosemy.limits import HEAD_ELEMENTS, SELECTION_TOKENS
from monosemy.lm.info import Site
from monosemy.lm.model import CleanRun, LanguageModel
from monosemy.lm.site_groups import (
    AnySite,
    CrossLayer,
    SiteGroup,
    SitePair,
    of_parts,
    parts,
    reads,
    single_sites,
    writes,
)
from monosemy.lm.splicing import counted_tokens, resumes
from monosemy.lm.two_models import Models
from monosemy.system import rng
from monosemy.system.progress import Progress
from monosemy.transcoder import Transcoder

if TYPE_CHECKING:
    from monosemy.sae import SAE

Key = tuple[str, str]  # an SAE and its mode, or one of the baselines
Limits = float | Sequence[float] | None

LOSSES = "losses"  # the part of an evaluation that a site's SAEs may lack
CLEAN, ZERO, MEAN = ("", "clean"), ("", "zero"), ("", "mean")  # the baselines
DRAWS = 1000  # of the bootstrap


@torch.inference_mode()
def evaluate_on_model(
    lm: Models,
    saes: Mapping[str, tuple[AnySite, SAE]],
    contexts_CL: Tensor,
    *,
    ignore_ids: Tensor,
    batch_size: int = 8,
    splice_contexts: int | None = None,
    norm_limits: Mapping[AnySite, Limits] | None = None,
    info: Mapping[str, Mapping[str, Any]] | None = None,
    gather: Mapping[str, LatentStats] | None = None,
    seed: int = 0,
    sae_bench: bool = False,
    missing: Missing | None = None,
) -> list[Row]:
    """Return a row for each SAE, in order; SAEs take raw activations and are on the model's device, in
    float32.

    The model runs `batch_size` contexts at a time; what lies before a site runs once for all its SAEs.
    Splicing costs each SAE (and each of its modes) a run of everything after the site: `splice_contexts`
    limits it to the first contexts, 0 leaves it out; the row counts the tokens of both. An SAE with a second
    mode has that mode's columns under its name: `top_k_fvu` beside `fvu`. A crosscoder's columns are means
    over its sources, each of which is spliced by itself; `by_site` has those of each. `norm_limits` are norms
    of activations, one of each place that is read; `info` adds columns to a row; `gather` sees the codes of
    every SAE that it names, in the SAE's first mode. With `sae_bench` zero ablation replaces every token,
    counted or not, and KL is also taken at a context's end: SAEBench's rules. With `missing` an SAE that
    fails has no row, and the SAEs of a site that cannot be spliced have rows without losses; it lists them.
    Raises ValueError for a site that the model was not loaded with, and without `missing` for contexts
    without a counted token, and a model that lacks its head or cannot be resumed where something is to be
    spliced.
    """
    spliced = _check_inputs(lm, saes, contexts_CL, splice_contexts)
    missing = Missing(strict=True) if missing is None else missing
    contexts_CL, ignore_ids = contexts_CL.to(lm.device), ignore_ids.to(lm.device)
    of_site: dict[AnySite, dict[str, SAE]] = {}
    for name, (site, sae) in saes.items():
        of_site.setdefault(site, {})[name] = sae
    sites = {
        site: _SiteEvaluation(site, named, ignore_ids, (norm_limits or {}).get(site))
        for site, named in of_site.items()
    }
    for one in sites.values():
        one.check_splicing(lm, contexts_CL[:1], spliced, missing)
    for ids_BL in contexts_CL.split(batch_size):
        found = lm.activations(ids_BL)
        for one in sites.values():
            one.add_to_mean(ids_BL, found)
    sites = {at: one for at, one in sites.items() if one.has_tokens(missing)}
    for one in sites.values():
        one.start(len(contexts_CL), lm.device, gather or {})
    with Progress(total=len(contexts_CL), unit="ctx", desc="evaluating") as progress:
        for first, ids_GL in _groups(contexts_CL, spliced):
            splicing = first < max((one.spliced for one in sites.values()), default=0)
            runs = _Runs(lm, ids_GL, list(sites), batch_size, splicing=splicing)
            for one in sites.values():
                one.add(runs, ids_GL, first, sae_bench, missing)
            progress.update(len(ids_GL))
    weights_WC = _bootstrap(spliced, seed)
    names = [name for name, (at, _) in saes.items() if at in sites and not missing.lacks(ROWS, name)]
    return [sites[saes[n][0]].row(n, contexts_CL, dict((info or {}).get(n, {})), weights_WC) for n in names]


def _check_inputs(
    lm: Models,
    saes: Mapping[str, tuple[AnySite, SAE]],
    contexts_CL: Tensor,
    splice_contexts: int | None,
) -> int:
    """Return how many contexts are spliced into. Raises ValueError for what cannot be evaluated."""
    C, L = contexts_CL.shape
    if L < 2 or C < 1:
        allowed = "at least one context of two tokens or more"
        raise invalid("contexts", (C, L), allowed, "give more held-out tokens")
    if splice_contexts is not None and splice_contexts < 0:
        raise invalid(
            "splice_contexts", splice_contexts, "0 or more", "leave it out to splice into all contexts"
        )
    for name, (site, sae) in saes.items():
        kinds = ((Transcoder, SitePair), (Crosscoder, SiteGroup), (CrossLayerTranscoder, CrossLayer))
        if any(isinstance(sae, of_sae) != isinstance(site, of_site) for of_sae, of_site in kinds):
            allowed = (
                "a pair of sites for a transcoder, a group for a crosscoder, one site for an autoencoder"
            )
            raise invalid("site", str(site), allowed, f"name what {name} reads and what it reconstructs")
        if not set(parts(site)) <= set(lm.sites):
            raise invalid(
                "site", str(site), ", ".join(map(str, lm.sites)), f"load the model with the site of {name}"
            )
    return C if splice_contexts is None else min(splice_contexts, C)


class _SiteEvaluation:
    """Accumulators of one site: mean, variance, its SAEs' sums, and losses of all runs, those of the
    baselines included. Of a group of sites each is replaced by itself."""

    def __init__(self, site: AnySite, saes: Mapping[str, SAE], ignore_ids: Tensor, limits: Limits) -> None:
        self.read, self.replaced = reads(site), writes(site)
        self.site, self.saes, self.ignore_ids = site, saes, ignore_ids
        self.norm_limits = of_parts(limits) if limits else (math.inf,) * len(self.read)
        self.spliced = 0  # contexts
        self.tokens, self.sum_D = 0, torch.zeros(())
        self.mean_D = torch.zeros(())
        self.variances: list[Tensor] = []
        self.sums: dict[str, dict[str, ReconstructionSums]] = {}
        self.losses: dict[Site, dict[Key, _Losses]] = {}

    def check_splicing(self, lm: Models, ids_1L: Tensor, contexts: int, missing: Missing) -> None:
        """Set how many contexts are spliced into: none where the model cannot be run from the site."""
        self.spliced = contexts
        if contexts:
            with missing.part(LOSSES, str(self.site)):
                for site in self.replaced:
                    _check_splicing(lm.of(site), ids_1L, site, contexts)
            self._stop_splicing_if(missing)

    def _stop_splicing_if(self, missing: Missing) -> None:
        if missing.lacks(LOSSES, str(self.site)):
            self.spliced = 0

    def counted(self, ids_BL: Tensor, read: Sequence[Tensor]) -> Tensor:
        """Return the mask of the tokens that are counted, given what is read, [B, L, D] each."""
        return counted_tokens(ids_BL, self.ignore_ids, read, self.norm_limits)

    def add_to_mean(self, ids_BL: Tensor, found: Mapping[Site, Tensor]) -> None:
        """Add a batch's counted tokens to the mean."""
        mask_BL = self.counted(ids_BL, [found[site] for site in self.read])
        y_ND = _beside([found[site][mask_BL] for site in self.replaced])
        self.tokens += len(y_ND)
        self.sum_D = self.sum_D.to(y_ND.device) + y_ND.double().sum(0)

    def has_tokens(self, missing: Missing) -> bool:
        """Whether any token is counted; a site without one is missing."""
        with missing.part(ROWS, str(self.site)):
            if not self.tokens:
                allowed = f"fewer than all tokens at {self.site}"
                raise invalid("ignore_ids", "what is left out", allowed, "give more held-out tokens")
        return not missing.lacks(ROWS, str(self.site))

    def start(self, C: int, device: torch.device, gather: Mapping[str, LatentStats]) -> None:
        """Make the accumulators of the second pass, in which the mean is known."""
        self.mean_D = (self.sum_D / self.tokens).float()
        self.variances = [torch.zeros((), dtype=torch.float64, device=device) for _ in self.replaced]
        self.sums = {name: new_sums(sae, device, gather.get(name)) for name, sae in self.saes.items()}
        self.losses = self._no_losses(C, device)

    def _no_losses(self, C: int, device: torch.device) -> dict[Site, dict[Key, _Losses]]:
        keys = [CLEAN, ZERO, MEAN, *((name, mode) for name, sae in self.saes.items() for mode in sae.modes)]
        return {site: {key: _Losses(C, device) for key in keys} for site in self.replaced}

    def add(self, runs: _Runs, ids_GL: Tensor, first: int, sae_bench: bool, missing: Missing) -> None:
        """Encode a group's tokens with every SAE, splice the reconstructions in and add up what follows."""
        found = {site: runs.activations(site) for site in dict.fromkeys((*self.read, *self.replaced))}
        mask_GL = self.counted(ids_GL, [found[site] for site in self.read])
        x_ND, y_ND = (
            _beside([found[site][mask_GL].float() for site in sites]) for sites in (self.read, self.replaced)
        )
        at_N = first * ids_GL.shape[1] + mask_GL.flatten().nonzero()[:, 0]
        widths = [found[site].shape[-1] for site in self.replaced]
        for variance, moved_ND in zip(self.variances, (y_ND - self.mean_D).split(widths, 1), strict=True):
            variance += moved_ND.square().sum(1).double().sum()
        replacements: dict[Key, Tensor] = {ZERO: y_ND * 0, MEAN: self.mean_D.expand_as(y_ND)}
        for name, sae in self.saes.items():
            if missing.lacks(ROWS, name):
                continue
            with missing.part(ROWS, name):
                sums = self.sums[name]
                replacements |= {(name, mode): of.add(x_ND, y_ND, sae, at_N) for mode, of in sums.items()}
        if first >= self.spliced:
            return
        of_sites = {key: hat_ND.split(widths, 1) for key, hat_ND in replacements.items()}
        with missing.part(LOSSES, str(self.site)):
            for i, site in enumerate(self.replaced):
                of_site = {key: hats[i] for key, hats in of_sites.items()}
                spliced = _spliced(runs, site, of_site, found[site], mask_GL, ids_GL, first, sae_bench)
                for key, where_P, ce_P, kl_P in spliced:
                    self.losses[site][key].add(where_P, ce_P, kl_P)
        self._stop_splicing_if(missing)

    def row(self, name: str, contexts_CL: Tensor, info: Row, weights_WC: Tensor) -> Row:
        """Make an SAE's row."""
        C, L = contexts_CL.shape
        if not self.spliced:
            self.losses = {
                site: {key: _Losses(C, contexts_CL.device) for key in of} for site, of in self.losses.items()
            }
        variances = [float(variance) for variance in self.variances]
        columns = {
            mode: reconstruction_columns(sums, variances)
            | _loss_columns((name, mode), list(self.losses.values()), weights_WC)
            for mode, sums in self.sums[name].items()
        }
        base: Row = {"site": str(self.site), "layer": self.site.layer, "n_inputs": C, "context_length": L}
        tokens = next(iter(self.losses.values()))[CLEAN].tokens
        base |= {"tokens": self.tokens, "spliced_tokens": tokens} | info
        row = make_row(name, self.saes[name], base, columns) | diffing_columns(
            self.saes[name], self.sums[name]
        )
        return (
            row if len(self.replaced) == 1 else row | {"by_site": self._by_site(name, variances, weights_WC)}
        )

    def _by_site(self, name: str, variances: Sequence[float], weights_WC: Tensor) -> dict[str, Row]:
        """Return an SAE's columns at each of several sites, in its first mode."""
        mode = self.saes[name].modes[0]
        of_parts = part_columns(self.sums[name][mode], variances)
        return {
            str(site): finite_row(of_part | _loss_columns((name, mode), [losses], weights_WC))
            for (site, losses), of_part in zip(self.losses.items(), of_parts, strict=True)
        }


# --- running the model --------------------------------------------------------------------------------------


def _groups(contexts_CL: Tensor, spliced: int) -> Iterator[tuple[int, Tensor]]:
    """Yield the contexts in groups of about SELECTION_TOKENS tokens, which do not depend on the batch size,
    with each group's first index."""
    size = max(1, SELECTION_TOKENS // contexts_CL.shape[1])
    for start, stop in ((0, spliced), (spliced, len(contexts_CL))):
        for first in range(start, stop, size):
            yield first, contexts_CL[first : min(first + size, stop)]


class _Runs:
    """The model's runs over one group of contexts, some contexts at a time."""

    def __init__(
        self, lm: Models, ids_GL: Tensor, sites: Sequence[AnySite], batch_size: int, *, splicing: bool
    ) -> None:
        self.lm, self.batch_size = lm, batch_size
        self.cleans: dict[LanguageModel, list[CleanRun]] = {}
        batches = ids_GL.split(batch_size)
        of_model: dict[LanguageModel, list[Site]] = {}
        for site in single_sites(sites):
            of_model.setdefault(lm.of(site), []).append(site)
        if splicing:
            for model, of in of_model.items():
                self.cleans[model] = [model.clean(ids_BL, of) for ids_BL in batches]
        self.found = {
            model: [clean.activations for clean in self.cleans[model]]
            if splicing
            else [model.activations(ids_BL) for ids_BL in batches]
            for model in of_model
        }

    def activations(self, site: Site) -> Tensor:
        return torch.cat([found[site] for found in self.found[self.lm.of(site)]])

    def hidden(self, site: Site) -> Tensor:
        """Return the final hidden state of the untouched model that a site is of."""
        return torch.cat([clean.hidden_BLD for clean in self.cleans[self.lm.of(site)]])

    def run_from(self, site: Site, replacement_GLD: Tensor) -> Tensor:
        model = self.lm.of(site)
        parts = zip(self.cleans[model], replacement_GLD.split(self.batch_size), strict=True)
        return torch.cat([model.run_from(clean, site, part_BLD) for clean, part_BLD in parts])


def _beside(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), -1)


def _check_splicing(lm: LanguageModel, ids_1L: Tensor, site: Site, contexts: int) -> None:
    """Raises ValueError for a model without its head, and for one whose layers pass more than the hidden
    state on: what comes after a site cannot be run alone then."""
    if lm.model.get_output_embeddings() is None:
        raise invalid(
            "splice_contexts", contexts, "0 for a model without its head", "load the model with whole=True"
        )
    if not resumes(lm, ids_1L, site):
        allowed = "one from which this model can be resumed: its layers share more than the hidden state"
        raise invalid("site", str(site), allowed, "evaluate with splice_contexts=0")


def _spliced(
    runs: _Runs,
    site: Site,
    replacements: Mapping[Key, Tensor],
    y_GLD: Tensor,
    mask_GL: Tensor,
    ids_GL: Tensor,
    first: int,
    sae_bench: bool,
) -> Iterator[tuple[Key, Tensor, Tensor, Tensor | None]]:
    """Yield what `_losses` yields of one group, whose counted tokens (`mask_GL`) are replaced by each of the
    reconstructions [N, D] in turn."""
    compared_GL = mask_GL.clone()
    compared_GL[:, -1] &= sae_bench
    hidden: dict[Key, Tensor] = {}
    for key, hat_ND in replacements.items():
        replacement_GLD = y_GLD.clone()
        replacement_GLD[mask_GL] = hat_ND.to(y_GLD.dtype)
        if sae_bench and key == ZERO:
            replacement_GLD.zero_()
        hidden[key] = runs.run_from(site, replacement_GLD)[compared_GL]
    rows_P, at_P = compared_GL.nonzero(as_tuple=True)
    where_P = torch.where(at_P < ids_GL.shape[1] - 1, first + rows_P, -1)
    clean_PD, next_P = runs.hidden(site)[compared_GL], ids_GL.roll(-1, 1)[compared_GL]
    yield from _losses(runs.lm.of(site), clean_PD, hidden, where_P, next_P)


def _losses(
    lm: LanguageModel, clean_PD: Tensor, spliced_PD: Mapping[Key, Tensor], where_P: Tensor, next_P: Tensor
) -> Iterator[tuple[Key, Tensor, Tensor, Tensor | None]]:
    """Yield (which run, contexts, cross-entropies, KL(clean || run)) in pieces, of the clean run and of
    every spliced one.

    The context is -1 where nothing is predicted and the cross-entropy means nothing.
    """
    for piece in torch.arange(len(next_P), device=next_P.device).split(
        max(1, HEAD_ELEMENTS // lm.config.vocab_size)
    ):
        target_P1, rows_P = next_P[piece, None], where_P[piece]
        log_p_PV = lm.logits(clean_PD[piece]).float().log_softmax(-1)
        p_PV = log_p_PV.exp()
        yield CLEAN, rows_P, -log_p_PV.gather(1, target_P1)[:, 0], None
        for key, hidden_PD in spliced_PD.items():
            log_q_PV = lm.logits(hidden_PD[piece]).float().log_softmax(-1)
            yield key, rows_P, -log_q_PV.gather(1, target_P1)[:, 0], (log_p_PV - log_q_PV).mul_(p_PV).sum(-1)


# --- losses -------------------------------------------------------------------------------------------------


class _Losses:
    """Cross-entropy by context, and KL."""

    def __init__(self, C: int, device: torch.device) -> None:
        self.tokens = self.kl_tokens = 0
        self.ce_C = torch.zeros(C, dtype=torch.float64, device=device)
        self.kl = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, rows_P: Tensor, ce_P: Tensor, kl_P: Tensor | None) -> None:
        predicts_P = rows_P >= 0
        self.tokens += int(predicts_P.sum())
        self.ce_C.index_add_(0, rows_P[predicts_P], ce_P[predicts_P].double())
        if kl_P is not None:
            self.kl_tokens += len(kl_P)
            self.kl += kl_P.double().sum()

    @property
    def ce(self) -> float:
        return float(self.ce_C.sum()) / self.tokens if self.tokens else math.nan


def _loss_columns(key: Key, sites: Sequence[Mapping[Key, _Losses]], weights_WC: Tensor) -> Row:
    """Return the columns of the language model's losses, of one SAE in one mode: means over the sites that
    are replaced one by one.

    First dictionary_learning's, under its names, then ours.
    """
    columns = mean_of([_losses_at(key, losses) for losses in sites])
    for against, base in (("zero", ZERO), ("mean", MEAN)):
        draws = [
            _draws(of[base].ce_C - of[key].ce_C, of[base].ce_C - of[CLEAN].ce_C, weights_WC) for of in sites
        ]
        low, high = _interval(torch.stack(draws).mean(0))
        columns |= {f"loss_recovered_{against}_low": low, f"loss_recovered_{against}_high": high}
    return columns


def _losses_at(key: Key, losses: Mapping[Key, _Losses]) -> Row:
    """Return the columns of one site."""
    spliced, clean, zero, mean = (losses[of] for of in (key, CLEAN, ZERO, MEAN))
    recovered = {
        against: ratio(base.ce - spliced.ce, base.ce - clean.ce)
        for against, base in (("zero", zero), ("mean", mean))
    }
    return {
        "loss_original": clean.ce,
        "loss_reconstructed": spliced.ce,
        "loss_zero": zero.ce,
        "frac_recovered": recovered["zero"],
        "ce_clean": clean.ce,
        "ce_spliced": spliced.ce,
        "ce_zero": zero.ce,
        "ce_mean": mean.ce,
        "ce_diff": spliced.ce - clean.ce,
        "kl": ratio(float(spliced.kl), spliced.kl_tokens),
        "kl_zero": ratio(float(zero.kl), zero.kl_tokens),
        "kl_mean": ratio(float(mean.kl), mean.kl_tokens),
        "loss_recovered_zero": recovered["zero"],
        "loss_recovered_mean": recovered["mean"],
    }


def _bootstrap(C: int, seed: int) -> Tensor:
    """Return how often each context is drawn, [W, C], in DRAWS draws of C contexts with replacement."""
    drawn_WC = torch.randint(max(C, 1), (DRAWS, C), generator=rng.generator(seed, "bootstrap"))
    return torch.zeros(DRAWS, C, dtype=torch.float64).scatter_add_(
        1, drawn_WC, torch.ones(DRAWS, C, dtype=torch.float64)
    )


def _draws(above_C: Tensor, below_C: Tensor, weights_WC: Tensor) -> Tensor:
    """Return a ratio of sums over contexts in each draw of the bootstrap, [W]."""
    C = weights_WC.shape[1]
    return (weights_WC @ above_C[:C].cpu()) / (weights_WC @ below_C[:C].cpu())


def _interval(ratio_W: Tensor) -> tuple[float, float]:
    """Return the central 95 % of a ratio, by the percentile bootstrap (Efron and Tibshirani 1993, chapter
    13); NaN without contexts."""
    low, high = ratio_W.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
