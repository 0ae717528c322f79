"""One self-contained page of one run or several: `write` gives report.html, which opens from disk and asks
the network for nothing.

The skeleton and the table are in the HTML; everything else lies in blocks, typed columns that are compressed
and in base64, and is drawn by script/ when it is opened. Numbers of `rows.jsonl` are made into text here and
nowhere else.

P latents with a page, F latents of an SAE.
"""

from __future__ import annotations

import base64
import gzip
import json
import logging
import math
from collections.abc import Mapping, Sequence
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from monosemy.errors import invalid
from monosemy.evaluation.columns import columns_of, finite
from monosemy.evaluation.hints import hints
from monosemy.evaluation.missing import Missing
from monosemy.labeling import labels
from monosemy.report import plots
from monosemy.report.looks import MARKERS, UNKNOWN, looks, ordered
from monosemy.report.plots import Row
from monosemy.system import arrays
from monosemy.system.files import DiskFull, cache_folder, read_json, read_lines, write_bytes, write_text

log = logging.getLogger(__name__)

LIMIT = 14_500_000  # bytes of a report; latents lose their pages until it fits
COLUMNS = columns_of("page")
POINTS = 200  # of a training curve
NO_COSINE = -128  # in hundredths, of an encoder and a decoder of other widths
# of the page, joined into one in this order
SCRIPTS = ("elements", "data", "drawing", "charts", "overview", "labels", "sae", "latent", "routes")


NO_TEXT: dict[str, np.ndarray] = {  # a vocabulary of no tokens
    "token_ids": np.zeros(0, np.uint32),
    "token_lengths": np.zeros(0, np.uint16),
    "token_bytes": np.zeros(0, np.uint8),
    "token_special": np.zeros(0, np.uint8),
}


class DoesNotFit(ValueError):
    """No report below the limit can be made."""


def write(
    folders: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    latents: int | None = None,
    status: tuple[str, str] | None = None,
    missing: Missing | None = None,
) -> Path:
    """Write the report of one run or several, into the first one's folder where nothing else is said. Returns
    its path.

    `latents` limits the pages of each SAE; `status` is that of a run which is about to end. With `missing` a
    file that cannot be read costs its part of the page alone, which the page says; it lists them.
    Raises ValueError for runs that cannot be told apart, and where no page below `LIMIT` can be made.
    """
    names = _names([Path(folder) for folder in folders])
    missing = Missing(strict=True) if missing is None else missing
    runs = [_Run(Path(folder), status, missing) for folder in folders]
    path = Path(out) if out else runs[0].folder / "report.html"
    with missing.part("report.html", passing=(DoesNotFit,)):
        write_bytes(path, _that_fits(runs, names, latents, missing))
    return path


def _that_fits(runs: Sequence[_Run], names: Sequence[str], latents: int | None, missing: Missing) -> bytes:
    """Return the page, with as many pages of latents as fit."""
    pages = max((sae.pages for run in runs for sae in run.saes), default=0)
    pages = pages if latents is None else min(pages, latents)
    library = ""
    with missing.part("interactive plots of the page"):
        library = _library()
    html = _html(runs, names, pages, library, str(missing))
    while len(html) > LIMIT and pages:
        pages = int(pages * min(0.9, LIMIT / len(html))) if pages > 8 else 0
        html = _html(runs, names, pages, library, str(missing))
    if len(html) > LIMIT:
        raise DoesNotFit(
            f"a report of {len(runs)} runs takes {len(html):,} bytes even without pages for latents; name "
            "fewer runs"
        )
    return html


# --- what is read -------------------------------------------------------------------------------------------


