"""The plots: what they show equals the rows to the digit, nothing missing is drawn, and every architecture
has a look of its own."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.colors
import pytest
from matplotlib.figure import Figure

from monosemy.config import architecture_names
from monosemy.report import drawing, plots
from monosemy.report.looks import UNKNOWN
from tests.made_run import KINDS

NAMES = list(KINDS)  # in the order of legends
EDGES = [-4 + place / 5 for place in range(21)]


def made_rows(
    sites: tuple[str, ...] = ("resid_post.3", "resid_post.9"), names: list[str] = NAMES, sparsities: int = 1
) -> list[plots.Row]:
    """Rows as an evaluation writes them, every value of its own."""
    rows = []
    for site in sites:
        for place, (name, k) in enumerate((name, k) for name in names for k in range(sparsities)):
            l0, recovered = 20.0 * 2**k + 3 * place + len(rows) / 7, 0.9 + 0.001 * len(rows)
            rows.append(
                {
                    "sae": f"{site.replace('.', '_layer_')}/trainer_{place}",
                    "site": site,
                    "architecture": name,
                    "d_sae": 1000,
                    "l0": l0,
                    "loss_recovered_zero": recovered,
                    "loss_recovered_zero_low": recovered - 0.01,
                    "loss_recovered_zero_high": recovered + 0.02,
                    "fvu": 0.3 - 0.005 * len(rows),
                    "frac_alive": 0.99 - 0.01 * len(rows),
                    "never_fired": 10 + 10 * len(rows),
                    "tokens": 8192,
                    "firing_counts": [10 + len(rows)] * 20,
                    "firing_log10_edges": EDGES,
                }
            )
    return rows


def made_records(rows: list[plots.Row], steps: int = 20) -> list[plots.Row]:
    records: list[plots.Row] = []
    for step in range(1, steps + 1):
        measures = {"loss": 100 / step, "l0": 500 / step, "fvu": 1 / step, "dead": step}
        records += [{"step": step, "tokens": 2048 * step, "sae": row["sae"], **measures} for row in rows]
        records.append({"step": step, "tokens": 2048 * step, "run": {"tokens_per_second": 1.0}})
    return records


def points(figure: Figure) -> set[tuple[float, float]]:
    """The filled markers of a figure that stand alone: its data points."""
    lines = [
        line
        for axis in figure.axes
        for line in axis.lines
        if len(line.get_xdata()) == 1 and line.get_markerfacecolor() != "none"
    ]
    return {(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in lines}


def words(figure: Figure) -> str:
    axes = figure.axes
    parts = [figure.get_supxlabel(), figure.get_supylabel(), *(a.get_xlabel() + a.get_ylabel() for a in axes)]
    parts += [title for axis in axes for title in (axis.get_title(), axis.get_title(loc="left"))]
    parts += [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    parts += [label.get_text() for axis in axes for label in axis.get_yticklabels()]
    return "\n".join(parts)


@pytest.mark.parametrize(
    ("draw", "key"), [(plots.loss_recovered_against_l0, "loss_recovered_zero"), (plots.fvu_against_l0, "fvu")]
)
def test_every_row_is_a_point_at_its_numbers(draw: Any, key: str) -> None:
    rows = made_rows()
    figure = draw(rows)
    assert points(figure) == {(row["l0"], row[key]) for row in rows}
    assert all(axis.get_xscale() == "log" for axis in figure.axes)
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["resid_post.3", "resid_post.9"]
    assert all(name in words(figure) for name in NAMES)
    assert "L0: active latents per token" in words(figure)


def test_intervals_are_drawn_where_the_row_has_them_and_only_there() -> None:
    rows = made_rows(("resid_post.3",))
    rows[0].pop("loss_recovered_zero_low")
    figure = plots.loss_recovered_against_l0(rows)
    bars = {
        tuple(line.get_ydata())
        for line in figure.axes[0].lines
        if len(line.get_xdata()) == 2 and len(set(line.get_xdata())) == 1
    }
    assert bars == {(row["loss_recovered_zero_low"], row["loss_recovered_zero_high"]) for row in rows[1:]}


@pytest.mark.parametrize("missing", [None, math.nan, math.inf, "absent"])
def test_a_missing_number_is_left_out_and_counted(missing: Any) -> None:
    rows = made_rows()
    for key in ("loss_recovered_zero", "fvu", "frac_alive"):
        if missing == "absent":
            rows[3].pop(key)
        else:
            rows[3][key] = missing
    for draw, key in (
        (plots.loss_recovered_against_l0, "loss_recovered_zero"),
        (plots.fvu_against_l0, "fvu"),
    ):
        figure = draw(rows)
        assert points(figure) == {(row["l0"], row[key]) for row in rows if row is not rows[3]}
        assert "1 of 16 SAEs not shown" in words(figure)
    assert "1 of 16 SAEs not shown" in words(plots.alive(rows))
    assert "not shown" not in words(plots.alive(made_rows()))


def test_sites_are_ordered_by_layer() -> None:
    figure = plots.fvu_against_l0(made_rows(("resid_post.12", "resid_post.9", "mlp_out.3"), ["top_k"]))
    assert [axis.get_title(loc="left") for axis in figure.axes] == [
        "mlp_out.3",
        "resid_post.9",
        "resid_post.12",
    ]


def test_one_broken_sae_does_not_squeeze_the_others() -> None:
    rows = made_rows()
    rows[2]["loss_recovered_zero"] = -5.0
    figure = plots.loss_recovered_against_l0(rows)
    assert all(axis.get_ylim()[0] > 0.5 for axis in figure.axes)
    assert "-5.00" in [text.get_text() for axis in figure.axes for text in axis.texts]
    assert "Below the scale, drawn as an arrow with its value: 1" in words(figure)


def test_exact_top_k_is_hollow_beside_the_threshold() -> None:
    rows = made_rows(("resid_post.3",), ["top_k", "gated"])
    rows[0] |= {"top_k_l0": 32.0, "top_k_fvu": 0.2}
    figure = plots.fvu_against_l0(rows)
    hollow = [
        line
        for line in figure.axes[0].lines
        if line.get_markerfacecolor() == "none" and line.get_marker() == "P"
    ]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in hollow] == [(32.0, 0.2)]
    assert "hollow: exact top-k" in words(figure)


def test_every_architecture_has_a_color_and_a_marker_of_its_own() -> None:
    looks = [plots.look(name) for name in architecture_names()]
    assert len({color for color, _ in looks}) == len({marker for _, marker in looks}) == len(looks)
    assert len(NAMES) == 8 and set(NAMES) <= set(architecture_names())
    assert all(_contrast(color, "white") >= 3 for color, _ in [*looks, plots.look("mine")])


def test_unknown_architectures_are_gray_with_numbers_of_their_own() -> None:
    known = [*NAMES, "mine", "yours"]
    assert plots.look("mine", known) == (UNKNOWN[0], "$1$")
    assert plots.look("yours", known) == (UNKNOWN[0], "$2$")
    rows = made_rows(names=["top_k", "mine", "yours"])
    assert len(points(plots.fvu_against_l0(rows))) == len(rows)
    assert "mine" in words(plots.fvu_against_l0(rows))


def test_alive_says_how_many_never_fired() -> None:
    rows = made_rows(("resid_post.3",))
    figure = plots.alive(rows)
    assert [text.get_text() for text in figure.axes[0].texts] == [
        f"{10 * (place + 1)} of 1,000" for place in range(8)
    ]
    assert "8,192 held-out tokens" in words(figure)
    assert sorted(x for x, _ in points(figure)) == sorted(row["frac_alive"] for row in rows)


def test_training_curves_have_a_line_for_each_sae_and_measure() -> None:
    rows = made_rows()
    figure = plots.training_curves(made_records(rows), rows)
    assert len(figure.axes) == 4 * 2
    assert all(sum(len(line.get_xdata()) == 20 for line in axis.lines) == 8 for axis in figure.axes)
    assert {x for x, _ in points(figure)} == {20 * 2048.0}


def test_training_curves_of_a_crowd_get_a_column_for_each_architecture() -> None:
    rows = made_rows(("resid_post.12",), NAMES[:6], sparsities=4)
    figure = plots.training_curves(made_records(rows), rows)
    assert [axis.get_title(loc="left") for axis in figure.axes[:6]] == NAMES[:6]
    assert all(sum(len(line.get_xdata()) == 20 for line in axis.lines) == 4 for axis in figure.axes)


def test_training_curves_without_rows_are_counted_and_long_ones_thinned() -> None:
    rows = made_rows(("resid_post.3",), ["top_k"])
    records = [
        *made_records(rows, steps=1000),
        {"step": 1, "tokens": 1, "sae": "resid_post_layer_3/trainer_7", "loss": 1.0},
    ]
    figure = plots.training_curves(records, rows)
    assert "1 of 2 SAEs not shown" in words(figure)
    assert max(len(line.get_xdata()) for line in figure.axes[0].lines) == 120


def test_training_curves_leave_out_what_was_not_logged() -> None:
    rows = made_rows(("resid_post.3",), ["top_k", "gated"])
    losses = {1: math.nan, 2: 0.5, 3: 0.3}
    records = [
        {"step": s, "tokens": s * 10, "sae": row["sae"], "loss": loss, "dead": None}
        for row in rows
        for s, loss in losses.items()
    ]
    figure = plots.training_curves(records, rows)
    assert len(figure.axes) == 1
    assert all(
        list(line.get_xdata()) == [20.0, 30.0] for line in figure.axes[0].lines if len(line.get_xdata()) > 1
    )


def test_firing_frequencies_are_the_rows_histograms() -> None:
    rows = made_rows()
    figure = plots.firing_frequencies(rows)
    assert len(figure.axes) == 16
    steps = [patch.get_data() for axis in figure.axes for patch in axis.patches if not patch.get_fill()]
    drawn = {tuple(step.values) for step in steps}
    assert drawn == {tuple(count / 1000 for count in row["firing_counts"]) for row in rows}


def test_nothing_to_draw_is_no_figure_and_one_sae_is_enough() -> None:
    assert plots.figures([], []) == {}
    rows = made_rows(("resid_post.3",), ["top_k"])
    assert set(plots.figures(rows, made_records(rows))) == {
        "loss_recovered",
        "fvu",
        "alive",
        "firing_frequencies",
        "training_curves",
    }
    for key in ("fvu", "loss_recovered_zero", "frac_alive", "firing_counts"):
        rows[0][key] = None
    assert plots.figures(rows, []) == {}


def test_write_makes_png_and_svg_and_the_same_rows_give_the_same_files(tmp_path: Path) -> None:
    rows = made_rows(("resid_post.3",), ["we$ird$"])
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "metrics.jsonl").write_text(
            "".join(json.dumps(record) + "\n" for record in made_records(rows)) + '{"step": 21, "tok'
        )
    paths = plots.write(tmp_path / "a")
    plots.write(tmp_path / "b", rows, made_records(rows))
    assert sorted(path.stem for path in paths) == [
        "alive",
        "firing_frequencies",
        "fvu",
        "loss_recovered",
        "training_curves",
    ]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 1_000_000
        assert ElementTree.parse(path.with_suffix(".svg")).getroot().tag.endswith("svg")
        for suffix in (".png", ".svg"):
            assert (
                path.with_suffix(suffix).read_bytes()
                == (tmp_path / "b/plots" / path.with_suffix(suffix).name).read_bytes()
            )


@pytest.mark.parametrize("range_", [(10, 200), (28, 110), (59, 63), (0.1, 1.2), (3, 20_000)])
def test_log_axes_have_three_to_seven_numbers(range_: tuple[float, float]) -> None:
    for doubling in (False, True):
        ticks = drawing.log_ticks(*range_, doubling=doubling)
        assert 3 <= len(ticks) <= 7 and all(low < high for low, high in pairwise(ticks))
        assert range_[0] <= ticks[0] and ticks[-1] <= range_[1]


def test_text_and_marks_fit_into_the_picture() -> None:
    for rows in (made_rows(("resid_post.12",), NAMES[:4], 3), made_rows(("resid_post.3",), ["top_k"])):
        for figure in plots.figures(rows, made_records(rows)).values():
            figure.draw_without_rendering()  # finds the layout
            box = figure.get_tightbbox()  # inches
            width, height = figure.get_size_inches()
            assert min(box.x0, box.y0) > -0.02 and box.x1 < width + 0.02 and box.y1 < height + 0.02


def _contrast(one: str, other: str) -> float:
    """WCAG 2 contrast ratio of two colors."""

    def luminance(color: str) -> float:
        channels = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
            for c in matplotlib.colors.to_rgb(color)
        ]
        return 0.2126 * channels[0] + 0.7152 * channels[1] + 0.0722 * channels[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
