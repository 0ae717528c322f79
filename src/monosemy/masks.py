"""Masks of crosscoders: which latents read and write which sources. Nothing here imports torch.

F latents, S sources.
"""

from __future__ import annotations

from monosemy.errors import invalid

MASKS = ("full", "causal", "dedicated")


def mask_groups(
    mask: str, S: int, F: int, dedicated_share: float, of_width: str = "d_sae"
) -> list[tuple[slice, range, range]]:
    """Return the latents of each part of a mask, with the sources that they read and write.

    Raises ValueError for an unknown mask, and where a part would have no latent; `of_width` is the setting
    that says how many there are.
    """
    if mask not in MASKS:
        raise invalid("mask", mask, ", ".join(MASKS), "choose one of them")
    if mask == "full":
        return [(slice(0, F), range(S), range(S))]
    if mask == "causal":
        of_one = F // S
        parts = [(range(n + 1), range(n, S)) for n in range(S)]
    else:
        of_one = int(dedicated_share * F) if 0 < dedicated_share < 1 else 0
        parts = [(range(n, n + 1), range(n, n + 1)) for n in range(S)] + [(range(S), range(S))]
    if of_one < 1 or of_one * (len(parts) - 1) >= F:
        allowed = f"what leaves each of {len(parts)} parts of {F} latents one or more"
        field, value = ("dedicated_share", dedicated_share) if mask == "dedicated" else (of_width, F)
        raise invalid(field, value, allowed, "correct it, or train more latents")
    ends = [*(of_one * (n + 1) for n in range(len(parts) - 1)), F]
    return [(slice(n * of_one, end), *part) for n, (end, part) in enumerate(zip(ends, parts, strict=True))]
