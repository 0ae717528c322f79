"""Columns of a row that tables show: their names, what they say and how they are printed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from monosemy.evaluation.metrics import Row


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
    """A number of the table: its key in a row, its name, what it says, and how it is printed."""

    key: str
    label: str
    help: str
    digits: int | None = None  # after the point; None: a whole number
    low: str = ""  # keys of its interval
    high: str = ""
    plotted: str = ""  # "linear" or "log" where it can be an axis
    mark: str = ""  # a key that puts a star behind it

    def text(self, row: Row) -> str:
        value = finite(row, self.key)
        if value is None:
            return "-"
        low, high = finite(row, self.low), finite(row, self.high)
        star = "*" if row.get(self.mark) else ""
        return (
            self._one(value)
            + star
            + (f" [{self._one(low)}, {self._one(high)}]" if low is not None and high is not None else "")
        )

    def _one(self, value: float) -> str:
        return f"{value:,.0f}" if self.digits is None else f"{value:,.{self.digits}f}"


COLUMNS = (
    Column("l0", "L0", "How many latents are active on an average token.", 1, plotted="log"),
    Column(
        "loss_recovered_zero",
        "Loss recovered",
        "With the SAE's reconstruction in the place of the activations: 1 as the untouched model predicts, "
        "0 as with the activations set "
        "to zero. In brackets: where 95 of 100 re-draws of the held-out text would fall.",
        4,
        "loss_recovered_zero_low",
        "loss_recovered_zero_high",
        "linear",
    ),
    Column(
        "ce_diff",
        "CE diff",
        "How much worse the model's next-token prediction gets, in nats per token.",
        4,
        plotted="log",
    ),
    Column(
        "kl",
        "KL",
        "How far the model's next-token probabilities move, in nats per token; 0 is not at all.",
        4,
        plotted="log",
    ),
    Column(
        "fvu",
        "FVU",
        "Share of the activations' variance that the SAE misses; 0 is perfect, 1 no better than their mean. "
        "A star: over 1.2 times what "
        "exact top-k would miss.",
        4,
        plotted="log",
        mark="threshold_flag",
    ),
    Column("cossim", "Cosine", "Mean cosine of activations and reconstructions.", 4, plotted="linear"),
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
        "probing_auc_top_1",
        "Probe, 1 latent",
        "Mean AUC of probes that tell classes of texts apart by one latent.",
        3,
    ),
    Column("probing_auc_top_5", "Probe, 5 latents", "The same by five latents.", 3),
    Column("probing_auc_llm", "Probe, no SAE", "The same by the activations themselves.", 3),
)
