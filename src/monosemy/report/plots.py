"""Plots of a run: matplotlib figures from the rows of `rows.jsonl` and the records of `metrics.jsonl`.

Each function takes plain dicts and gives a `Figure` that belongs to no window and no global state; `write`
saves them all as PNG and SVG. What is missing is missing: a row without the number leaves its place empty and
is counted under the plot, never drawn as 0.

Color never stands alone: an architecture is a color and a marker together. The colors have a contrast of
at least 3:1 on white and stay apart under protanopia, deuteranopia and tritanopia (smallest CIEDE2000
distance 14.7).
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, PercentFormatter

from monosemy.evaluation.columns import finite
from monosemy.evaluation.missing import Missing
from monosemy.report.drawing import (
    FAINT,
    INK,
    STYLE,
    add_legend,
    arrow_down,
    left_out_note,
    look,
    lower_end,
    make_facets,
    marker_of,
    plain_text,
    scale_l0,
    scale_y,
    short_count,
    shortened,
    write_below,
)
from monosemy.report.looks import ordered
from monosemy.system.files import read_lines, write_bytes

Row = dict[str, Any]


DPI = 200

LOSS_RECOVERED = "Loss recovered\n(1 = as the untouched model, 0 = as with zeros)"
FVU = "Fraction of variance unexplained, FVU\n(log scale, 0 = perfect)"
L0 = "L0: active latents per token (log scale)"


def loss_recovered_against_l0(rows: Sequence[Row]) -> Figure:
    """Share of the model's loss that survives the SAE against L0, a facet per site, bars for the 95 %
    interval."""
    return _against_l0(
        rows,
        "loss_recovered_zero",
        LOSS_RECOVERED,
        low="loss_recovered_zero_low",
        high="loss_recovered_zero_high",
    )


def fvu_against_l0(rows: Sequence[Row]) -> Figure:
    """Share of the activations' variance that the SAE misses, against L0, both on log scales, a facet per
    site."""
    return _against_l0(rows, "fvu", FVU, log_y=True)


def alive(rows: Sequence[Row]) -> Figure:
    """Share of the latents that fired at least once on the held-out tokens: a bar per SAE, with the number
    that never did."""
    shown = [row for row in rows if finite(row, "frac_alive") is not None]
    sites = _sites(rows)
    names = _architectures(rows)
    tallest = max((sum(row["site"] == site for row in shown) for site in sites), default=1)
    with rc_context(STYLE):
        figure, axes = make_facets(
            sites, height=0.9 + 0.21 * max(tallest, 4), width=4.4, columns=2, share_y=False
        )
        for site, axis in zip(sites, axes, strict=False):
            mine = sorted((row for row in shown if row["site"] == site), key=lambda row: _order(row, names))
            for place, row in enumerate(mine):
                value, mark = row["frac_alive"], marker_of(row["architecture"], names, 6)
                axis.barh(place, value, height=0.62, color=mark["color"], alpha=0.28, linewidth=0)
                axis.plot(value, place, **mark, clip_on=False, zorder=3)
                never = _never(row)
                if never:
                    axis.annotate(
                        never,
                        (1.0, place),
                        (8, 0),
                        xycoords=("axes fraction", "data"),
                        textcoords="offset points",
                        va="center",
                        fontsize=7.5,
                        annotation_clip=False,
                    )
            axis.set_yticks(range(len(mine)), [_label(row) for row in mine])
            axis.set_ylim(max(len(mine), 1) - 0.4, -0.6)
            axis.set_xlim(0, 1)
            axis.xaxis.set_major_formatter(PercentFormatter(1))
            axis.grid(visible=False, axis="y")
            axis.tick_params(axis="y", length=0)
        tokens = {row["tokens"] for row in shown if "tokens" in row}
        on = f"{tokens.pop():,} held-out {unit(rows)}" if len(tokens) == 1 else f"the held-out {unit(rows)}"
        write_below(
            figure,
            f"Latents that fired at least once on {on}; at the right: how many never did",
            left_out_note(len(rows) - len(shown), len(rows), "share of live latents"),
        )
    return figure


MEASURES = (  # of training: key of a record, label, whether the scale is logarithmic
    ("loss", "Training loss\n(log scale)", True),
    ("l0", "L0: active latents\nper token (log scale)", True),
    ("fvu", "FVU\n(log scale)", True),
    ("dead", "Dead latents", False),
)


def training_curves(records: Iterable[Row], rows: Sequence[Row]) -> Figure:
    """Loss, L0, FVU and dead latents against training tokens: a row of panels per measure, a line per SAE.

    The columns are the sites while each has at most ten SAEs; else the architectures, sites by line style,
    with all other SAEs in pale gray behind. `records` are those of `metrics.jsonl`; the rows tell each SAE's
    site, architecture and width. An SAE without a row (it failed, or was never evaluated) is placed by its
    own records if they carry `site` and `architecture`, and is counted as left out if not. A long line is
    drawn as the mean of 120 equal stretches, in a band from the smallest to the largest value of each.
    """
    lines, by_sae = _lines(records, rows)
    placed = [sae for sae in lines if {"site", "architecture"} <= by_sae[sae].keys()]
    sites, names = _sites([by_sae[sae] for sae in placed]), _architectures([by_sae[sae] for sae in placed])
    crowd = Counter(by_sae[sae]["site"] for sae in placed)
    by_site = max(crowd.values(), default=0) <= 10
    column_key, columns = ("site", sites) if by_site else ("architecture", names)
    dashes: list[Any] = ["-", (0, (4, 1.5)), (0, (1, 1.2))]
    styles = {site: "-" if by_site else style for site, style in zip(sites, itertools.cycle(dashes))}
    curves = {
        (sae, key): _stretches(lines[sae], key, positive=log) for sae in placed for key, _, log in MEASURES
    }
    measures = [measure for measure in MEASURES if any(len(curves[sae, measure[0]]) for sae in placed)]
    with rc_context(STYLE):
        shape = max(len(measures), 1), max(len(columns), 1)
        panel_width = 3.1 if shape[1] <= 3 else 2.0
        figure = Figure(figsize=(2.6 + panel_width * shape[1], 0.9 + 1.75 * shape[0]), layout="constrained")
        grid = figure.subplots(*shape, sharex=True, sharey="row", squeeze=False)
        for panels, (key, label, log) in zip(grid, measures, strict=False):
            for column, axis in zip(columns, panels, strict=True):
                if not by_site:
                    behind = [curves[sae, key][:, :2] for sae in placed]
                    axis.add_collection(LineCollection(behind, color=FAINT, linewidth=0.6))
                for row in (by_sae[sae] for sae in placed if by_sae[sae][column_key] == column):
                    mark = marker_of(row["architecture"], names, 5.5)
                    _curve(axis, curves[row["sae"], key], mark, styles[row["site"]])
            panels[0].set_ylabel(label)
            scale_y(panels[0], log=log)
        for column, axis in zip(columns, grid[0], strict=False):
            size = 10 if panel_width > 3 else 8.5
            axis.set_title(plain_text(shortened(column, 22)), loc="left", fontweight="bold", fontsize=size)
        for axis in grid[-1]:
            axis.xaxis.set_major_locator(MaxNLocator(4 if panel_width > 3 else 3))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
            axis.set_xlim(left=0)
            axis.set_xlabel("Training tokens")
        add_legend(figure, names, line=True, styles=styles if len(set(styles.values())) > 1 else {})
        left_out = left_out_note(len(lines) - len(placed), len(lines), "row that tells site and architecture")
        write_below(figure, left_out)
    return figure


def _lines(records: Iterable[Row], rows: Sequence[Row]) -> tuple[dict[str, list[Row]], dict[str, Row]]:
    """Return each SAE's records, and its row or else its first record."""
    by_sae = {row["sae"]: row for row in rows}
    lines: dict[str, list[Row]] = {}
    for record in records:
        if "sae" in record:
            lines.setdefault(record["sae"], []).append(record)
            by_sae.setdefault(record["sae"], record)
    return lines, by_sae


