"""Contexts of a latent for prompts, from what an evaluation kept of it: latents.npz and eval_text.npz.

P latents with a page, S contexts kept of each, W tokens of a window, C contexts of L tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from random import Random

import numpy as np

from monosemy.errors import invalid
from monosemy.evaluation.latent_stats import BEFORE, OCTAVES, SAMPLED, STRONGEST, WINDOW
from monosemy.system import arrays

MARKED = 0.3  # of a context's peak: tokens from there on are marked in prompts
OPEN, CLOSE = b"<<", b">>"
COLUMNS = ("page_latent", "page_reason", "page_at", "page_peak", "page_shade", "page_octave", "page_silent")


@dataclass(frozen=True)
class Example:
    """A window of text: its tokens as bytes, and how active the latent is on each, as a share of the peak."""

    tokens: tuple[bytes, ...]
    shares: tuple[float, ...]
    peak: float  # 0 where the latent is silent

    @property
    def mask(self) -> tuple[bool, ...]:
        """Which tokens are marked."""
        return tuple(share >= MARKED for share in self.shares)

    def text(self, mask: Sequence[bool] | None = None) -> str:
        """Return the text on one line, with the tokens of a mask between << and >>."""
        marks = [False] * len(self.tokens) if mask is None else list(mask)
        parts = []
        for marked, run in groupby(zip(marks, self.tokens, strict=True), key=lambda pair: pair[0]):
            joined = b"".join(token for _, token in run)
            parts.append(OPEN + joined + CLOSE if marked else joined)
        return b"".join(parts).decode("utf-8", "replace").replace("\r", "").replace("\n", "\\n")

    def wrong_mask(self, draw: Random) -> tuple[bool, ...] | None:
        """Return a mask of as many tokens, all of them silent: the right one moved where that fits, so that
        its runs stay, else tokens drawn at random. None where too few are silent."""
        mask, n = self.mask, len(self.tokens)
        moved = [mask[-by:] + mask[:-by] for by in range(1, n)]
        fitting = [
            other for other in moved if not any(a and b > 0 for a, b in zip(other, self.shares, strict=True))
        ]
        if fitting:
            return draw.choice(fitting)
        silent = [i for i, share in enumerate(self.shares) if share == 0]
        if len(silent) < sum(mask):
            return None
        chosen = set(draw.sample(silent, sum(mask)))
        return tuple(i in chosen for i in range(n))


@dataclass(frozen=True)
class LatentExamples:
    """What prompts show of one latent. No context is in two of the lists."""

    explained: tuple[Example, ...]  # to the model that labels, strongest first
    firing: tuple[Example, ...]  # to the judge
    silent: tuple[Example, ...]


class Kept:
    """What an evaluation kept of an SAE's latents."""

    def __init__(self, folder: Path, text: Mapping[str, np.ndarray]) -> None:
        """Raises ValueError for a run without text or latents, or of an earlier version."""
        path = folder / "latents.npz"
        if not path.is_file():
            remedy = "run `monosemy eval` on its run, with --report_latents above 0 in training"
            raise invalid("latents.npz", str(path), "what an evaluation kept of the latents", remedy)
        self.columns, self.facts = arrays.load(path)
        if "ids" not in text or "page_at" not in self.columns:
            remedy = "evaluate a run without --no-report_text: labels are made of its text"
            raise invalid("report_text", str(path), "contexts kept as text", remedy)
        if lacking := [name for name in COLUMNS if name not in self.columns]:
            allowed = f"of this version (it lacks {', '.join(lacking)})"
            raise invalid("latents.npz", str(path), allowed, "run `monosemy eval` on its run")
        self.ids_CL = text["ids"]
        ends = np.cumsum(text["token_lengths"], dtype=np.int64)
        self._begins, self._ends = ends - text["token_lengths"], ends
        self._bytes, self._known = text["token_bytes"].tobytes(), text["token_ids"]
        self._special = text["token_special"]
        latents = self.columns["page_latent"].tolist()
        self.place = {latent: p for p, latent in enumerate(latents)}
        if max(self.columns["page_at"].max(initial=-1), self.columns["page_silent"].max(initial=-1)) >= (
            self.ids_CL.size
        ):
            allowed = "of one evaluation with eval_text.npz"
            raise invalid("latents.npz", str(path), allowed, "run `monosemy eval` on its run")

    def of(self, latent: int, examples: int) -> LatentExamples:
        """Return the examples of a latent with a page, at most so many of each list.

        The strongest contexts, then those of each octave below, are dealt out in turn to the model that
        labels and to the judge.
        """
        p = self.place[latent]
        octaves = np.argsort(-self.columns["page_octave"][p].astype(int), kind="stable")
        drawn = [STRONGEST + SAMPLED * int(o) + i for o in octaves for i in range(SAMPLED)]
        slots = [slot for slot in (*range(STRONGEST), *drawn) if self.columns["page_at"][p, slot] >= 0]
        assert len(octaves) == OCTAVES
        silent = [at for at in self.columns["page_silent"][p].tolist() if at >= 0]
        return LatentExamples(
            tuple(self._firing(p, slot) for slot in slots[0::2][:examples]),
            tuple(self._firing(p, slot) for slot in slots[1::2][:examples]),
            tuple(self._window(at, np.zeros(WINDOW), 0.0) for at in silent[:examples]),
        )

    def _firing(self, p: int, slot: int) -> Example:
        at, peak = int(self.columns["page_at"][p, slot]), float(self.columns["page_peak"][p, slot])
        return self._window(at, self.columns["page_shade"][p, slot] / 255, peak)

    def _window(self, at: int, shares_W: np.ndarray, peak: float) -> Example:
        L = self.ids_CL.shape[1]
        start = at // L * L
        first, end = max(start, at - BEFORE), min(start + L, at - BEFORE + WINDOW)
        shares = shares_W[first - at + BEFORE : end - at + BEFORE]
        return Example(self._spelled(self.ids_CL.ravel()[first:end]), tuple(shares.tolist()), peak)

    def _spelled(self, ids: np.ndarray) -> tuple[bytes, ...]:
        return tuple(self._token(i) for i in np.searchsorted(self._known, ids).tolist())

    def _token(self, i: int) -> bytes:
        """Return a token's bytes; a special one as [name], which is none to the model that reads it."""
        token = self._bytes[self._begins[i] : self._ends[i]]
        return b"[" + token.strip(b"<|>/[]") + b"]" if self._special[i] else token
