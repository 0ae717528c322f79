"""A report of SAEs on activations that no language model made: its table, plots and statistics of latents,
without text."""

from __future__ import annotations

import json
import logging
import platform
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from monosemy import __version__
from monosemy.errors import invalid
from monosemy.evaluation import geometry, latents
from monosemy.evaluation.columns import Row
from monosemy.evaluation.latent_stats import LatentStats
from monosemy.evaluation.metrics import evaluate, named_saes
from monosemy.evaluation.missing import Missing
from monosemy.report import page, plots
from monosemy.sae import SAE
from monosemy.system.files import path_of, read_json, write_json, write_text
from monosemy.training.loop import Fitted

log = logging.getLogger(__name__)


@torch.inference_mode()
def write_report(
    folder: str | Path,
    saes: Fitted | SAE | Sequence[SAE] | Mapping[str, SAE],
    batches: Iterable[Tensor],
    *,
    site: str = "activations",
    pages: int = 1000,
    seed: int = 0,
) -> Path:
    """Evaluate SAEs on activations of any kind and write what a run has: report.html, rows.jsonl and plots/.
    Returns the page's path.

    `saes` may be what `fit` gives: its records become the training curves. The page has every latent's
    frequency, largest activation, histogram, strongest rows and nearest decoders, for at most `pages` latents
    of each SAE; `site` names where the activations are from. `monosemy report FOLDER` draws it again. A part
    that fails costs the others nothing; a warning and the page name it.
    Raises ValueError as `evaluate` does, for a name that is no folder's, and for a folder that holds
    something else.
    """
    folder = _folder(path_of("folder", str(folder)))
    metrics = saes.metrics if isinstance(saes, Fitted) else []
    named = named_saes(saes.saes if isinstance(saes, Fitted) else saes)
    for name in named:
        if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", name):
            raise invalid(
                "saes",
                name,
                "names of letters, digits, dots and dashes",
                "rename it: its latents go to a folder of that name",
            )
    missing = Missing(folder)
    began = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    gathered = {
        name: LatentStats(sae.d_sae, 1, seed=seed, salt=site, device=next(sae.parameters()).device)
        for name, sae in named.items()
    }
    rows = evaluate(named, batches, site=site, gather=gathered, missing=missing)
    for row in rows:
        with missing.part("latents", row["sae"]):
            _write_latents(
                folder / row["sae"] / "latents.npz", gathered[row["sae"]], named[row["sae"]], pages
            )
    versions = {"python": platform.python_version(), "monosemy": __version__, "torch": torch.__version__}
    write_json(
        folder / "run.json",
        {"batches": True, "started": began, "config": {"report_latents": pages}, "versions": versions},
    )
    write_json(
        folder / "status.json", {"status": "complete", "reason": "", "saes": dict.fromkeys(named, "complete")}
    )
    write_text(folder / "rows.jsonl", _lines(rows))
    write_text(folder / "metrics.jsonl", _lines(_records(metrics, list(named), named, site)))
    plots.write(folder, missing=missing)
    path = page.write([folder], missing=missing)
    if missing:
        log.warning("missing from the report: %s", missing)
    return path


def _write_latents(path: Path, g: LatentStats, sae: SAE, pages: int) -> None:
    began = time.monotonic()
    columns = latents.statistics(g, sae, geometry.geometry(sae), pages)
    columns |= latents.strongest_rows(g, columns["page_latent"])
    latents.write(path, g, columns, seconds=time.monotonic() - began, text=False)


def _folder(folder: Path) -> Path:
    """Return a new or empty folder, or that of an earlier report."""
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or _is_ours(folder))):
        raise invalid(
            "folder",
            str(folder),
            "a new or empty one, or that of an earlier report",
            "name another; nothing else is overwritten",
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _is_ours(folder: Path) -> bool:
    try:
        return read_json(folder / "run.json").get("batches") is True
    except (OSError, ValueError, AttributeError):
        return False


def _records(
    metrics: Sequence[Row], names: Sequence[str], saes: Mapping[str, SAE], site: str
) -> list[dict[str, Any]]:
    """Return the records of `fit`, which calls SAEs by their place, under their names."""
    found = [(names[int(record["sae"])], record) for record in metrics]
    return [record | {"sae": name, "site": site, "architecture": saes[name].name} for name, record in found]


def _lines(objects: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(one) + "\n" for one in objects)
