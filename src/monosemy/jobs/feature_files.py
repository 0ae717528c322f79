"""Feature files: what circuit-tracer's page shows of each latent, from what a run's evaluation kept of it.

The page (circuit-tracer 0.5.0) asks for a latent by one number, `pairing` of its layer and its own number,
and takes the files in two layouts. `files`: features/NUMBER.json for each latent, which its own server finds
where it serves the set's folder, since the set's `scan` begins with "./". `packed`: features/layer_L.bin, of
which it fetches ranges of bytes from a repository of the Hugging Face hub, and features/index.json.gz.

Every latent gets a file, those without a page in the report one that says so: where the page finds none, it
leaves the examples of the latent before under the new one's name.

F latents, P of them with examples, S contexts kept of each, W tokens of a window, C contexts of L tokens.
"""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from monosemy.errors import invalid
from monosemy.evaluation.latent_stats import BEFORE, BINS, LOWEST, SAMPLED, STRONGEST, WINDOW
from monosemy.formats.untrusted import json_object
from monosemy.system import arrays

LAYOUTS = ("files", "packed", "none")
FOLDER = "features"
SCAN = f"./data/{FOLDER}"  # as the page asks its own server for the set's folder
HISTOGRAM = 40  # bars of equal width, from 0 to the largest activation
QUANTILES = 100  # the page shows the place of the first that an activation does not exceed
NOT_KEPT = ("(not kept)",)  # the page leaves the tokens of the latent before where there are none
SHOWN = str.maketrans({"\n": "⏎", "\t": "→", "\r": "↵"})  # as it shows a prompt's


def pairing(layer: int, latent: int) -> int:
    """Return the number by which the page knows a latent: Cantor's pairing of the two."""
    return (layer + latent) * (layer + latent + 1) // 2 + latent


def write(target: Path, run: Path, folders: Mapping[Path, Sequence[int]], layout: str) -> None:
    """Write features/ in a set's folder, of the latents of a run's transcoders.

    Of each folder come the layers that its latents belong to, an equal part to each, in order: those of a
    cross-layer transcoder to several. Raises ValueError for a file of the run that is damaged, or that
    belongs to another evaluation.
    """
    features = target / FOLDER
    features.mkdir()
    try:
        text = _Text(arrays.load(run / "eval_text.npz")[0])
        parts = {
            layer: (of, part)
            for folder, layers in folders.items()
            for of in [_Latents(folder, text, len(layers))]
            for part, layer in enumerate(layers)
        }
        if layout == "files":
            for layer, (of, part) in parts.items():
                for latent, feature in enumerate(of.features(part)):
                    (features / f"{pairing(layer, latent)}.json").write_bytes(_json(feature))
            return
        index = {}
        for layer, (of, part) in sorted(parts.items()):
            name = f"layer_{layer}.bin"
            index[str(layer)] = {"filename": name, "offsets": _pack(features / name, of.features(part))}
        (features / "index.json.gz").write_bytes(gzip.compress(_json(index), mtime=0))
    except (KeyError, IndexError) as error:
        allowed = "what one evaluation wrote, eval_text.npz and every latents.npz"
        remedy = f"evaluate the run again ({type(error).__name__}: {error})"
        raise invalid("run", str(run), allowed, remedy) from error


def lacking(run: Path, folders: Iterable[Path]) -> Path | None:
    """Return the first file that features are made of and that is not there, if any."""
    files = (run / "eval_text.npz", *(folder / "latents.npz" for folder in folders))
    return next((file for file in files if not file.is_file()), None)


def _pack(path: Path, features: Iterator[dict[str, Any]]) -> list[int]:
    """Write features one after the other, each as the length of its gzip in four bytes, then that.

    Returns where each begins, and the last ends.
    """
    offsets = [0]
    with open(path, "wb") as file:
        for feature in features:
            packed = gzip.compress(_json(feature), mtime=0)
            file.write(struct.pack("<I", len(packed)) + packed)
            offsets.append(file.tell())
    return offsets


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


class _Text:
    """The held-out text, and each token as the page shows it."""

    def __init__(self, columns: Mapping[str, np.ndarray]) -> None:
        ends = np.cumsum(columns["token_lengths"], dtype=np.int64)
        spelled = columns["token_bytes"].tobytes()
        begins = ends - columns["token_lengths"]
        pieces = [spelled[begin:end] for begin, end in zip(begins, ends, strict=True)]
        self.token = {int(i): as_shown(piece) for i, piece in zip(columns["token_ids"], pieces, strict=True)}
        self.ids_CL: np.ndarray | None = columns.get("ids")

    def of(self, ids: np.ndarray) -> list[str]:
        return [self.token[i] for i in ids.tolist()]


def as_shown(token: bytes) -> str:
    """Return a token as text: bytes that are a part of a character as \\xNN, which the page joins."""
    return token.decode("utf-8", "backslashreplace").translate(SHOWN)