def firing_frequencies(rows: Sequence[Row]) -> Figure:
    """Return how many latents fire how often: small multiples, a row per site, a column per architecture, a
    step line per SAE.

    The histogram's bins are those of the row: `firing_counts` counts latents between the edges of
    `firing_log10_edges`. Latents that never fired are in no bin; `alive` counts them.
    """
    shown = [row for row in rows if row.get("firing_counts") and row.get("firing_log10_edges")]
    sites, names = _sites(shown), _architectures(shown)
    with rc_context(STYLE):
        shape = max(len(sites), 1), max(len(names), 1)
        figure = Figure(
            figsize=(max(1.0 + 1.45 * shape[1], 5.5), 1.1 + 1.45 * shape[0]), layout="constrained"
        )
        grid = figure.subplots(*shape, sharex=True, sharey=True, squeeze=False)
        for panels, site in zip(grid, sites, strict=False):
            for axis, name in zip(panels, names, strict=True):
                color, _ = look(name, names)
                for row in shown:
                    if (row["site"], row["architecture"]) == (site, name):
                        share = np.asarray(row["firing_counts"], float) / row["d_sae"]
                        axis.stairs(share, row["firing_log10_edges"], color=color, fill=True, alpha=0.16)
                        axis.stairs(share, row["firing_log10_edges"], color=color, linewidth=1.1)
                axis.axvline(-1, color=INK, linewidth=0.7, linestyle=(0, (2, 2)))
            panels[0].set_ylabel(plain_text(shortened(site, 16)), fontweight="bold")
        for axis, name in zip(grid[0], names, strict=False):
            axis.set_title(
                plain_text(name).replace("matryoshka_", "matryoshka_\n"),
                fontsize=8,
                color=look(name, names)[0],
                fontweight="bold",
            )
        rarest = min((_rarest(row) for row in shown), default=-4)
        axis = grid[0, 0]  # all panels share its scales
        axis.set_xlim(rarest, 0)
        axis.set_ylim(bottom=0)
        axis.xaxis.set_major_locator(FixedLocator(range(0, math.floor(rarest) - 1, -2)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * 10.0**value:.10g}%"))
        axis.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
        figure.supylabel("Share of the SAE's latents", fontsize=9)
        write_below(
            figure,
            f"Share of the held-out {unit(rows)} on which a latent fires (log scale)",
            "Dashed: 10%, above it a latent counts as dense",
            left_out_note(len(rows) - len(shown), len(rows), "firing histogram"),
        )
    return figure


def figures(rows: Sequence[Row], records: Iterable[Row]) -> dict[str, Figure]:
    """Every plot of a run by its file name; a plot for which no SAE has a number is left out."""
    return {name: draw() for name, draw in _drawings(rows, list(records)).items()}


def _drawings(rows: Sequence[Row], records: Sequence[Row]) -> dict[str, Callable[[], Figure]]:
    """Return the plots for which some SAE has a number, by name."""
    records = [record for record in records if "sae" in record]
    drawings: dict[str, tuple[bool, Callable[[], Figure]]] = {
        "loss_recovered": (
            any(finite(row, "loss_recovered_zero") is not None for row in rows),
            lambda: loss_recovered_against_l0(rows),
        ),
        "fvu": (any(finite(row, "fvu") is not None for row in rows), lambda: fvu_against_l0(rows)),
        "alive": (any(finite(row, "frac_alive") is not None for row in rows), lambda: alive(rows)),
        "firing_frequencies": (
            any(row.get("firing_counts") for row in rows),
            lambda: firing_frequencies(rows),
        ),
        "training_curves": (bool(records), lambda: training_curves(records, rows)),
    }
    return {name: draw for name, (has_numbers, draw) in drawings.items() if has_numbers}


def write(
    run_folder: str | Path,
    rows: Sequence[Row] | None = None,
    records: Iterable[Row] | None = None,
    *,
    missing: Missing | None = None,
) -> list[Path]:
    """Draw a run's plots into `run_folder`/plots as PNG and SVG; the paths of the PNGs.

    Rows and records are read from the folder's `rows.jsonl` and `metrics.jsonl` where they are not given.
    With `missing` a plot or a file that fails costs the others nothing; it lists them.
    """
    folder = Path(run_folder)
    missing = Missing(strict=True) if missing is None else missing
    if rows is None:
        with missing.part("plots' rows"):
            rows = read_lines(folder / "rows.jsonl")
    if records is None:
        with missing.part("plots' training records"):
            records = read_lines(folder / "metrics.jsonl")
    paths = []
    for name, draw in _drawings(rows or [], list(records or [])).items():
        with missing.part(f"plot {name}"):
            path = folder / "plots" / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            with rc_context(STYLE):
                figure = draw()
                _save(figure, path, dpi=DPI)
                # the layout is found; finding it again for the SVG is a quarter of the time
                figure.set_layout_engine("none")
                _save(figure, path.with_suffix(".svg"), metadata={"Date": None})
            paths.append(path)
    return paths


def _save(figure: Figure, path: Path, **options: Any) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:], **options)
    write_bytes(path, buffer.getvalue())


