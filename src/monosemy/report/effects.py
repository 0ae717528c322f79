"""A picture of the strongest parts of a prediction: bars, the strongest on top."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.figure import Figure

from monosemy.report.drawing import INK, STYLE, plain_text

RAISES, LOWERS = "#2f6fb2", "#c4512d"  # told apart by their side, too


def effect_bars(labels: Sequence[str], effects: Sequence[float], what: str) -> Figure:
    """Draw a bar for each effect, with its label, in the order in which they are given."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 0.8 + 0.24 * max(len(labels), 1)), layout="constrained")
        axis = figure.add_subplot()
        places = range(len(labels))
        colors = [RAISES if effect > 0 else LOWERS for effect in effects]
        axis.barh(places, effects, color=colors, height=0.7)
        axis.set_yticks(places, [plain_text(label) for label in labels])
        axis.invert_yaxis()
        axis.axvline(0, color=INK, linewidth=0.8)
        axis.grid(axis="y", visible=False)
        axis.set_xlabel(plain_text(what))
    return figure
