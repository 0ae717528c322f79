"""Named randomness: every draw in a run is a function of (seed, purpose, index), never of what ran before it.

Nothing in the library touches torch's global generator, so adding an SAE to a sweep, switching on a log or evaluating
cannot move anybody else's numbers.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def _hash(*parts: object) -> int:
    """64 bits of a hash that depends on every part and on where one part ends and the next begins."""
    digest = hashlib.sha256("\x1f".join(f"{type(part).__name__}:{part}" for part in parts).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")


def generator(seed: int, purpose: str, *index: object) -> torch.Generator:
    """A fresh CPU generator for one purpose ("weights", "permutation", ...) and index (a site, a block number)."""
    import torch

    return torch.Generator("cpu").manual_seed(_hash(seed, purpose, *index) >> 1)


def fraction(seed: int, *parts: object) -> float:
    """A number in [0, 1) that is fixed by its arguments: for yes-or-no decisions about one document."""
    return _hash(seed, *parts) / 2**64