def unit(rows: Sequence[Row]) -> str:
    """Return what was counted: tokens of a language model's text, or rows of batches."""
    return next((str(row["unit"]) for row in rows if "unit" in row), "tokens")


# The pieces


def _against_l0(
    rows: Sequence[Row], key: str, label: str, *, low: str = "", high: str = "", log_y: bool = False
) -> Figure:
    """Points (L0, key) with intervals where the row has them; the TopK kinds once more, hollow, under exact
    top-k."""
    names, sites = _architectures(rows), _sites(rows)
    positive = [row for row in rows if (finite(row, "l0") or 0) > 0]
    shown = [
        row for row in positive if (value := finite(row, key)) is not None and not (log_y and value <= 0)
    ]
    exact = f"top_k_{key}"
    with rc_context(STYLE):
        figure, axes = make_facets(sites, height=3.5, width=3.9, columns=3, share_x=True)
        floor = None if log_y else lower_end([row[key] for row in shown])
        below = 0
        for site, axis in zip(sites, axes, strict=False):
            mine = sorted((row for row in shown if row["site"] == site), key=lambda row: row["l0"])
            groups: dict[tuple[str, int], list[Row]] = {}
            for row in mine:
                groups.setdefault((row["architecture"], row.get("d_sae", 0)), []).append(row)
            for (name, _), group in sorted(
                groups.items(), key=lambda item: (names.index(item[0][0]), item[0][1])
            ):
                inside = [row for row in group if floor is None or row[key] >= floor]
                _series(axis, inside, key, marker_of(name, names, 6.5), low, high, log_y=log_y)
                for row in (row for row in group if row not in inside):
                    below += 1
                    arrow_down(axis, row["l0"], row[key], look(name, names)[0])
            if floor is not None:
                axis.set_ylim(bottom=floor)
        if log_y:
            scale_y(axes[0], log=True)
        scale_l0(
            axes,
            [row["l0"] for row in shown] + [row["top_k_l0"] for row in shown if finite(row, "top_k_l0")],
        )
        for axis in axes:
            axis.set_xlabel(L0)
        figure.supylabel(label, fontsize=9, multialignment="center")
        both_modes = any(finite(row, exact) is not None for row in shown)
        add_legend(figure, names, hollow="hollow: exact top-k" if both_modes else "")
        write_below(
            figure,
            "Bars: where 95 of 100 re-draws of the held-out text would fall"
            if any(finite(row, low) is not None for row in shown)
            else "",
            left_out_note(len(rows) - len(shown), len(rows), f"L0 or {label.splitlines()[0]}"),
            f"Below the scale, drawn as an arrow with its value: {below}" if below else "",
        )
    return figure