class _Latents:
    """One SAE's latents.npz, or what stands for it where nothing was gathered or the file cannot be read."""

    def __init__(self, row: Row, path: Path, missing: Missing) -> None:
        self.row = row
        self.facts: dict[str, Any] = {}
        self.columns: dict[str, np.ndarray] = {}
        if path.is_file():
            with missing.part("pages of latents", row["sae"]):
                self.columns, self.facts = arrays.load(path)
        self.pages = len(self.columns.get("page_latent", ()))
        self.labels: list[dict[str, Any]] = []
        with missing.part("labels of latents", row["sae"]):
            self.labels = labels.read(path.parent)

    def block(self, pages: int, renumbered: np.ndarray) -> dict[str, np.ndarray]:
        """Return the columns as the page has them: the first pages only, places by the contexts that are
        kept, numbers no finer than is shown."""
        packed: dict[str, np.ndarray] = {}
        for name, column in self.columns.items():
            if name == "page_silent":  # for labels alone
                continue
            if name.startswith("page_"):
                column = column[:pages]
            if name in ("enc_dec", "near_cosine", "page_near_cosine"):
                column = np.where(np.isnan(column), NO_COSINE, np.round(100 * column)).astype(np.int8)
            elif column.dtype == np.float32:
                column = _shortened(column)
            elif name == "page_shade":
                column = (column.astype(np.uint16) + 7) // 8
                column = column.astype(np.uint8)
            elif name == "page_at":
                column = np.where(column >= 0, renumbered[np.maximum(column, 0)], -1).astype(np.int32)
            packed[name] = column
        return packed


