"""Tiny models and SAEs of every architecture with weights drawn at random."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from monosemy.config import architecture_names
from monosemy.families import Family
from monosemy.sae import SAE
from tests.architectures.test_contract import SETTINGS
from tests.lm.test_lm import CONFIGS

F = 64
EVERY = sorted(architecture_names())


def drawn(kind: type[SAE], *widths: Any, seed: int = 0, site: str | None = None, **how: Any) -> SAE:
    """Return an SAE of random weights, of which about half fire."""
    return _random(kind(*widths, **how), seed, site)


def sae_of(name: str, D: int = 32, *, site: str | None = "resid_post.1", seed: int = 0, **family: Any) -> SAE:
    """Return an SAE of an architecture, or of another family of it, of random weights."""
    widths = family.pop("widths", (D,))
    return _random(Family(**family).make(name, widths, F, SETTINGS[name]), seed, site)


def _random(sae: SAE, seed: int, site: str | None) -> SAE:
    draw = torch.Generator().manual_seed(seed)
    for tensor in (*sae.parameters(), *sae.buffers()):
        tensor.data.copy_(0.3 * torch.randn(tensor.shape, generator=draw))
    if hasattr(sae, "threshold"):
        sae.threshold.data.abs_()
    sae.metadata = {} if site is None else {"site": site}
    return sae.eval()


def language_model(family: str = "llama", **changes: Any) -> hf.PreTrainedModel:
    """Return a tiny model of four layers, 32 wide."""
    config = type(CONFIGS[family]).from_dict(CONFIGS[family].to_dict() | changes)
    draw = torch.Generator().manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        # far enough from zero that a changed activation changes the next token
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=draw) + (parameter.dim() == 1))
    return model.eval()


@pytest.fixture(scope="module")
def llama() -> hf.PreTrainedModel:
    return language_model()