def _series(
    axis: Axes, rows: Sequence[Row], key: str, mark: Mapping[str, Any], low: str, high: str, *, log_y: bool
) -> None:
    """Draw the SAEs of one architecture and width as joined points, their intervals and their hollow
    twins."""
    color = mark["color"]
    hollow = {"markerfacecolor": "none", "markeredgecolor": color, "markeredgewidth": 1.0}
    axis.plot([row["l0"] for row in rows], [row[key] for row in rows], color=color, linewidth=0.9, alpha=0.55)
    for row in rows:
        x, y = row["l0"], row[key]
        if ends := _pair(row, low, high):
            axis.plot([x, x], ends, color=color, linewidth=1.5, solid_capstyle="butt")
        axis.plot(x, y, **mark, zorder=3)
        other = _pair(row, "top_k_l0", f"top_k_{key}")
        if other and other[0] > 0 and not (log_y and other[1] <= 0):
            axis.plot([x, other[0]], [y, other[1]], color=color, linewidth=0.7, linestyle=(0, (1, 1.5)))
            axis.plot(*other, **{**mark, **hollow}, zorder=2.5)


def _stretches(line: Sequence[Row], key: str, *, positive: bool) -> np.ndarray:
    """Return one SAE's measure as [at most 120, 4]: tokens, mean, smallest and largest value of each stretch
    of the log."""
    points = [
        (record["tokens"], value)
        for record in line
        if (value := finite(record, key)) is not None and not (positive and value <= 0)
    ]
    parts = np.array_split(np.array(points, float), min(len(points), 120)) if points else []
    return np.array(
        [(part[-1, 0], part[:, 1].mean(), part[:, 1].min(), part[:, 1].max()) for part in parts]
    ).reshape(-1, 4)