class _Run:
    def __init__(self, folder: Path, status: tuple[str, str] | None, missing: Missing) -> None:
        self.folder = folder
        self.facts = _json(folder / "run.json")
        state = _json(folder / "status.json")
        self.status: str
        self.reason: str
        self.status, self.reason = status or (state.get("status", "unknown"), state.get("reason", ""))
        self.rows: list[Row] = []
        self.records: list[Row] = []
        with missing.part("table of the page"):
            self.rows = read_lines(folder / "rows.jsonl")
        with missing.part("training curves of the page"):
            self.records = [record for record in read_lines(folder / "metrics.jsonl") if "sae" in record]
        self.saes = [_Latents(row, folder / row["sae"] / "latents.npz", missing) for row in self.rows]
        self.text = NO_TEXT
        self.text_facts: dict[str, Any] = {}
        if (folder / "eval_text.npz").is_file():
            with missing.part("text of the page"):
                self.text, self.text_facts = arrays.load(folder / "eval_text.npz")
        if "ids" not in self.text:
            for sae in self.saes:
                sae.columns = {
                    name: column for name, column in sae.columns.items() if name not in arrays.OF_TEXT
                }

    def cost(self, name: str) -> float | None:
        """Return what the gathering of all SAEs' latents cost; older runs have it beside their text."""
        found = [sae.facts[name] for sae in self.saes if name in sae.facts]
        return sum(found) if found else self.text_facts.get(name)

    def kept_text(self, pages: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Return the text of the contexts that the pages show, with its vocabulary, and where each of its
        places went."""
        ids_CL = self.text.get("ids", np.zeros((0, 1), np.uint32))
        L = ids_CL.shape[1]
        at = [sae.columns["page_at"][:pages].ravel() for sae in self.saes if "page_at" in sae.columns]
        contexts = np.unique(np.concatenate([a[a >= 0] // L for a in at])) if at else np.zeros(0, np.int64)
        new_C = np.zeros(max(len(ids_CL), 1), np.int64)
        new_C[contexts] = np.arange(len(contexts))
        renumbered = (new_C[:, None] * L + np.arange(L)).ravel()
        vocabulary = {name: column for name, column in self.text.items() if name != "ids"}
        # ids become places in the vocabulary, which are smaller numbers
        places = np.searchsorted(self.text["token_ids"], ids_CL[contexts]) if "ids" in self.text else ids_CL
        return vocabulary | {"ids": places.astype(np.uint32)}, renumbered


def _names(folders: Sequence[Path]) -> list[str]:
    """Return what the runs are called: as much of their paths' ends as tells them apart."""
    parts = [folder.absolute().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(
        f"runs are {[str(folder) for folder in folders]}; allowed: each folder once. Name each run once."
    )


# --- what is written ----------------------------------------------------------------------------------------


def _html(runs: Sequence[_Run], names: Sequence[str], pages: int, library: str, missing: str) -> bytes:
    blocks: dict[str, str] = {}
    layouts: dict[str, Any] = {}

    def put(name: str, columns: Mapping[str, np.ndarray]) -> None:
        blocks[name], layouts[name] = pack(columns)

    saes: list[dict[str, Any]] = []
    for r, run in enumerate(runs):
        text, renumbered = run.kept_text(pages)
        put(f"text{r}", text)
        for sae in run.saes:
            if sae.columns:
                put(f"sae{len(saes)}", sae.block(pages, renumbered))
            if sae.labels:
                put(f"labels{len(saes)}", _as_block(sae.labels))
            saes.append(_sae(len(saes), r, names[r], sae, run))
    overview = {
        "saes": saes,
        "runs": [_run(run, name) for run, name in zip(runs, names, strict=True)],
        "columns": [{"key": c.key, "label": c.label, "about": c.help, "scale": c.plotted} for c in COLUMNS],
        "looks": {
            name: dict(zip(("light", "dark", "marker"), _look(name, runs), strict=True))
            for name in _architectures(runs)
        },
        "markers": MARKERS,
        "pages": pages,
    }
    put("overview", _as_block(overview))
    room = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    folder = files(__package__)
    html = room.from_string((folder / "report.html.jinja").read_text("utf-8")).render(
        runs=overview["runs"],
        saes=saes,
        columns=[
            column for column in COLUMNS if any(finite(sae["row"], column.key) is not None for sae in saes)
        ],
        looks=overview["looks"],
        markers=MARKERS,
        title=", ".join(names),
        missing=missing,
        style=Markup((folder / "report.css").read_text("utf-8")),
        script=Markup(script()),
        library=Markup(library),
        licenses=(folder / "licenses.txt").read_text("utf-8"),
        blocks=blocks,
        layouts=layouts,
    )
    return html.encode("utf-8", "replace")


def _as_block(value: Any) -> dict[str, np.ndarray]:
    return {"json": np.frombuffer(json.dumps(value, allow_nan=False).encode(), np.uint8)}


def pack(columns: Mapping[str, np.ndarray]) -> tuple[str, list[Any]]:
    """Return columns as one compressed block in base64, and its layout: [name, type, shape, first byte] of
    each.

    Numbers of several bytes lie as planes, all first bytes, then all second ones: what is alike then lies
    together.
    """
    raw, layout = bytearray(), []
    for name, column in columns.items():
        layout.append([name, column.dtype.str[1:], list(column.shape), len(raw)])
        raw += (
            np.ascontiguousarray(column).reshape(-1).view(np.uint8).reshape(-1, column.itemsize).T.tobytes()
        )
    return base64.b64encode(gzip.compress(bytes(raw), 7, mtime=0)).decode(), layout


def _sae(number: int, r: int, run: str, sae: _Latents, of: _Run) -> dict[str, Any]:
    row = sae.row
    setting = (
        f"{row['sparsity_setting']} {row['sparsity']:g}"
        if finite(row, "sparsity") is not None and row.get("sparsity_setting")
        else ""
    )
    return {
        "number": number,
        "run": r,
        "name": row["sae"],
        "path": f"{run}/{row['sae']}",
        "site": row["site"],
        "layer": row.get("layer"),
        "architecture": row["architecture"],
        "width": row.get("d_sae"),
        "setting": setting,
        "status": row.get("status", ""),
        "row": {
            key: finite(row, key) if isinstance(value, int | float) else value for key, value in row.items()
        },
        "text": {column.key: column.text(row) for column in COLUMNS},
        "facts": sae.facts,
        "unit": plots.unit([row]),
        "gathered": bool(sae.columns),
        "labeled": bool(sae.labels),
        "logits": "page_promotes" in sae.columns,
        "curves": _curves([record for record in of.records if record["sae"] == row["sae"]]),
    }


def _run(run: _Run, name: str) -> dict[str, Any]:
    """Return what is told of a run, and its provenance as (label, text)."""
    facts, config = run.facts, run.facts.get("config", {})
    training, model, memory = facts.get("training", {}), facts.get("model", {}), facts.get("memory", {})
    rows, unit = run.rows, plots.unit(run.rows)

    def number(value: Any, unit: str = "", digits: int = 0) -> str:
        return f"{value:,.{digits}f}{unit}" if isinstance(value, int | float) else ""

    cost = {
        "Training tokens": number(training.get("tokens")),
        "Tokens per second": number(training.get("tokens_per_second")),
        "Training time": number(training["seconds"] / 3600, " h", 2) if "seconds" in training else "",
        "Peak memory": number(training.get("peak_memory_gb"), " GB", 2),
        "Peak memory of the whole run": number(memory.get("run", {}).get("measured", 0) / 1e9, " GB", 2)
        if "run" in memory
        else "",
        f"Held-out {unit}": number(rows[0].get("tokens")) if rows else "",
        "Held-out tokens with the SAEs in place": number(rows[0].get("spliced_tokens")) if rows else "",
        "Gathering latents": number(run.cost("gather_seconds"), " s", 1),
        "Latents' pages": number(run.cost("pages_seconds"), " s", 1),
        "Memory of what was gathered": number((run.cost("state_bytes") or 0) / 1e6, " MB", 1)
        if run.cost("state_bytes")
        else "",
    }
    source = {
        "Model": model.get("name", config.get("model_name", "")),
        "Revision": model.get("revision") or "",
        "Type": model.get("type", ""),
        "Precision": model.get("dtype", ""),
        "Device": model.get("device", ""),
        "Text": config.get("dataset", ""),
        "Seed of the data": str(config.get("data_seed", "")),
        "Recipe": config.get("recipe", ""),
        "Started": facts.get("started", ""),
        "Command": " ".join(map(str, facts.get("command", []))),
        **{f"Version of {name}": version for name, version in facts.get("versions", {}).items()},
    }
    return {
        "name": name,
        "unit": unit,
        "held_out": number(rows[0].get("tokens")) if rows else "",
        "status": run.status,
        "reason": run.reason,
        "hints": hints(run.rows),
        "saes": len(rows),
        "model": source["Model"],
        "sites": len({row["site"] for row in rows}),
        "architectures": len({row["architecture"] for row in rows}),
        "cost": {label: text for label, text in cost.items() if text},
        "source": {label: str(text) for label, text in source.items() if text not in ("", None)},
        "text": "ids" in run.text,
        "context_length": run.text_facts.get("context_length"),
    }


def _curves(records: Sequence[Row]) -> dict[str, list[Any]]:
    """Measures against training tokens, at most POINTS of them, evenly thinned."""
    keep = records[:: math.ceil(len(records) / POINTS)] if records else []
    keys = ("tokens", "loss", "fvu", "l0", "dead")
    return {key: [finite(record, key) for record in keep] for key in keys}


def _architectures(runs: Sequence[_Run]) -> list[str]:
    present = {row["architecture"] for run in runs for row in run.rows}
    return ordered(present)


def _look(name: str, runs: Sequence[_Run]) -> tuple[str, str, str]:
    """Return an architecture's colors and marker; one without a look is gray and takes markers from the
    end."""
    known = looks()
    if name in known:
        return known[name][:3]
    strangers = [other for other in _architectures(runs) if other not in known]
    return *UNKNOWN, list(MARKERS)[-1 - strangers.index(name) % len(MARKERS)]


def _shortened(x: np.ndarray) -> np.ndarray:
    """Round floats to 11 of their 23 bits after the point, rounded: three digits, and half the size once
    compressed."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FF + ((bits >> 12) & 1)) & np.uint32(0xFFFFF000)).view(np.float32)


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, {})
    except (OSError, ValueError) as error:
        raise invalid(
            path.name,
            str(path),
            "what a run wrote",
            f"repair it, or take it from a copy of the run ({error})",
        ) from error


def script() -> str:
    """Return the page's script, of its files."""
    folder = files(__package__) / "script"
    return "\n".join((folder / f"{name}.js").read_text("utf-8") for name in SCRIPTS)


def _library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script. vl-convert has them and takes seconds to join them, so
    the result is kept."""
    cached = cache_folder() / f"vega-{metadata.version('vl-convert-python')}.js"
    if cached.is_file():
        script = cached.read_text(encoding="utf-8")
    else:
        import vl_convert

        script = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub asks for a snippet
        try:
            write_text(cached, script)
        except (OSError, DiskFull) as error:
            log.warning("%s cannot be kept for the next report (%s)", cached, error)
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")
