"""All that is known of an SAE's latents, a record each: latents.npz, eval_text.npz and labels.json together.

F latents, P of them with examples, S contexts kept of each, W tokens of a window, C contexts of L tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from monosemy.errors import invalid
from monosemy.evaluation.latent_stats import BEFORE, OCTAVES, SAMPLED, STRONGEST, WINDOW
from monosemy.evaluation.latents import REASONS
from monosemy.jobs.evaluate import run_of
from monosemy.labeling import labels
from monosemy.system import arrays
from monosemy.system.files import read_json, read_lines


@dataclass(frozen=True)
class Context:
    """A window of text: tokens, the latent's activation on each, to 1/255 of the peak, and the peak's place.

    `octave` is the power of two at or below the peak of a context that was drawn among those; None for one of
    the strongest.
    """

    tokens: list[str]
    activations: list[float]
    peak_index: int
    octave: int | None
    candidates: int | None  # contexts whose peaks lie in that octave

    @property
    def peak(self) -> float:
        return self.activations[self.peak_index]


class LatentRecords:
    """The latents of one SAE of an evaluated run."""

    def __init__(self, run: Path, name: str) -> None:
        """Raises ValueError for an SAE without latents.npz, a damaged file, and files of two evaluations."""
        self.run, self.name, self.folder = run, name, run / name
        path, text_path = self.folder / "latents.npz", run / "eval_text.npz"
        for there in (path, text_path):
            if not there.is_file():
                remedy = f"run `monosemy eval {run}`, with --report_latents above 0 in training"
                raise invalid(there.name, str(there), "what an evaluation kept of the latents", remedy)
        self.columns, self.facts = arrays.load(path)
        text, _ = arrays.load(text_path)
        ends = np.cumsum(text["token_lengths"], dtype=np.int64)
        spelled = text["token_bytes"].tobytes()
        begins = ends - text["token_lengths"]
        pieces = [spelled[a:b].decode("utf-8", "replace") for a, b in zip(begins, ends, strict=True)]
        self.token = dict(zip(text["token_ids"].tolist(), pieces, strict=True))
        self.ids_CL: np.ndarray | None = text.get("ids") if "page_at" in self.columns else None
        self.place = {latent: p for p, latent in enumerate(self.columns["page_latent"].tolist())}
        last = self.columns["page_at"].max(initial=-1) if "page_at" in self.columns else -1
        if self.ids_CL is not None and last >= self.ids_CL.size:
            raise invalid("latents.npz", str(path), "of one evaluation with eval_text.npz", "evaluate again")
        self.labels = {entry["latent"]: entry for entry in labels.read(self.folder)}
        self.row: Mapping[str, Any] = next(
            (row for row in read_lines(run / "rows.jsonl") if row["sae"] == name), {"sae": name}
        )
        self.config: Mapping[str, Any] = read_json(run / "run.json", {}).get("config", {})

    def __len__(self) -> int:
        return len(self.columns["count"])

    def statistics(self, latent: int) -> dict[str, Any]:
        """Return the numbers of a latent, by name; a cosine that there is none of is None."""
        c = self.columns
        p = self.place.get(latent)
        return {
            "latent": latent,
            "count": int(c["count"][latent]),
            "contexts": int(c["contexts"][latent]),
            "frequency": int(c["count"][latent]) / max(self.facts["tokens"], 1),
            "max": float(c["max"][latent]),
            "mean": float(c["mean"][latent]),
            "encoder_decoder_cosine": _known(c["enc_dec"][latent]),
            "nearest": int(c["near"][latent]),
            "nearest_cosine": _known(c["near_cosine"][latent]),
            "chosen_as": None if p is None else REASONS[int(c["page_reason"][p])],
        }

    def tokens(self, latent: int, what: str) -> list[tuple[str, float]]:
        """Return the tokens that a latent promotes, suppresses or reads, with z; none where not kept."""
        p = self.place.get(latent)
        if p is None or f"page_{what}" not in self.columns:
            return []
        ids, z = self.columns[f"page_{what}"][p].tolist(), self.columns[f"page_{what}_z"][p].tolist()
        return [(self.token[i], value) for i, value in zip(ids, z, strict=True)]

    def contexts(self, latent: int) -> list[Context]:
        """Return the contexts kept of a latent: the strongest first, then those of each octave, highest
        first."""
        p = self.place.get(latent)
        if p is None or self.ids_CL is None:
            return []
        octave_O, candidates_O = self.columns["page_octave"][p], self.columns["page_candidates"][p]
        found = [self._context(p, slot, None, None) for slot in range(STRONGEST)]
        for o in np.argsort(-octave_O.astype(int), kind="stable").tolist():
            assert o < OCTAVES
            slots = range(STRONGEST + SAMPLED * o, STRONGEST + SAMPLED * (o + 1))
            found += [self._context(p, slot, int(octave_O[o]), int(candidates_O[o])) for slot in slots]
        return [context for context in found if context is not None]

    def _context(self, p: int, slot: int, octave: int | None, candidates: int | None) -> Context | None:
        assert self.ids_CL is not None
        at, peak = int(self.columns["page_at"][p, slot]), float(self.columns["page_peak"][p, slot])
        if at < 0:
            return None
        L = self.ids_CL.shape[1]
        start = at // L * L
        first, end = max(start, at - BEFORE), min(start + L, at - BEFORE + WINDOW)
        shade_W = self.columns["page_shade"][p, slot, first - at + BEFORE : end - at + BEFORE]
        activations = [float(f"{shade / 255 * peak:.4g}") for shade in shade_W.tolist()]
        tokens = [self.token[i] for i in self.ids_CL.ravel()[first:end].tolist()]
        return Context(tokens, activations, at - first, octave, candidates)


def _known(cosine: Any) -> float | None:
    return None if np.isnan(cosine) else float(cosine)


def found(path: str) -> Iterator[LatentRecords]:
    """Yield the SAEs of a run, or the one that a folder in a run is. Raises ValueError for any other path."""
    folder = Path(path)
    if (folder / "run.json").is_file():
        names = [row["sae"] for row in read_lines(folder / "rows.jsonl")]
        kept = [name for name in names if (folder / name / "latents.npz").is_file()]
        if not kept:
            remedy = f"run `monosemy eval {folder}`, with --report_latents above 0 in training"
            raise invalid("path", path, "an evaluated run whose report has latents", remedy)
        yield from (LatentRecords(folder, name) for name in kept)
        return
    run = run_of(folder)
    if run is None or not folder.is_dir():
        raise invalid("path", path, "the folder of a run or of an SAE in one", "name what --save_dir made")
    yield LatentRecords(run, folder.absolute().relative_to(run).as_posix())
