"""Labels and scores of an SAE's latents as they are kept in its folder, labels.json, and told in rows.

What is written stays when other latents are labeled later; a latent that is labeled again gets the new one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from monosemy.errors import invalid
from monosemy.labeling.scoring import Tally, mean_with_interval
from monosemy.system.files import read_json, write_json

FILE = "labels.json"
TESTS = ("detection", "fuzzing")
OTHER = "_other"  # of a test by another latent's label


@dataclass
class Labeled:
    """One latent: its label, or why there is none, and a judge's verdicts by test."""

    latent: int
    model: str
    label: str | None = None
    why: str = ""  # there is no label
    random: bool = False  # whether it is of the fair sample
    other: int | None = None  # the latent whose label was the control
    tallies: dict[str, Tally] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        scores = {name: _score(tally) for name, tally in self.tallies.items()}
        known = {key: value for key, value in asdict(self).items() if key != "tallies"}
        return known | {"scores": scores}


def _score(tally: Tally) -> dict[str, Any]:
    interval = tally.interval()
    low, high = (None, None) if interval is None else interval
    return asdict(tally) | {"accuracy": tally.accuracy, "low": low, "high": high}


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the entries of an SAE's labels.json, none where there is none. Raises ValueError for a damaged
    file."""
    path = folder / FILE
    try:
        found = read_json(path, {"latents": []})["latents"]
        assert all(isinstance(entry["latent"], int) and isinstance(entry["scores"], dict) for entry in found)
    except (ValueError, LookupError, TypeError, AssertionError) as error:
        remedy = "run `monosemy explain` again: what was answered is kept"
        raise invalid(FILE, str(path), "what `monosemy explain` wrote", remedy) from error
    return list(found)


def write(folder: Path, new: Iterable[Labeled]) -> list[dict[str, Any]]:
    """Add latents to an SAE's labels.json. Returns all of its entries, by latent."""
    by_latent = {entry["latent"]: entry for entry in read(folder)}
    by_latent |= {one.latent: one.as_json() for one in new}
    entries = [by_latent[latent] for latent in sorted(by_latent)]
    write_json(folder / FILE, {"latents": entries})
    return entries


def row_columns(entries: Sequence[Mapping[str, Any]], model: str) -> dict[str, Any]:
    """Return what a row says of the labels by one model: how many there are, and the mean scores of the
    latents that were drawn at random, with 95 % intervals over latents."""
    of_model = [entry for entry in entries if entry["model"] == model]
    fair = [entry for entry in of_model if entry["random"]]
    columns: dict[str, Any] = {
        "label_model": model,
        "label_count": sum(entry["label"] is not None for entry in of_model),
        "label_none": sum(entry["label"] is None for entry in of_model),
    }
    for test in (*TESTS, *(test + OTHER for test in TESTS)):
        found = [entry["scores"].get(test, {}).get("accuracy") for entry in fair]
        values = [value for value in found if value is not None]
        if values:
            mean, low, high = mean_with_interval(values)
            columns |= {f"label_{test}": mean, f"label_{test}_low": low, f"label_{test}_high": high}
            columns["label_scored"] = max(columns.get("label_scored", 0), len(values))
    return columns
