"""Draw named random numbers: each is a function of (seed, purpose, index), never of what ran before it.

Nothing in the library touches torch's global generator, so adding an SAE to a sweep, switching on a log or
evaluating cannot change other numbers.
"""

from __future__ import annotations

import hashlib

import torch


def _hash(*parts: object) -> int:
    """Hash to 64 bits that depend on every part and on where one part ends and the next begins."""
    key = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def generator(seed: int, purpose: str, *index: object) -> torch.Generator:
    """Return a fresh CPU generator for a purpose ("weights", ...) and an index (a site, a block number)."""
    return torch.Generator("cpu").manual_seed(_hash(seed, purpose, *index) >> 1)


def fraction(seed: int, *parts: object) -> float:
    """Return a number in [0, 1) that is fixed by its arguments, to decide about one document."""
    return _hash(seed, *parts) / 2**64
