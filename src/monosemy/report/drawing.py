"""What all plots share: the style, marks of architectures, facets, legends and axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from monosemy.report.looks import UNKNOWN, looks

MATPLOTLIB_MARKERS = {
    "circle": "o",
    "square": "s",
    "triangle-up": "^",
    "triangle-down": "v",
    "diamond": "D",
    "plus": "P",
    "x": "X",
    "star": "*",
    "pentagon": "p",
    "hexagon": "H",
}
INK, FAINT = "#24292f", "#d8dee4"
# A fixed salt and no date: the same rows give the same file. DejaVu Sans comes with matplotlib and has
# figures of one width.
STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "white",
    "figure.constrained_layout.w_pad": 0.06,
    "figure.constrained_layout.h_pad": 0.06,
    "svg.hashsalt": "monosemy",
}


def look(architecture: str, known: Sequence[str] = ()) -> tuple[str, str]:
    """Return (color, marker) of an architecture; one without a look is gray with a number for a marker.

    `known` lists the architectures of the figure, so that two unknown ones get different numbers.
    """
    declared = looks()
    if architecture in declared:
        found = declared[architecture]
        return found.light, MATPLOTLIB_MARKERS.get(found.marker, "o")
    strangers = sorted(set(known) - declared.keys() | {architecture})
    return UNKNOWN[0], f"${strangers.index(architecture) + 1}$"


def marker_of(architecture: str, known: Sequence[str], size: float) -> dict[str, Any]:
    """Return the line properties of an architecture's marker, sized so that all have about the same area."""
    color, marker = look(architecture, known)
    if marker.startswith("$"):
        return {"color": color, "marker": marker, "markersize": 1.2 * size, "markeredgewidth": 0.3}
    scale = {"*": 1.5, "P": 1.15, "X": 1.15, "D": 0.85}.get(marker, 1.0)
    return {
        "color": color,
        "marker": marker,
        "markersize": scale * size,
        "markeredgecolor": "white",
        "markeredgewidth": 0.6,
    }


def arrow_down(axis: Axes, x: float, value: float, color: str) -> None:
    """Draw an arrow at the lower edge with the value of a point below the scale."""
    axis.annotate(
        f"{value:.2f}",
        (x, 0),
        (0, 12),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="center",
        fontsize=7.5,
        color=color,
        arrowprops={"arrowstyle": "-|>", "color": color, "lw": 1, "shrinkA": 0, "shrinkB": 0},
    )


def make_facets(
    sites: Sequence[str],
    *,
    height: float,
    width: float,
    columns: int,
    share_x: bool = False,
    share_y: bool = True,
) -> tuple[Figure, list[Axes]]:
    """Return a figure with one titled panel per site (at least one panel), `columns` in a row, and room for a
    legend at the right."""
    count = max(len(sites), 1)
    across = min(count, columns)
    down = math.ceil(count / across)
    figure = Figure(figsize=(2.2 + width * across, 0.5 + height * down), layout="constrained")
    axes = list(figure.subplots(down, across, sharex=share_x, sharey=share_y, squeeze=False).flat)
    for spare in axes[count:]:
        spare.remove()
    for site, axis in zip(sites, axes, strict=False):
        axis.set_title(plain_text(shortened(site, 44)), loc="left", fontweight="bold")
    return figure, axes[:count]


def add_legend(
    figure: Figure,
    names: Sequence[str],
    *,
    line: bool = False,
    hollow: str = "",
    styles: Mapping[str, Any] | None = None,
) -> None:
    """Draw the legend outside the data: the architectures that the figure shows; then what a hollow marker
    means, then line styles by name."""
    handles = [
        Line2D([], [], **marker_of(name, names, 6.5), linewidth=1.1 if line else 0, label=plain_text(name))
        for name in names
    ]
    if hollow:
        handles.append(
            Line2D(
                [], [], linewidth=0, marker="P", markersize=7, color=INK, markerfacecolor="none", label=hollow
            )
        )
    handles += [
        Line2D([], [], color=INK, linewidth=1.1, linestyle=style, label=plain_text(name))
        for name, style in (styles or {}).items()
    ]
    if handles:
        figure.legend(
            handles=handles,
            loc="outside right upper",
            title="Architecture",
            alignment="left",
            labelspacing=0.7,
        )


def write_below(figure: Figure, *lines: str) -> None:
    """Write under the whole figure; empty lines fall away."""
    text = "\n".join(line for line in lines if line)
    if text:
        figure.supxlabel(text, fontsize=8)


def left_out_note(count: int, total: int, what: str) -> str:
    return f"{count} of {total} SAEs not shown: no {what}" if count else ""


def scale_l0(axes: Sequence[Axes], values: Sequence[float]) -> None:
    """Set one log scale for all facets, with plain numbers on it."""
    low, high = (min(values) / 1.25, max(values) * 1.25) if values else (1.0, 100.0)
    for axis in axes:
        axis.set_xscale("log")
        axis.set_xlim(low, high)
        axis.xaxis.set_major_locator(FixedLocator(log_ticks(low, high, doubling=True)))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.tick_params(labelbottom=True)


def log_ticks(low: float, high: float, *, doubling: bool = False) -> list[float]:
    """Three to seven round numbers in [low, high]: tens if the range is wide (or 10 20 40 80 ... if
    `doubling`), else finer steps."""
    decades = range(-9, 13)
    coarse = [10 * 2.0**power for power in range(-12, 24)] if doubling else [10.0**power for power in decades]
    finer = [
        [step * 10.0**power for power in decades for step in steps]
        for steps in ([1, 2, 5], [1, 1.5, 2, 3, 4, 5, 6, 8])
    ]
    for candidates in (coarse, *finer, MaxNLocator(5).tick_values(low, high)):
        ticks = [tick for tick in candidates if low <= tick <= high]
        if len(ticks) >= 3:
            break
    return ticks[:: math.ceil(len(ticks) / 7)] if ticks else []


def scale_y(axis: Axes, *, log: bool) -> None:
    """Plain numbers on a log axis, also where it spans less than a factor of ten; a linear one begins at
    0."""
    if log:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(FixedLocator(log_ticks(*axis.get_ylim())))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    else:
        axis.set_ylim(bottom=0)
        axis.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def lower_end(values: Sequence[float]) -> float | None:
    """Return where a linear axis should end below, if a few values are so low that all others would become
    one line; else None."""
    if len(values) < 4:
        return None
    low, middle, high = np.quantile(values, [0.25, 0.5, 1.0])
    floor = low - 4 * max(high - low, 0.02)
    return float(floor) if min(values) < floor and middle > floor else None


def short_count(value: float) -> str:
    """Return a number of tokens, short: 614,400 -> 614k, 5e8 -> 500M."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{letter}"
    return f"{value:.0f}"


def shortened(name: str, length: int) -> str:
    """Return a name that fits: the middle of a long one gives way."""
    return name if len(name) <= length else f"{name[: length // 2 - 1]}…{name[-(length - length // 2) :]}"


def plain_text(name: str) -> str:
    """Return a name as matplotlib shall print it: a dollar sign would start a formula."""
    return name.replace("$", r"\$")
