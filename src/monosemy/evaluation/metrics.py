"""One flat row of measurements for each SAE: on activations of any kind, or on held-out tokens through the
whole language model.

C contexts, L tokens of a context, B rows of a batch, D width of a site, F latents, N counted tokens, P
positions that predict, V vocabulary.

A token is *counted* unless it opens its context, is one of `ignore_ids`, or its norm is over the site's
limit. Only counted tokens enter metrics, and only they are replaced: by the reconstruction, by zero and by
the mean alike; all others keep the model's own activations. Cross-entropy and KL are taken where a counted
token predicts the next one, whatever that is: everywhere but at a context's end.

Sums are float64 and every ratio is one of sums over all tokens, never a mean of ratios: batch sizes cannot
show in the figures. Both kinds of evaluation add up in `_Sums` and read them in `_reconstruction`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from monosemy.errors import invalid
from monosemy.evaluation.latents import ALWAYS, DENSE, LatentStats, geometry
from monosemy.evaluation.missing import Missing
from monosemy.limits import HEAD_ELEMENTS, SELECTION_TOKENS
from monosemy.lm.info import Site
from monosemy.system import rng
from monosemy.system.progress import Progress

if TYPE_CHECKING:
    from monosemy.lm.model import CleanRun, LanguageModel
    from monosemy.sae import SAE

Row = dict[str, Any]

DRAWS = 1000  # of the bootstrap
HISTOGRAM_EDGES = [-6 + i / 2 for i in range(13)]  # log10 of the share of tokens on which a latent fires
THRESHOLD_TOLERANCE = 1.2  # a threshold whose FVU is so many times exact top-k's is flagged
ROWS, LOSSES = "row", "losses"  # parts that may be missing: an SAE's, or all SAEs' of a site


@torch.inference_mode()
def evaluate(
    saes: SAE | Sequence[SAE] | Mapping[str, SAE],
    batches: Iterable[Tensor],
    *,
    site: str = "activations",
    gather: Mapping[str, LatentStats] | None = None,
    missing: Missing | None = None,
) -> list[Row]:
    """A row for each SAE, in order, on activations of any kind [B, D]: of a vision model, of proteins, of a
    simulator.

    The columns are those of `evaluate_on_model`, but for the losses, and those of the decoder's geometry;
    `tokens` counts rows, as `unit` says. `batches` may be an iterator: it is read once, moved to the SAEs'
    device and regrouped to 2,048 rows, so that the size of batches cannot show, not even in the exact
    selection of batch_top_k. A list of SAEs is named sae_0, sae_1, ..; `site` names where the activations are
    from. `gather` sees the codes of every SAE that it names. With `missing` an SAE that fails has no row; it
    lists them.
    Raises ValueError for batches that are empty, not [B, d_in] or not finite, and for no SAE.
    """
    named = named_saes(saes)
    missing = Missing(strict=True) if missing is None else missing
    D, device = _common(named)
    sums = {name: _new_sums(sae, 0, device, (gather or {}).get(name)) for name, sae in named.items()}
    spread = _Spread()
    for x_ND in _regrouped(batches, D, device):
        at_N = torch.arange(spread.rows, spread.rows + len(x_ND), device=device)
        spread.add(x_ND)
        for name, sae in named.items():
            if missing.lacks(ROWS, name):
                continue
            with missing.part(ROWS, name):
                for mode, of in sums[name].items():
                    of.add(x_ND, sae, mode, at_N)
    if not spread.rows:
        raise invalid(
            "batches",
            "empty",
            "at least one batch [B, D]",
            "pass activations; an iterator that was read before has none left",
        )
    rows = []
    for name in (name for name in named if not missing.lacks(ROWS, name)):
        sae = named[name]
        columns = {mode: _reconstruction(of, spread.variance) for mode, of in sums[name].items()}
        about: Row = {
            "site": site,
            "layer": None,
            "unit": "rows",
            "tokens": spread.rows,
            "sparsity_setting": sae.sparsity_setting,
        }
        row = _row(name, sae, about | {"sparsity": getattr(sae.settings, sae.sparsity_setting)}, columns)
        with missing.part("decoder geometry", name):
            row |= geometry(sae).columns()
        rows.append(row)
    return rows


def named_saes(saes: SAE | Sequence[SAE] | Mapping[str, SAE]) -> dict[str, SAE]:
    """SAEs by their names; those of a list are sae_0, sae_1, ..

    Raises ValueError for none, and for what is no SAE.
    """
    if isinstance(saes, Mapping):
        named = dict(saes)
    else:
        named = {f"sae_{i}": sae for i, sae in enumerate(saes if isinstance(saes, Sequence) else [saes])}
    for sae in named.values():
        if not hasattr(sae, "d_sae"):
            raise invalid(
                "saes",
                type(sae).__name__,
                "an SAE, a list of SAEs or a dict of name and SAE",
                "pass `fitted.saes` or what `load` gives",
            )
    if not named:
        raise invalid("saes", "none", "at least one", "pass an SAE")
    return named


@torch.inference_mode()
def evaluate_on_model(
    lm: LanguageModel,
    saes: Mapping[str, tuple[Site, SAE]],
    contexts_CL: Tensor,
    *,
    ignore_ids: Tensor,
    batch_size: int = 8,
    splice_contexts: int | None = None,
    norm_limits: Mapping[Site, float | None] | None = None,
    info: Mapping[str, Mapping[str, Any]] | None = None,
    gather: Mapping[str, LatentStats] | None = None,
    seed: int = 0,
    sae_bench: bool = False,
    missing: Missing | None = None,
) -> list[Row]:
    """A row for each SAE, in order; SAEs take raw activations and are on the model's device, in float32.

    The model runs `batch_size` contexts at a time; what lies before a site runs once for all its SAEs.
    Splicing costs each SAE (and each of its modes) a run of everything after the site: `splice_contexts`
    limits it to the first contexts, 0 leaves it out; the row counts the tokens of both. An SAE with a second
    mode has that mode's columns under its name: `top_k_fvu` beside `fvu`. `norm_limits` are norms of
    activations, `info` adds columns to a row; `gather` sees the codes of every SAE that it names, in the
    SAE's first mode. With `sae_bench` zero ablation replaces every token, counted or not, and KL is also
    taken at a context's end: SAEBench's rules. With `missing` an SAE that fails has no row, and the SAEs of a
    site that cannot be spliced have rows without losses; it lists them.
    Raises ValueError for a site that the model was not loaded with, and without `missing` for contexts
    without a counted token, and a model that lacks its head or cannot be resumed where something is to be
    spliced.
    """
    C, L = contexts_CL.shape
    spliced = C if splice_contexts is None else min(splice_contexts, C)
    if L < 2 or C < 1:
        raise invalid(
            "contexts", (C, L), "at least one context of two tokens or more", "give more held-out tokens"
        )
    if spliced < 0:
        raise invalid(
            "splice_contexts", splice_contexts, "0 or more", "leave it out to splice into all contexts"
        )
    for name, (site, _) in saes.items():
        if site not in lm.sites:
            raise invalid(
                "site", str(site), ", ".join(map(str, lm.sites)), f"load the model with the site of {name}"
            )
    missing = Missing(strict=True) if missing is None else missing
    contexts_CL, ignore_ids = contexts_CL.to(lm.device), ignore_ids.to(lm.device)
    sites = {site: [name for name, (at, _) in saes.items() if at == site] for site, _ in saes.values()}
    limits = {site: (norm_limits or {}).get(site) or math.inf for site in sites}

    def counted(ids_BL: Tensor, x_BLD: Tensor, site: Site) -> Tensor:
        mask_BL = ~torch.isin(ids_BL, ignore_ids) & (x_BLD.float().norm(dim=-1) <= limits[site])
        mask_BL[:, 0] = False
        return mask_BL

    splice = dict.fromkeys(sites, spliced)  # how many contexts
    for site in sites if spliced else ():
        with missing.part(LOSSES, str(site)):
            _check_splicing(lm, contexts_CL[:1], site, spliced)
        if missing.lacks(LOSSES, str(site)):
            splice[site] = 0
    mean = {site: _Mean() for site in sites}
    for ids_BL in contexts_CL.split(batch_size):
        for site, x_BLD in lm.activations(ids_BL).items():
            if site in sites:
                mean[site].add(x_BLD[counted(ids_BL, x_BLD, site)])
    for site in list(sites):
        with missing.part(ROWS, str(site)):
            if not mean[site].tokens:
                raise invalid(
                    "ignore_ids",
                    "what is left out",
                    f"fewer than all tokens at {site}",
                    "give more held-out tokens",
                )
        if missing.lacks(ROWS, str(site)):
            del sites[site]

    at_site = {site: _SiteSums(mean[site].value, C) for site in sites}
    sums = {
        name: _new_sums(saes[name][1], C, lm.device, (gather or {}).get(name))
        for names in sites.values()
        for name in names
    }
    with Progress(total=C, unit="ctx", desc="evaluating") as progress:
        for first, ids_GL in _groups(contexts_CL, spliced):
            runs = _Runs(
                lm, ids_GL, list(sites), batch_size, splicing=first < max(splice.values(), default=0)
            )
            for site, names in sites.items():
                x_GLD = runs.activations(site)
                mask_GL = counted(ids_GL, x_GLD, site)
                x_ND = x_GLD[mask_GL].float()
                at_N = first * L + mask_GL.flatten().nonzero()[:, 0]
                at_site[site].add(x_ND)
                hats: dict[Any, Tensor] = {"zero": x_ND * 0, "mean": at_site[site].mean_D.expand_as(x_ND)}
                for name in names:
                    if missing.lacks(ROWS, name):
                        continue
                    sae = saes[name][1]
                    with missing.part(ROWS, name):
                        hats |= {
                            (name, mode): of.add(x_ND, sae, mode, at_N) for mode, of in sums[name].items()
                        }
                if first >= splice[site]:
                    continue
                with missing.part(LOSSES, str(site)):
                    for key, where_P, ce_P, kl_P in _spliced(
                        runs, site, hats, x_GLD, mask_GL, ids_GL, first, sae_bench
                    ):
                        of_run = (
                            at_site[site].losses[key] if isinstance(key, str) else sums[key[0]][key[1]].losses
                        )
                        of_run.add(where_P, ce_P, kl_P)
                if missing.lacks(LOSSES, str(site)):
                    splice[site] = 0
            progress.update(len(ids_GL))

    weights_WC, none = _bootstrap(spliced, seed), _no_losses(C, lm.device)
    rows = []
    for name, (site, sae) in saes.items():
        if site not in sites or missing.lacks(ROWS, name):
            continue
        shared = at_site[site].losses if splice[site] else none
        columns = {
            mode: _reconstruction(of, float(at_site[site].variance))
            | _loss_columns(of.losses if splice[site] else none["clean"], shared, weights_WC)
            for mode, of in sums[name].items()
        }
        about: Row = {
            "site": str(site),
            "layer": site.layer,
            "n_inputs": C,
            "context_length": L,
            "tokens": mean[site].tokens,
        }
        about |= {"spliced_tokens": shared["clean"].tokens} | dict((info or {}).get(name, {}))
        rows.append(_row(name, sae, about, columns))
    return rows


def dictionary_learning_results(row: Row) -> dict[str, Any]:
    """A row as dictionary_learning's `eval_results.json` nests it: its keys under its names, and ours beside
    them."""
    return {**row, "hyperparameters": {"n_inputs": row["n_inputs"], "context_length": row["context_length"]}}


# its core evaluation's categories and names -> ours; docs/sae-bench.md says where its formulas differ
SAE_BENCH = {
    "model_behavior_preservation": {"kl_div_with_ablation": "kl_zero", "kl_div_with_sae": "kl"},
    "model_performance_preservation": {
        "ce_loss_score": "loss_recovered_zero",
        "ce_loss_with_ablation": "ce_zero",
        "ce_loss_with_sae": "ce_spliced",
        "ce_loss_without_sae": "ce_clean",
    },
    "reconstruction_quality": {"mse": "mse", "cossim": "cossim"},
    "shrinkage": {"l2_ratio": "l2_ratio", "relative_reconstruction_bias": "relative_reconstruction_bias"},
    "sparsity": {"l0": "l0", "l1": "l1_loss"},
    "misc_metrics": {"frac_alive": "frac_alive"},
}


def sae_bench_results(row: Row) -> dict[str, dict[str, Any]]:
    """A row under SAEBench's names, by its categories.

    Their values are comparable where the row was made with `sae_bench=True`.
    """
    found = {
        category: {name: row[ours] for name, ours in names.items()} for category, names in SAE_BENCH.items()
    }
    found["model_behavior_preservation"]["kl_div_score"] = (
        None if row["kl"] is None else 1 - _ratio(row["kl"], row["kl_zero"])
    )
    found["reconstruction_quality"]["explained_variance"] = None if row["fvu"] is None else 1 - row["fvu"]
    found["misc_metrics"]["freq_over_10_percent"] = row["dense"] / row["d_sae"]
    return found


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned plain text: loss recovered is against zero ablation, with its 95 % interval; *
    flags a threshold."""
    columns = ("sae", "architecture", "L0", "FVU", "cosine", "loss recovered", "CE diff", "KL", "alive")

    def cells(row: Row) -> tuple[str, ...]:
        def number(key: str, digits: int) -> str:
            return "-" if row.get(key) is None else f"{row[key]:.{digits}f}"

        interval = f" [{number('loss_recovered_zero_low', 3)}, {number('loss_recovered_zero_high', 3)}]"
        recovered = number("loss_recovered_zero", 3) + (
            interval if row.get("loss_recovered_zero_low") is not None else ""
        )
        fvu = number("fvu", 3) + ("*" if row.get("threshold_flag") else "")
        rest = (number("ce_diff", 3), number("kl", 3), number("frac_alive", 3))
        return row["sae"], row["architecture"], number("l0", 1), fvu, number("cossim", 3), recovered, *rest

    lines = [columns, *map(cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    pad = [str.ljust if i < 2 else str.rjust for i in range(len(columns))]
    return "\n".join(
        "  ".join(pad[i](cell, widths[i]) for i, cell in enumerate(line)).rstrip() for line in lines
    )


# --- activations that come in batches -----------------------------------------------------------------------


def _common(saes: Mapping[str, SAE]) -> tuple[int, torch.device]:
    """The width and the device that all SAEs have."""
    found = {(sae.d_in, next(sae.parameters()).device) for sae in saes.values()}
    if len(found) > 1:
        said = ", ".join(f"{width} on {device}" for width, device in sorted(found, key=str))
        raise invalid(
            "saes",
            said,
            "SAEs of one d_in on one device",
            "evaluate those of other activations apart, or move them with sae.to(..)",
        )
    return found.pop()


def _regrouped(batches: Iterable[Tensor], D: int, device: torch.device) -> Iterator[Tensor]:
    """The rows in groups of SELECTION_TOKENS, the last one smaller, in float32 on a device."""
    waiting: list[Tensor] = []
    for i, x_BD in enumerate(batches):
        shape = tuple(getattr(x_BD, "shape", ()))
        if not isinstance(x_BD, Tensor) or len(shape) != 2 or shape[1] != D:
            raise invalid(
                f"batches[{i}]",
                shape or type(x_BD).__name__,
                f"a tensor [B, {D}], as wide as the SAEs",
                "flatten leading dimensions first",
            )
        x_BD = x_BD.to(device, torch.float32)
        if not x_BD.isfinite().all():
            raise invalid(
                f"batches[{i}]",
                "not finite",
                "finite activations",
                "find where infinities come from, or drop those rows",
            )
        waiting.append(x_BD)
        while sum(map(len, waiting)) >= SELECTION_TOKENS:
            rows_ND = torch.cat(waiting)
            yield rows_ND[:SELECTION_TOKENS]
            waiting = [rows_ND[SELECTION_TOKENS:]]
    if sum(map(len, waiting)):
        yield torch.cat(waiting)


class _Spread:
    """The variance of rows about their mean in one pass: float64 sums about the mean of the first ones, so
    that nothing cancels."""

    def __init__(self) -> None:
        self.rows, self.about_D = 0, torch.zeros(())
        self.sum_D = self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, x_ND: Tensor) -> None:
        if not self.rows:
            self.about_D = x_ND.double().mean(0)
        moved_ND = x_ND.double() - self.about_D
        self.rows += len(x_ND)
        self.sum_D = moved_ND.sum(0) + self.sum_D.to(x_ND.device)
        self.squares = moved_ND.square().sum() + self.squares.to(x_ND.device)

    @property
    def variance(self) -> float:
        """The summed squared distance from the mean."""
        return max(float(self.squares - self.sum_D.square().sum() / self.rows), 0.0)


# --- running the model --------------------------------------------------------------------------------------


def _groups(contexts_CL: Tensor, spliced: int) -> Iterator[tuple[int, Tensor]]:
    """The contexts in groups of about SELECTION_TOKENS tokens, which do not depend on the batch size, with
    each group's first index."""
    size = max(1, SELECTION_TOKENS // contexts_CL.shape[1])
    for start, stop in ((0, spliced), (spliced, len(contexts_CL))):
        for first in range(start, stop, size):
            yield first, contexts_CL[first : min(first + size, stop)]


class _Runs:
    """The model's runs over one group of contexts, some contexts at a time."""

    def __init__(
        self, lm: LanguageModel, ids_GL: Tensor, sites: Sequence[Site], batch_size: int, *, splicing: bool
    ) -> None:
        self.lm, self.batch_size = lm, batch_size
        batches = ids_GL.split(batch_size)
        self.cleans: list[CleanRun] = [lm.clean(ids_BL, sites) for ids_BL in batches] if splicing else []
        self.found = [clean.activations for clean in self.cleans] or [
            lm.activations(ids_BL) for ids_BL in batches
        ]

    def activations(self, site: Site) -> Tensor:
        return torch.cat([found[site] for found in self.found])

    def hidden(self) -> Tensor:
        return torch.cat([clean.hidden_BLD for clean in self.cleans])

    def resume(self, site: Site, replacement_GLD: Tensor) -> Tensor:
        parts = zip(self.cleans, replacement_GLD.split(self.batch_size), strict=True)
        return torch.cat([self.lm.run_from(clean, site, part_BLD) for clean, part_BLD in parts])


def _check_splicing(lm: LanguageModel, ids_1L: Tensor, site: Site, contexts: int) -> None:
    """Raises ValueError for a model without its head, and for one whose layers pass more than the hidden
    state on: what comes after a site cannot be run alone then."""
    if lm.model.get_output_embeddings() is None:
        raise invalid(
            "splice_contexts", contexts, "0 for a model without its head", "load the model with whole=True"
        )
    clean = lm.clean(ids_1L, [site])
    again_1LD = lm.run_from(clean, site, clean.activations[site])
    if (again_1LD - clean.hidden_BLD).abs().max() > 1e-3 * clean.hidden_BLD.abs().max():
        allowed = "one from which this model can be resumed: its layers share more than the hidden state"
        raise invalid("site", str(site), allowed, "evaluate with splice_contexts=0")


def _spliced(
    runs: _Runs,
    site: Site,
    hats: Mapping[Any, Tensor],
    x_GLD: Tensor,
    mask_GL: Tensor,
    ids_GL: Tensor,
    first: int,
    sae_bench: bool,
) -> Iterator[tuple[Any, Tensor, Tensor, Tensor | None]]:
    """What `_losses` yields of one group, whose counted tokens (`mask_GL`) are replaced by each of the
    reconstructions [N, D] in turn."""
    compared_GL = mask_GL.clone()
    compared_GL[:, -1] &= sae_bench
    hidden: dict[Any, Tensor] = {}
    for key, hat_ND in hats.items():
        replacement_GLD = x_GLD.clone()
        replacement_GLD[mask_GL] = hat_ND.to(x_GLD.dtype)
        if sae_bench and key == "zero":
            replacement_GLD.zero_()
        hidden[key] = runs.resume(site, replacement_GLD)[compared_GL]
    rows_P, at_P = compared_GL.nonzero(as_tuple=True)
    where_P = torch.where(at_P < ids_GL.shape[1] - 1, first + rows_P, -1)
    yield from _losses(runs.lm, runs.hidden()[compared_GL], hidden, where_P, ids_GL.roll(-1, 1)[compared_GL])


def _losses(
    lm: LanguageModel, clean_PD: Tensor, spliced_PD: Mapping[Any, Tensor], where_P: Tensor, next_P: Tensor
) -> Iterator[tuple[Any, Tensor, Tensor, Tensor | None]]:
    """(which run, contexts, cross-entropies, KL(clean || run)) in pieces, of the clean run ("clean") and of
    every spliced one.

    The context is -1 where nothing is predicted and the cross-entropy means nothing.
    """
    for piece in torch.arange(len(next_P), device=next_P.device).split(
        max(1, HEAD_ELEMENTS // lm.config.vocab_size)
    ):
        target_P1, rows_P = next_P[piece, None], where_P[piece]
        log_p_PV = lm.logits(clean_PD[piece]).float().log_softmax(-1)
        p_PV = log_p_PV.exp()
        yield "clean", rows_P, -log_p_PV.gather(1, target_P1)[:, 0], None
        for key, hidden_PD in spliced_PD.items():
            log_q_PV = lm.logits(hidden_PD[piece]).float().log_softmax(-1)
            yield key, rows_P, -log_q_PV.gather(1, target_P1)[:, 0], (log_p_PV - log_q_PV).mul_(p_PV).sum(-1)


# --- sums ---------------------------------------------------------------------------------------------------


class _Mean:
    def __init__(self) -> None:
        self.tokens, self.sum_D = 0, torch.zeros(())

    def add(self, x_ND: Tensor) -> None:
        self.tokens += len(x_ND)
        self.sum_D = self.sum_D.to(x_ND.device) + x_ND.double().sum(0)

    @property
    def value(self) -> Tensor:
        return (self.sum_D / self.tokens).float()


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


class _SiteSums:
    """Per-site accumulators: the variance about the mean, and the baseline runs (clean, zero- and
    mean-ablated)."""

    def __init__(self, mean_D: Tensor, C: int) -> None:
        self.mean_D = mean_D
        self.variance = torch.zeros((), dtype=torch.float64, device=mean_D.device)
        self.losses = _no_losses(C, mean_D.device)

    def add(self, x_ND: Tensor) -> None:
        self.variance += (x_ND - self.mean_D).square().sum(1).double().sum()


def _no_losses(C: int, device: torch.device) -> dict[str, _Losses]:
    return {key: _Losses(C, device) for key in ("clean", "zero", "mean")}


class _Sums:
    """One SAE in one mode."""

    def __init__(self, sae: SAE, C: int, device: torch.device, seen: LatentStats | None = None) -> None:
        self.tokens, self.seen = 0, seen
        self.fired_F = torch.zeros(sae.d_sae, dtype=torch.long, device=device)
        self.residual_D = torch.zeros(sae.d_in, dtype=torch.float64, device=device)
        self.of: dict[str, Tensor] = {}
        self.losses = _Losses(C, device)

    def add(self, x_ND: Tensor, sae: SAE, mode: str, at_N: Tensor) -> Tensor:
        """Encode and decode counted tokens, whose places are `at_N`; returns the reconstruction [N, D]."""
        f_NF = sae.encode(x_ND, mode=mode)
        if self.seen is not None:
            self.seen.add(f_NF, at_N)
        hat_ND = sae.decode(f_NF)
        residual_ND = x_ND - hat_ND
        fired_NF = f_NF != 0
        x_norm_N, hat_norm_N, error_N = (v.norm(dim=1).double() for v in (x_ND, hat_ND, residual_ND))
        dot_N = (x_ND * hat_ND).sum(1).double()
        tiny = torch.finfo(torch.float32).tiny  # a zero vector has cosine and ratio 0
        self.tokens += len(x_ND)
        self.fired_F += fired_NF.sum(0)
        self.residual_D += residual_ND.double().sum(0)
        new = {
            "l0": fired_NF.sum(),
            "l1": f_NF.abs().sum(1).double().sum(),
            "error": error_N.sum(),
            "squared_error": error_N.square().sum(),
            "cosine": (dot_N / (x_norm_N * hat_norm_N).clamp(min=tiny)).sum(),
            "ratio": (hat_norm_N / x_norm_N.clamp(min=tiny)).sum(),
            "hat_squared": hat_norm_N.square().sum(),
            "dot": dot_N.sum(),
        }
        self.of = {key: value + self.of.get(key, 0) for key, value in new.items()}
        return hat_ND


def _new_sums(sae: SAE, C: int, device: torch.device, seen: LatentStats | None) -> dict[str, _Sums]:
    """For each of an SAE's modes; what is gathered of latents is seen in the first."""
    return {mode: _Sums(sae, C, device, seen if mode == sae.modes[0] else None) for mode in sae.modes}


# --- from sums to a row -------------------------------------------------------------------------------------


def _row(name: str, sae: SAE, about: Row, columns: Mapping[str, Row]) -> Row:
    """A row from its columns in each mode: those of the first under their own names, those of another after
    the mode's."""
    row: Row = {"sae": name, "architecture": sae.name, "d_in": sae.d_in, "d_sae": sae.d_sae} | about
    for mode in sae.modes:
        prefix = "" if mode == sae.modes[0] else f"{mode}_"
        row |= {prefix + key: _finite(value) for key, value in columns[mode].items()}
    if row.get("top_k_fvu") is not None:
        row["threshold_flag"] = row["fvu"] > THRESHOLD_TOLERANCE * row["top_k_fvu"]
    return row


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _reconstruction(sums: _Sums, variance: float) -> Row:
    """The columns that need no language model, of one SAE in one mode.

    First dictionary_learning's, under its names, then ours.
    """
    n, of = sums.tokens, {key: float(value) for key, value in sums.of.items()}
    # dictionary_learning's variance is about the residual's own mean, so that a constant error is free; FVU's
    # is not.
    residual_variance = of["squared_error"] - float(sums.residual_D.square().sum()) / n
    frequency_F = sums.fired_F.double() / n
    fires_F = frequency_F > 0
    edges = torch.tensor(HISTOGRAM_EDGES[1:-1], dtype=torch.float64, device=frequency_F.device)
    bins = torch.bucketize(frequency_F[fires_F].log10(), edges, right=True)
    return {
        "l2_loss": of["error"] / n,
        "l1_loss": of["l1"] / n,
        "l0": of["l0"] / n,
        "frac_variance_explained": 1 - _ratio(residual_variance, variance),
        "cossim": of["cosine"] / n,
        "l2_ratio": of["ratio"] / n,
        "relative_reconstruction_bias": _ratio(of["hat_squared"], of["dot"]),
        "frac_alive": float(fires_F.double().mean()),
        "mse": of["squared_error"] / n,
        "fvu": _ratio(of["squared_error"], variance),
        "never_fired": int((~fires_F).sum()),
        "dense": int((frequency_F > DENSE).sum()),
        "always_on": int((frequency_F > ALWAYS).sum()),
        "firing_log10_edges": HISTOGRAM_EDGES,
        "firing_counts": torch.bincount(bins, minlength=len(HISTOGRAM_EDGES) - 1).tolist(),
    }


def _loss_columns(spliced: _Losses, shared: Mapping[str, _Losses], weights_WC: Tensor) -> Row:
    """The columns of the language model's losses, of one SAE in one mode.

    First dictionary_learning's, under its names, then ours.
    """
    clean, zero, mean = (shared[key] for key in ("clean", "zero", "mean"))
    recovered = {
        against: _ratio(base.ce - spliced.ce, base.ce - clean.ce)
        for against, base in (("zero", zero), ("mean", mean))
    }
    columns = {
        "loss_original": clean.ce,
        "loss_reconstructed": spliced.ce,
        "loss_zero": zero.ce,
        "frac_recovered": recovered["zero"],
        "ce_clean": clean.ce,
        "ce_spliced": spliced.ce,
        "ce_zero": zero.ce,
        "ce_mean": mean.ce,
        "ce_diff": spliced.ce - clean.ce,
        "kl": _ratio(float(spliced.kl), spliced.kl_tokens),
        "kl_zero": _ratio(float(zero.kl), zero.kl_tokens),
        "kl_mean": _ratio(float(mean.kl), mean.kl_tokens),
        "loss_recovered_zero": recovered["zero"],
        "loss_recovered_mean": recovered["mean"],
    }
    for against, base in (("zero", zero), ("mean", mean)):
        low, high = _interval(base.ce_C - spliced.ce_C, base.ce_C - clean.ce_C, weights_WC)
        columns |= {f"loss_recovered_{against}_low": low, f"loss_recovered_{against}_high": high}
    return columns


def _ratio(above: float, below: float) -> float:
    return above / below if below else math.nan


def _bootstrap(C: int, seed: int) -> Tensor:
    """How often each context is drawn, [W, C], in DRAWS draws of C contexts with replacement."""
    drawn_WC = torch.randint(max(C, 1), (DRAWS, C), generator=rng.generator(seed, "bootstrap"))
    return torch.zeros(DRAWS, C, dtype=torch.float64).scatter_add_(
        1, drawn_WC, torch.ones(DRAWS, C, dtype=torch.float64)
    )


def _interval(above_C: Tensor, below_C: Tensor, weights_WC: Tensor) -> tuple[float, float]:
    """The central 95 % of a ratio of sums over contexts, by the percentile bootstrap (Efron and Tibshirani
    1993, chapter 13)."""
    C = weights_WC.shape[1]
    if not C:
        return math.nan, math.nan
    ratio_W = (weights_WC @ above_C[:C].cpu()) / (weights_WC @ below_C[:C].cpu())
    low, high = ratio_W.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
