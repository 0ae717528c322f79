"""Two language models on the same tokens: what the sites of both have, and which of them a site is of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from monosemy.errors import invalid
from monosemy.lm.info import ModelInfo, Site
from monosemy.lm.model import LanguageModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE = 'The other day, 12 people (of 345) wrote: "naïve café"\n\n    x = y[0] + 1  # done\n'


class ModelPair:
    """Two models that read the same tokens: the first, and the other that it is compared with.

    Each runs as it does alone; neither is changed by the other's presence.
    """

    def __init__(self, first: LanguageModel, other: LanguageModel) -> None:
        self.first, self.second = first, other

    @property
    def device(self) -> torch.device:
        return self.first.device

    @property
    def dtype(self) -> torch.dtype:
        return self.first.dtype

    @property
    def sites(self) -> tuple[Site, ...]:
        return (*self.first.sites, *self.second.sites)

    def of(self, site: Site) -> LanguageModel:
        """Return the model that a site is of."""
        return self.second if site.other else self.first

    def d_in(self, site: Site) -> int:
        """Return the width of the activations at a site."""
        return self.of(site).d_in(site)

    def activations(self, ids_BL: Tensor) -> dict[Site, Tensor]:
        """Return the activations [B, L, D] at every site of both models."""
        return self.first.activations(ids_BL) | self.second.activations(ids_BL)


Models = LanguageModel | ModelPair


def load_models(
    model: ModelInfo, sites: Sequence[Site], other: ModelInfo | None = None, **how: Any
) -> Models:
    """Load a model, and the other one that its sites are compared with, where there is one, as
    `LanguageModel.load` does."""
    first = LanguageModel.load(model, [site for site in sites if not site.other], **how)
    if other is None:
        return first
    return ModelPair(first, LanguageModel.load(other, [site for site in sites if site.other], **how))


def check_tokenizers(first: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, name: str) -> None:
    """Check that two models read the same text as the same tokens: every token of the first has its number in
    the other, which may have more, and a sample is cut alike. Raises ValueError where they disagree."""
    ours, theirs = first.get_vocab(), other.get_vocab()
    differ = [token for token, number in ours.items() if theirs.get(token) != number]
    cut = [tokenizer(SAMPLE, add_special_tokens=False)["input_ids"] for tokenizer in (first, other)]
    if differ or cut[0] != cut[1]:
        shown = ", ".join(map(repr, sorted(differ)[:3])) or "how text is cut"
        allowed = f"a model with the first one's tokenizer ({len(differ)} tokens differ: {shown})"
        raise invalid("diff_model", name, allowed, "name a model fine-tuned from it, or its base")