class _Latents:
    """The columns of a transcoder's latents.npz, as features; its latents belong to some layers, an equal
    part to each."""

    def __init__(self, folder: Path, text: _Text, layers: int) -> None:
        self.columns, self.facts = arrays.load(folder / "latents.npz")
        self.text, self.name = text, f"{folder.parent.name}/{folder.name}"
        F, found = json_object(folder / "config.json").get("d_sae"), len(self.columns["count"])
        if found != F:
            allowed = f"of {F} latents, as in config.json"
            raise invalid(f"{self.name}/latents.npz", f"of {found}", allowed, "evaluate the run again")
        self.of_layer = F // layers
        self.place = {int(latent): p for p, latent in enumerate(self.columns["page_latent"])}
        last = self.columns["page_at"].max(initial=-1) if "page_at" in self.columns else -1
        if text.ids_CL is not None and last >= text.ids_CL.size:
            raise IndexError(f"place {last} of {text.ids_CL.size} in the text")

    def features(self, part: int) -> Iterator[dict[str, Any]]:
        """Yield the feature of each latent of a layer, in order."""
        first = part * self.of_layer
        here = slice(first, first + self.of_layer)
        numbers = zip(self.columns["count"][here].tolist(), self.columns["max"][here].tolist(), strict=True)
        for latent, (count, largest) in enumerate(numbers):
            p = self.place.get(first + latent)
            feature: dict[str, Any] = {
                "transcoder_id": self.name,
                "index": latent,
                "examples_quantiles": [],
                "top_logits": NOT_KEPT,
                "bottom_logits": NOT_KEPT,
                "act_min": 0.0,
                "act_max": _rounded(largest),
                "activation_frequency": count / max(self.facts["tokens"], 1),
            }
            yield feature | (self._without_page(count) if p is None else self._of_page(p, largest))

    def _without_page(self, count: int) -> dict[str, Any]:
        F, P = len(self.columns["count"]), len(self.place)
        silent = f"Never fired on {self.facts['tokens']:,} held-out tokens"
        unknown = f"No examples: the run kept those of {P:,} of its {F:,} latents (report_latents)"
        return {"examples_quantiles": [{"quantile_name": unknown if count else silent, "examples": []}]}

    def _of_page(self, p: int, largest: float) -> dict[str, Any]:
        bars, quantiles = distribution(self.columns["page_bins"][p], largest)
        logits = {
            key: self.text.of(self.columns[name][p])
            for key, name in (("top_logits", "page_promotes"), ("bottom_logits", "page_suppresses"))
            if name in self.columns
        }
        return {
            "examples_quantiles": list(self._quantiles(p)),
            "quantile_values": [_rounded(x) for x in quantiles.tolist()],
            "histogram": [_rounded(x) for x in bars.tolist()],
        } | logits

    def _quantiles(self, p: int) -> Iterator[dict[str, Any]]:
        """Yield the strongest contexts, then those drawn from each octave of activation, highest first."""
        if "page_at" not in self.columns or self.text.ids_CL is None:
            yield {"quantile_name": "No examples: the run kept no text (report_text)", "examples": []}
            return
        seen: set[bytes] = set()
        slots = np.arange(STRONGEST)
        yield {"quantile_name": "Strongest contexts", "examples": self._examples(p, slots, seen)}
        octave_O, candidates_O = self.columns["page_octave"][p], self.columns["page_candidates"][p]
        for o in np.argsort(-octave_O.astype(int), kind="stable").tolist():
            slots = STRONGEST + SAMPLED * o + np.arange(SAMPLED)
            if examples := self._examples(p, slots, seen):
                low = 2.0 ** int(octave_O[o])
                drawn = f"{len(examples)} drawn of {candidates_O[o]:,}"
                yield {
                    "quantile_name": f"Peaks from {low:g} to {2 * low:g}, {drawn} contexts",
                    "examples": examples,
                }

    def _examples(self, p: int, slots: np.ndarray, seen: set[bytes]) -> list[dict[str, Any]]:
        """Return what is kept at some slots; `seen` are the texts of those before."""
        assert self.text.ids_CL is not None
        L, ids = self.text.ids_CL.shape[1], self.text.ids_CL.ravel()
        found = []
        for slot in slots.tolist():
            at, peak = int(self.columns["page_at"][p, slot]), float(self.columns["page_peak"][p, slot])
            if at < 0:
                continue
            start = at // L * L
            first, end = max(start, at - BEFORE), min(start + L, at - BEFORE + WINDOW)
            shade_W = self.columns["page_shade"][p, slot, first - at + BEFORE : end - at + BEFORE]
            window = ids[first:end]
            found.append(
                {
                    "tokens": self.text.of(window),
                    "tokens_acts_list": [_rounded(x / 255 * peak) for x in shade_W.tolist()],
                    "train_token_ind": at - first,
                    "is_repeated_datapoint": window.tobytes() in seen,
                }
            )
            seen.add(window.tobytes())
        return found


def distribution(bins_H: np.ndarray, largest: float) -> tuple[np.ndarray, np.ndarray]:
    """Return bars of equal width from 0 to the largest activation, and the quantiles 1 to 100 of activations.

    `bins_H` counts quarter octaves; those of one are taken as evenly spread over it.
    """
    octave, quarter = np.divmod(np.arange(BINS + 1), 4)
    edges = 2.0 ** (LOWEST + octave) * (1 + quarter / 4)
    edges[0], edges[-1] = 0, max(edges[-1], largest)  # the outermost hold what lies beyond
    edges = np.minimum(edges, largest)
    below = np.concatenate([[0], np.cumsum(bins_H, dtype=np.int64)])
    bars = np.diff(np.interp(np.linspace(0, largest, HISTOGRAM + 1), edges, below))
    rank = below[-1] * np.arange(1, QUANTILES + 1) / QUANTILES
    at = np.searchsorted(below[1:], rank)  # the bin that each is in
    share = (rank - below[at]) / bins_H[at]
    return bars, edges[at] + share * (edges[at + 1] - edges[at])


def _rounded(x: float) -> float:
    return float(f"{x:.4g}")
