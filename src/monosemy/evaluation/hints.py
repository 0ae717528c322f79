"""What the rows of a run suggest to do otherwise, in sentences for the terminal and the page.

Nothing here imports torch.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence

from monosemy.evaluation.columns import Row, finite, table

log = logging.getLogger(__name__)

SILENT = 0.1  # share of latents that never fire, above which it is told
FIRINGS = 100  # of a mean latent on the held-out text, below which a silent one may just be rare
FEWEST = 3  # L0 values that make a sweep
L1 = ("standard", "standard_new", "p_anneal")
REMEDY = (
    "Half the learning rate (--learning_rates) or smaller batches keep more of them; docs/recipes.md has "
    "what that costs."
)
L1_REMEDY = (
    "No learning rate that was tried changes that; gated, jump_relu and the TopK kinds keep more of them "
    "(docs/recipes.md)."
)
FLAT = 0.02  # relative difference of mean cosines that says nothing


def print_table(rows: Sequence[Row]) -> None:
    """Print the table of rows, and log what stands out in them."""
    print(table(rows))
    for hint in hints(rows):
        log.warning("%s", hint)


def hints(rows: Sequence[Row]) -> list[str]:
    """Return what stands out in the rows of a run, each with its remedy; empty where nothing does."""
    return [*_silent(rows), *_l0_of_sweeps(rows)]


def _silent(rows: Sequence[Row]) -> list[str]:
    """Name the SAE of each architecture with the most latents that never fire, with what helped in
    docs/recipes.md."""
    found: dict[str, list[tuple[float, Row]]] = defaultdict(list)
    for row in rows:
        alive, l0, tokens, d_sae = (finite(row, key) for key in ("frac_alive", "l0", "tokens", "d_sae"))
        if alive is None or l0 is None or not tokens or not d_sae:
            continue
        if 1 - alive > SILENT and l0 * tokens / d_sae >= FIRINGS:
            found[row["architecture"]].append((1 - alive, row))
    sentences = []
    for architecture, silent in found.items():
        share, row = max(silent, key=lambda one: one[0])
        most = f", the most of {len(silent)} SAEs with over {SILENT:.0%}" if len(silent) > 1 else ""
        sentences.append(
            f"{architecture}: {share:.0%} of {row['d_sae']:,} latents of {row['sae']} fire on none of "
            f"{row['tokens']:,} held-out tokens{most}. {L1_REMEDY if architecture in L1 else REMEDY}"
        )
    return sentences


def _l0_of_sweeps(rows: Sequence[Row]) -> list[str]:
    """Say at which L0 of each sweep decoder rows are least alike.

    An L0 too low mixes correlated features in a latent, one too high finds degenerate ones: both make decoder
    rows more alike. Chanin and Garriga-Alonso, Sparse but Wrong (2025), section 3,
    https://arxiv.org/abs/2508.16560
    """
    sweeps: dict[tuple, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        l0, cosine = finite(row, "l0"), finite(row, "decoder_mean_cosine")
        if l0 is not None and cosine is not None:
            key = tuple(row.get(name) for name in ("site", "architecture", "d_sae", "lr", "seed"))
            sweeps[key].append((l0, cosine))
    found = []
    for (site, architecture, d_sae, *_), points in sweeps.items():
        by_l0 = dict(sorted(points))
        least, most = min(by_l0.values()), max(by_l0.values())
        if len(by_l0) < FEWEST or most - least <= FLAT * least:
            continue
        l0 = min(by_l0, key=by_l0.__getitem__)
        edge = {min(by_l0): ", the lowest", max(by_l0): ", the highest"}.get(l0, "")
        found.append(f"{l0:.0f}{edge} of {len(by_l0)} ({site}, {architecture}, {d_sae:,} latents)")
    if not found:
        return []
    return [
        f"Decoder rows are least alike at L0 {'; '.join(found)}. Too low or too high an L0 mixes features, "
        "which makes rows alike (arXiv 2508.16560): where it is the lowest or the highest, try others beyond."
    ]
