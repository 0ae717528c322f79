"""The metrics of a row: their names, what they say, how they are printed, and where.

The text table, the page, the model card and SAE Bench's names are all made of this list. Nothing here
imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Row = dict[str, Any]
Place = Literal["table", "page", "card"]


def ratio(above: float, below: float) -> float:
    """Divide; NaN by zero."""
    return above / below if below else math.nan


def finite(row: Mapping[str, Any], key: str) -> float | None:
    """Return a finite number of a row; None for anything else."""
    value = row.get(key)
    return (
        value
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        else None
    )


@dataclass(frozen=True)
class Column:
    """A metric: its key in a row, its name, what it says, how it is printed, and where."""

    key: str
    label: str
    help: str
    digits: int | None = None  # after the point; None: a whole number
    places: tuple[Place, ...] = ("page",)
    low: str = ""  # keys of its interval
    high: str = ""
    plotted: str = ""  # "linear" or "log" where it can be an axis
    mark: str = ""  # a key that puts a star behind it
    sae_bench: str = ""  # its category and name in SAE Bench's core evaluation

    def text(self, row: Mapping[str, Any], digits: int | None = None) -> str:
        """Return the number as text, with its interval; `digits` after the point instead of its own."""
        value = finite(row, self.key)
        if value is None:
            return "-"
        digits = self.digits if digits is None else digits
        low, high = finite(row, self.low), finite(row, self.high)
        interval = (
            "" if low is None or high is None else f" [{_number(low, digits)}, {_number(high, digits)}]"
        )
        return _number(value, digits) + ("*" if row.get(self.mark) else "") + interval


def _number(value: float, digits: int | None) -> str:
    return f"{value:,.0f}" if digits is None else f"{value:,.{digits}f}"


def _unseen(key: str, label: str, help: str, sae_bench: str) -> Column:
    """Return a metric that is in rows and in SAE Bench's results alone."""
    return Column(key, label, help, 4, places=(), sae_bench=sae_bench)


def _scored(key: str, label: str, what: str) -> Column:
    """Return a mean score of labels, with its interval over latents."""
    help = f"How well a model can {what}: balanced accuracy, .5 for guesses, by the label alone; the mean of "
    help += "the latents drawn at random (arXiv 2410.13928)."
    return Column(key, label, help, 3, low=f"{key}_low", high=f"{key}_high")


