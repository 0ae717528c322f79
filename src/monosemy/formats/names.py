"""What the names of published SAEs say of them before anything is fetched."""

from __future__ import annotations

import math
import re
from pathlib import PurePosixPath

from monosemy.formats import gemma_scope, gemma_scope_2
from monosemy.formats.parts import module_site, site_of
from monosemy.lm.info import HOOKS, KINDS

ARCHITECTURES = {
    "gemma_scope": "jump_relu",
    "gemma_scope_2": "jump_relu",
    "llama_scope": "jump_relu",
    "qwen_scope": "top_k",
    "goodfire": "standard",
}
_LLAMA = {"R": "resid_post.{}", "M": "mlp_out.{}", "A": "attn_out.{}"}
_HOOK = rf"(?<![a-z])blocks\.\d{{1,4}}\.(?:{'|'.join(map(re.escape, HOOKS.values()))})(?![a-z])"


def site(place: str) -> str | None:
    """Return the site in OWNER/REPO/ID, None where it says none."""
    if match := re.search(
        r"\bgemma-scope-(?:2b|9b|27b)-(?:pt|it)-(res|mlp|att|transcoders)/layer_(\d{1,3})/", place
    ):
        return gemma_scope.PLACES[match[1]].format(match[2])
    if match := re.search(rf"/({'|'.join(gemma_scope_2.PLACES)})(?:_all)?/layer_(\d{{1,3}})_[^/]*$", place):
        return gemma_scope_2.PLACES[match[1]].format(match[2])
    end = rf"({'|'.join(KINDS)})_layer_(\d{{1,4}})"
    if match := re.search(rf"/{end}_to_{end}(?:_checkpoints)?/[^/]*$", place):
        return f"{match[1]}.{match[2]}:{match[3]}.{match[4]}"
    if match := re.search(rf"/{end}(?:_checkpoints)?/[^/]*$", place):
        return f"{match[1]}.{match[2]}"
    if match := re.search(r"(?:/|-)L(\d{1,3})([RMA])(?:-\d+x)?$", place):
        return _LLAMA[match[2]].format(match[1])
    if match := re.search(r"/layer(\d{1,4})\.sae\.pt$|-SAE-l(\d{1,4})\.pth?$", place):
        return f"resid_post.{match[1] or match[2]}"
    if match := re.search(_HOOK, place):
        return site_of(match[0])
    folder = PurePosixPath(place)
    return module_site(folder, transcode="transcoder" in folder.parent.name)


def width(place: str) -> int | None:
    """Return the number of latents in OWNER/REPO/ID, None where it says none.

    Qwen-Scope counts in 1024s; where others say 16k or 1m, the nearest power of 2 is meant.
    """
    if match := re.search(r"-W(\d{1,5})K-", place):
        return 1024 * int(match[1])
    if match := re.search(r"width[_-]2pow(\d{1,2})", place):
        return 1 << int(match[1])
    if match := re.search(r"width_([1-9]\d{0,5})([km])", place):
        return 1 << round(math.log2(int(match[1]) * {"k": 1e3, "m": 1e6}[match[2]]))
    return None
