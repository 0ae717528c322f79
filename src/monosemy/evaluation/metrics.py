"""One flat row of measurements for each SAE, on activations of any kind; what rows are called elsewhere, and
their table.

B rows of a batch, D width, F latents, N counted tokens.

Sums are float64 and every ratio is one of sums over all tokens, never a mean of ratios: batch sizes cannot
show in the figures. Every evaluation adds up in `ReconstructionSums` and reads them in
`reconstruction_columns`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from monosemy.crosscoder import Crosscoder
from monosemy.errors import invalid
from monosemy.evaluation.columns import Row, ratio
from monosemy.evaluation.diffing import LatentScaling, comparable
from monosemy.evaluation.geometry import geometry
from monosemy.evaluation.latent_stats import LatentStats
from monosemy.evaluation.latents import ALWAYS, DENSE
from monosemy.evaluation.missing import Missing
from monosemy.limits import SELECTION_TOKENS

if TYPE_CHECKING:
    from monosemy.sae import SAE


HISTOGRAM_EDGES = [-6 + i / 2 for i in range(13)]  # log10 of the share of tokens on which a latent fires
THRESHOLD_TOLERANCE = 1.2  # a threshold whose FVU is so many times exact top-k's is flagged
ROWS = "row"  # the part of an evaluation that an SAE may lack


@torch.inference_mode()
def evaluate(
    saes: SAE | Sequence[SAE] | Mapping[str, SAE],
    batches: Iterable[Tensor | tuple[Tensor, Tensor]],
    *,
    site: str = "activations",
    gather: Mapping[str, LatentStats] | None = None,
    missing: Missing | None = None,
) -> list[Row]:
    """Return a row for each SAE, in order, on activations of any kind [B, D]: of a vision model, of proteins,
    of a simulator.

    The columns are those of `evaluate_on_model`, but for the losses, and those of the decoder's geometry;
    `tokens` counts rows, as `unit` says. What reads or writes several sites takes tuples, as `fit` does.
    `batches` may be an iterator: it is read once, moved to the SAEs' device and regrouped to 2,048 rows, so
    that the size of batches cannot show, not even in the exact selection of batch_top_k. A list of SAEs is
    named sae_0, sae_1, ..; `site` names where the activations are from. `gather` sees the codes of every SAE
    that it names. With `missing` an SAE that fails has no row; it lists them.
    Raises ValueError for batches that are empty, not [B, d_in] or not finite, and for no SAE.
    """
    named = named_saes(saes)
    missing = Missing(strict=True) if missing is None else missing
    widths, device = _common(named)
    sums = {name: new_sums(sae, device, (gather or {}).get(name)) for name, sae in named.items()}
    spread = _Spread()
    for rows_ND in _regrouped(batches, widths, device):
        x_ND, y_ND = next(iter(named.values())).operands(rows_ND)
        at_N = torch.arange(spread.rows, spread.rows + len(x_ND), device=device)
        spread.add(y_ND)
        for name, sae in named.items():
            if missing.lacks(ROWS, name):
                continue
            with missing.part(ROWS, name):
                for of in sums[name].values():
                    of.add(x_ND, y_ND, sae, at_N)
    if not spread.rows:
        remedy = "pass activations; an iterator that was read before has none left"
        raise invalid("batches", "empty", "at least one batch [B, D]", remedy)
    rows = []
    for name in (name for name in named if not missing.lacks(ROWS, name)):
        sae = named[name]
        columns = {
            mode: reconstruction_columns(of, spread.variances(sae.target_widths))
            for mode, of in sums[name].items()
        }
        info: Row = {
            "site": site,
            "layer": None,
            "unit": "rows",
            "tokens": spread.rows,
            "sparsity_setting": sae.sparsity_setting,
        }
        row = make_row(name, sae, info | {"sparsity": getattr(sae.settings, sae.sparsity_setting)}, columns)
        row |= diffing_columns(sae, sums[name])
        with missing.part("decoder geometry", name):
            row |= geometry(sae).columns()
        rows.append(row)
    return rows


def named_saes(saes: SAE | Sequence[SAE] | Mapping[str, SAE]) -> dict[str, SAE]:
    """Return SAEs by their names; those of a list are sae_0, sae_1, ..

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


def dictionary_learning_results(row: Row) -> dict[str, Any]:
    """Return a row as dictionary_learning's `eval_results.json` nests it: its keys under its names, and ours
    beside them."""
    return {**row, "hyperparameters": {"n_inputs": row["n_inputs"], "context_length": row["context_length"]}}


# --- activations that come in batches -----------------------------------------------------------------------


def _common(saes: Mapping[str, SAE]) -> tuple[tuple[int, ...], torch.device]:
    """Return the widths of what all SAEs take, two for transcoders, and their device."""
    found = {(sae.widths, sae.device) for sae in saes.values()}
    if len(found) > 1:
        named = ((" to ".join(map(str, widths)), device) for widths, device in sorted(found, key=str))
        said = ", ".join(f"{width} on {device}" for width, device in named)
        raise invalid(
            "saes",
            said,
            "SAEs of one d_in on one device",
            "evaluate those of other activations apart, or move them with sae.to(..)",
        )
    return found.pop()