def _curve(axis: Axes, curve: np.ndarray, mark: dict[str, Any], style: Any) -> None:
    """Draw one SAE's measure against tokens, with its marker at the end."""
    if len(curve):
        tokens, mean, low, high = curve.T
        if (low < high).any():
            axis.fill_between(tokens, low, high, color=mark["color"], alpha=0.12, linewidth=0)
        axis.plot(tokens, mean, color=mark["color"], linewidth=1.1, linestyle=style, alpha=0.85)
        axis.plot(tokens[-1], mean[-1], **mark, clip_on=False, zorder=4)


def _pair(row: Row, one: str, other: str) -> tuple[float, float] | None:
    """Return two of the row's numbers, if it has both."""
    pair = finite(row, one), finite(row, other)
    return None if pair[0] is None or pair[1] is None else (pair[0], pair[1])


def _sites(rows: Sequence[Row]) -> list[str]:
    """Return the sites, layers in the order of their numbers."""

    def parts(site: str) -> list[Any]:
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", site)]

    return sorted({row["site"] for row in rows}, key=parts)


def _architectures(rows: Sequence[Row]) -> list[str]:
    """Return the architectures in the table's order, then the others by name."""
    present = {row["architecture"] for row in rows}
    return ordered(present)


def _order(row: Row, names: Sequence[str]) -> tuple[int, int, float]:
    return names.index(row["architecture"]), row.get("d_sae", 0), row.get("l0") or 0.0


def _label(row: Row) -> str:
    value = finite(row, "l0")
    return plain_text(row["architecture"]) + (
        "" if value is None else f"   L0 {value:.0f}" if value >= 10 else f"   L0 {value:.1f}"
    )


def _never(row: Row) -> str:
    """Return how many latents never fired, for printing beside the bar; nothing where the row does not
    say."""
    return f"{row['never_fired']:,} of {row['d_sae']:,}" if {"never_fired", "d_sae"} <= row.keys() else ""


def _rarest(row: Row) -> float:
    """Return log10 of the lower edge of the first bin with a latent in it."""
    filled = np.flatnonzero(row["firing_counts"])
    return row["firing_log10_edges"][filled[0]] if len(filled) else -4.0