ALL: tuple[Place, ...] = ("table", "page", "card")
# docs/sae-bench.md says where SAE Bench's formulas differ
COLUMNS = (
    Column("d_sae", "Latents", "How many latents the SAE has.", places=("card",)),
    Column(
        "l0",
        "L0",
        "How many latents are active on an average token.",
        1,
        ALL,
        plotted="log",
        sae_bench="sparsity.l0",
    ),
    Column(
        "loss_recovered_zero",
        "Loss recovered",
        "With the SAE's reconstruction in the place of the activations: 1 as the untouched model predicts, "
        "0 as with the activations set to zero. In brackets: where 95 of 100 re-draws of the held-out text "
        "would fall.",
        4,
        ALL,
        "loss_recovered_zero_low",
        "loss_recovered_zero_high",
        "linear",
        sae_bench="model_performance_preservation.ce_loss_score",
    ),
    Column(
        "ce_diff",
        "CE diff",
        "How much worse the model's next-token prediction gets, in nats per token.",
        4,
        ("table", "page"),
        plotted="log",
    ),
    Column(
        "kl",
        "KL",
        "How far the model's next-token probabilities move, in nats per token; 0 is not at all.",
        4,
        ALL,
        plotted="log",
        sae_bench="model_behavior_preservation.kl_div_with_sae",
    ),
    Column(
        "fvu",
        "FVU",
        "Share of the activations' variance that the SAE misses; 0 is perfect, 1 no better than their mean. "
        "A star: over 1.2 times what exact top-k would miss.",
        4,
        ALL,
        plotted="log",
        mark="threshold_flag",
    ),
    Column(
        "cossim",
        "Cosine",
        "Mean cosine of activations and reconstructions.",
        4,
        ("table", "page"),
        plotted="linear",
        sae_bench="reconstruction_quality.cossim",
    ),
    Column(
        "frac_alive",
        "Alive",
        "Share of the latents that are active on one of the held-out tokens or more.",
        3,
        ("table", "card"),
        sae_bench="misc_metrics.frac_alive",
    ),
    Column(
        "never_fired",
        "Never fired",
        "Latents that are active on none of the held-out tokens.",
        plotted="linear",
    ),
    Column("dense", "Dense", "Latents that are active on more than 10 % of the tokens."),
    Column("always_on", "Always on", "Latents that are active on more than half of the tokens."),
    Column(
        "near_copies", "Near copies", "Latents whose decoder has a cosine over 0.9 with another latent's."
    ),
    Column("copies", "Copies", "Latents whose decoder has a cosine over 0.999 with another latent's."),
    Column(
        "encoder_decoder_cosine",
        "Enc-dec cosine",
        "Mean cosine of a latent's encoder and decoder: does it read what it writes?",
        3,
    ),
    Column(
        "first_only",
        "First source only",
        "Of a crosscoder's two sources, layers or models: latents that fired and whose decoder is the first "
        "one's, with under a tenth of its norms at the second.",
    ),
    Column("shared", "Shared", "Latents that fired and are written about equally to both, 40 to 60 %."),
    Column("second_only", "Second source only", "As the first, of the second source."),
    Column(
        "exclusive_but_in_both",
        "Not exclusive",
        "Latents of one source alone by their norms that latent scaling finds in the other one, too: nu of "
        "the error over 0.2, or of the reconstruction over 0.5 (arXiv 2504.02922).",
    ),
    Column(
        "probing_auc_top_1",
        "Probe, 1 latent",
        "Mean AUC of probes that tell classes of texts apart by one latent.",
        3,
    ),
    Column("probing_auc_top_5", "Probe, 5 latents", "The same by five latents.", 3),
    Column("probing_auc_llm", "Probe, no SAE", "The same by the activations themselves.", 3),
    Column("label_count", "Labels", "Latents that have a label by a language model."),
    _scored("label_detection", "Detection", "tell contexts in which a latent fires from others"),
    _scored("label_detection_other", "Detection, other label", "do that by another latent's label"),
    _scored("label_fuzzing", "Fuzzing", "tell tokens on which a latent fires from others of its contexts"),
    _scored("label_fuzzing_other", "Fuzzing, other label", "do that by another latent's label"),
    _unseen(
        "kl_zero",
        "KL, zero ablation",
        "KL with the activations set to zero, in nats per token.",
        "model_behavior_preservation.kl_div_with_ablation",
    ),
    _unseen(
        "ce_zero",
        "Loss, zero ablation",
        "Loss with the activations set to zero, in nats per token.",
        "model_performance_preservation.ce_loss_with_ablation",
    ),
    _unseen(
        "ce_spliced",
        "Loss, SAE",
        "Loss with the reconstruction in place, in nats per token.",
        "model_performance_preservation.ce_loss_with_sae",
    ),
    _unseen(
        "ce_clean",
        "Loss, model",
        "Loss of the untouched model, in nats per token.",
        "model_performance_preservation.ce_loss_without_sae",
    ),
    _unseen("mse", "MSE", "Mean squared error of a coordinate.", "reconstruction_quality.mse"),
    _unseen(
        "l2_ratio",
        "Norm ratio",
        "Mean ratio of the reconstruction's norm to the activation's.",
        "shrinkage.l2_ratio",
    ),
    _unseen(
        "relative_reconstruction_bias",
        "Relative bias",
        "Relative reconstruction bias, gamma in appendix P of the Gated SAE paper.",
        "shrinkage.relative_reconstruction_bias",
    ),
    _unseen("l1_loss", "L1", "Mean sum of a token's latents.", "sparsity.l1"),
)


def columns_of(place: Place) -> tuple[Column, ...]:
    """Return the metrics that one place shows, in its order."""
    return tuple(column for column in COLUMNS if place in column.places)


def table(rows: Sequence[Row]) -> str:
    """Return the rows as aligned plain text, to three digits; * flags a threshold."""
    return _aligned(rows, columns_of("table"))


def label_columns() -> tuple[Column, ...]:
    """Return the columns that say how well labels foretell latents."""
    return tuple(column for column in COLUMNS if column.key.startswith("label_"))


def labels_table(rows: Sequence[Row]) -> str:
    """Return the scores of labels as aligned plain text, of the rows that have any."""
    return _aligned([row for row in rows if "label_count" in row], label_columns())


def _aligned(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    lines = [
        ("sae", "architecture", *(column.label for column in columns)),
        *(
            (
                row["sae"],
                row["architecture"],
                *(column.text(row, min(column.digits or 0, 3)) for column in columns),
            )
            for row in rows
        ),
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    pad = [str.ljust if i < 2 else str.rjust for i in range(len(widths))]
    return "\n".join(
        "  ".join(pad[i](cell, widths[i]) for i, cell in enumerate(line)).rstrip() for line in lines
    )


def sae_bench_results(row: Row) -> dict[str, dict[str, Any]]:
    """Return a row under SAEBench's names, by its categories.

    Their values are comparable where the row was made with `sae_bench=True`.
    """
    found: dict[str, dict[str, Any]] = {}
    for column in COLUMNS:
        if column.sae_bench:
            category, name = column.sae_bench.split(".")
            found.setdefault(category, {})[name] = row[column.key]
    found["model_behavior_preservation"]["kl_div_score"] = (
        None if row["kl"] is None else 1 - ratio(row["kl"], row["kl_zero"])
    )
    found["reconstruction_quality"]["explained_variance"] = None if row["fvu"] is None else 1 - row["fvu"]
    found["misc_metrics"]["freq_over_10_percent"] = row["dense"] / row["d_sae"]
    return found