def _regrouped(
    batches: Iterable[Tensor | tuple[Tensor, Tensor]], widths: tuple[int, ...], device: torch.device
) -> Iterator[Tensor]:
    """Yield the rows in groups of SELECTION_TOKENS, the last one smaller, in float32 on a device; those of
    pairs side by side."""
    waiting: list[Tensor] = []
    for i, batch in enumerate(batches):
        matrices = list(batch) if isinstance(batch, tuple | list) else [batch]
        shapes = [tuple(x.shape) if isinstance(x, Tensor) else () for x in matrices]
        fits = len(shapes) == len(widths) and all(
            len(shape) == 2 and shape[1] == width for shape, width in zip(shapes, widths, strict=True)
        )
        if not fits or len({shape[0] for shape in shapes}) != 1:
            allowed = f"a tensor [B, {widths[0]}], as wide as the SAEs"
            if len(widths) == 2:
                allowed = f"a pair ([B, {widths[0]}], [B, {widths[1]}]), as wide as the transcoders"
            said = (shapes[0] or type(matrices[0]).__name__) if len(matrices) == 1 else tuple(shapes)
            raise invalid(f"batches[{i}]", said, allowed, "flatten leading dimensions first")
        x_BD = torch.cat([x.to(device, torch.float32) for x in matrices], 1)
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
        self.sum_D = self.square_D = torch.zeros((), dtype=torch.float64)

    def add(self, x_ND: Tensor) -> None:
        if not self.rows:
            self.about_D = x_ND.double().mean(0)
        moved_ND = x_ND.double() - self.about_D
        self.rows += len(x_ND)
        self.sum_D = moved_ND.sum(0) + self.sum_D.to(x_ND.device)
        self.square_D = moved_ND.square().sum(0) + self.square_D.to(x_ND.device)

    def variances(self, widths: Sequence[int]) -> list[float]:
        """Return the summed squared distance from the mean, of each part of the rows."""
        of_parts = (self.square_D - self.sum_D.square() / self.rows).split(list(widths))
        return [max(float(of_part.sum()), 0.0) for of_part in of_parts]


# --- sums ---------------------------------------------------------------------------------------------------


class PartSums:
    """Sums over tokens of one part of what an SAE reconstructs: all of it, but for a crosscoder's sources."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.residual_D = torch.zeros(width, dtype=torch.float64, device=device)
        self.of: dict[str, Tensor] = {}

    def add(self, y_ND: Tensor, hat_ND: Tensor) -> None:
        residual_ND = y_ND - hat_ND
        y_norm_N, hat_norm_N, error_N = (v.norm(dim=1).double() for v in (y_ND, hat_ND, residual_ND))
        dot_N = (y_ND * hat_ND).sum(1).double()
        tiny = torch.finfo(torch.float32).tiny  # a zero vector has cosine and ratio 0
        self.residual_D += residual_ND.double().sum(0)
        new = {
            "error": error_N.sum(),
            "squared_error": error_N.square().sum(),
            "cosine": (dot_N / (y_norm_N * hat_norm_N).clamp(min=tiny)).sum(),
            "ratio": (hat_norm_N / y_norm_N.clamp(min=tiny)).sum(),
            "hat_squared": hat_norm_N.square().sum(),
            "dot": dot_N.sum(),
        }
        self.of = {key: value + self.of.get(key, 0) for key, value in new.items()}

    def columns(self, n: int, variance: float) -> Row:
        """Return the columns of n tokens."""
        of = {key: float(value) for key, value in self.of.items()}
        # dictionary_learning's variance is about the residual's own mean, so that a constant error is free;
        # FVU's is not.
        residual_variance = of["squared_error"] - float(self.residual_D.square().sum()) / n
        return {
            "l2_loss": of["error"] / n,
            "frac_variance_explained": 1 - ratio(residual_variance, variance),
            "cossim": of["cosine"] / n,
            "l2_ratio": of["ratio"] / n,
            "relative_reconstruction_bias": ratio(of["hat_squared"], of["dot"]),
            "mse": of["squared_error"] / n,
            "fvu": ratio(of["squared_error"], variance),
        }


class ReconstructionSums:
    """Sums over tokens of one SAE in one mode, from which `reconstruction_columns` makes columns."""

    def __init__(self, sae: SAE, mode: str, device: torch.device, seen: LatentStats | None = None) -> None:
        """What is gathered of latents, `seen`, and what compares two models are of the SAE's first mode."""
        self.tokens, self.mode = 0, mode
        self.fired_F = torch.zeros(sae.d_sae, dtype=torch.long, device=device)
        self.active = self.total = torch.zeros((), device=device)
        self.parts = [PartSums(width, device) for width in sae.target_widths]
        first = mode == sae.modes[0]
        self.seen = seen if first else None
        self.scaling = None
        if first and isinstance(sae, Crosscoder) and comparable(sae):
            self.scaling = LatentScaling(sae, device)

    def add(self, x_ND: Tensor, y_ND: Tensor, sae: SAE, at_N: Tensor) -> Tensor:
        """Encode counted tokens, whose places are `at_N`, and decode them to y, which is x for an
        autoencoder; returns the reconstruction [N, D]."""
        f_NF = sae.encode(x_ND, mode=self.mode)
        if self.seen is not None:
            self.seen.add(f_NF, at_N)
        hat_ND = sae.reconstruct(f_NF, x_ND)
        fired_NF = f_NF != 0
        self.tokens += len(x_ND)
        self.fired_F += fired_NF.sum(0)
        self.active = self.active + fired_NF.sum()
        self.total = self.total + f_NF.abs().sum(1).double().sum()
        of_parts = (z_ND.split(sae.target_widths, 1) for z_ND in (y_ND, hat_ND))
        for part, y, hat in zip(self.parts, *of_parts, strict=True):
            part.add(y, hat)
        if self.scaling is not None:
            self.scaling.add(f_NF, y_ND, hat_ND)
        return hat_ND


