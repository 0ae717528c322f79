"""Which tokens something is spliced in at, and whether a model can be run on from there.

B contexts, L tokens of a context, D width of a site.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from monosemy.lm.info import Site
from monosemy.lm.model import LanguageModel

TOLERANCE = 1e-3  # of the largest value: what runs of the same numbers may differ by


def counted_tokens(
    ids_BL: Tensor, ignore_ids: Tensor, read: Sequence[Tensor] = (), limits: Sequence[float] = ()
) -> Tensor:
    """Return the mask [B, L] of the tokens that count: not a context's first, none of `ignore_ids`, and of
    norms within the limits, one for each site that is read, [B, L, D]."""
    mask_BL = ~torch.isin(ids_BL, ignore_ids)
    for x_BLD, limit in zip(read, limits, strict=True):
        mask_BL &= x_BLD.float().norm(dim=-1) <= limit
    mask_BL[:, 0] = False
    return mask_BL


@torch.no_grad()
def resumes(lm: LanguageModel, ids_1L: Tensor, site: Site) -> bool:
    """Return whether what comes after a site can be run alone: not where layers share more than the hidden
    state."""
    clean = lm.clean(ids_1L, [site])
    again_1LD = lm.run_from(clean, site, clean.activations[site])
    return bool((again_1LD - clean.hidden_BLD).abs().max() <= TOLERANCE * clean.hidden_BLD.abs().max())