def new_sums(sae: SAE, device: torch.device, seen: LatentStats | None) -> dict[str, ReconstructionSums]:
    """Make the sums of each of an SAE's modes; what is gathered of latents is seen in the first."""
    return {mode: ReconstructionSums(sae, mode, device, seen) for mode in sae.modes}


# --- from sums to a row -------------------------------------------------------------------------------------


def make_row(name: str, sae: SAE, info: Row, columns: Mapping[str, Row]) -> Row:
    """Return a row from its columns in each mode: those of the first under their own names, those of another
    after the mode's."""
    row: Row = {"sae": name, "architecture": sae.name, "d_in": sae.d_in, "d_sae": sae.d_sae} | info
    for mode in sae.modes:
        prefix = "" if mode == sae.modes[0] else f"{mode}_"
        row |= {prefix + key: _finite(value) for key, value in columns[mode].items()}
    if row.get("top_k_fvu") is not None:
        row["threshold_flag"] = row["fvu"] > THRESHOLD_TOLERANCE * row["top_k_fvu"]
    return row


def finite_row(row: Row) -> Row:
    """Return a row as JSON can hold it: None for what is not finite."""
    return {key: _finite(value) for key, value in row.items()}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def diffing_columns(sae: SAE, sums: Mapping[str, ReconstructionSums]) -> Row:
    """Return the columns that compare two models, of a crosscoder of both; none for anything else. Those of
    latents go to what is gathered of them."""
    of = sums[sae.modes[0]]
    if of.scaling is None or not isinstance(sae, Crosscoder):
        return {}
    if of.seen is not None:
        of.seen.beside |= of.scaling.columns(sae)
    return of.scaling.row(sae)


def mean_of(rows: Sequence[Row]) -> Row:
    """Return the mean of each number over the parts of what an SAE reconstructs, None where one lacks it."""
    return {
        key: None if any(row[key] is None for row in rows) else sum(row[key] for row in rows) / len(rows)
        for key in rows[0]
    }


def part_columns(sums: ReconstructionSums, variances: Sequence[float]) -> list[Row]:
    """Return the columns of each part of what an SAE reconstructs."""
    pairs = zip(sums.parts, variances, strict=True)
    return [part.columns(sums.tokens, variance) for part, variance in pairs]


def reconstruction_columns(sums: ReconstructionSums, variances: Sequence[float]) -> Row:
    """Return the columns that need no language model, of one SAE in one mode, given the variance of each part
    of what it reconstructs: those of several parts are their mean.

    First dictionary_learning's, under its names, then ours.
    """
    n, of = sums.tokens, mean_of(part_columns(sums, variances))
    frequency_F = sums.fired_F.double() / n
    fires_F = frequency_F > 0
    edges = torch.tensor(HISTOGRAM_EDGES[1:-1], dtype=torch.float64, device=frequency_F.device)
    bins = torch.bucketize(frequency_F[fires_F].log10(), edges, right=True)
    return {
        "l2_loss": of["l2_loss"],
        "l1_loss": float(sums.total) / n,
        "l0": float(sums.active) / n,
        "frac_variance_explained": of["frac_variance_explained"],
        "cossim": of["cossim"],
        "l2_ratio": of["l2_ratio"],
        "relative_reconstruction_bias": of["relative_reconstruction_bias"],
        "frac_alive": float(fires_F.double().mean()),
        "mse": of["mse"],
        "fvu": of["fvu"],
        "never_fired": int((~fires_F).sum()),
        "dense": int((frequency_F > DENSE).sum()),
        "always_on": int((frequency_F > ALWAYS).sum()),
        "firing_log10_edges": HISTOGRAM_EDGES,
        "firing_counts": torch.bincount(bins, minlength=len(HISTOGRAM_EDGES) - 1).tolist(),
    }
