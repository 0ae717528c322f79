"""Qwen-Scope's `layerN.sae.pt`: TopK SAEs of x itself, without thresholds, one pickle for each layer.

W_enc is [F, D] and W_dec [D, F]. Model, F in 1024s and k stand in the repository's name alone:
`Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50/layer12.sae.pt`.
"""

from __future__ import annotations

import re
from pathlib import Path

from monosemy.errors import invalid
from monosemy.formats import untrusted
from monosemy.formats.parts import Names, Parts, Stored, dtype_of, matrix_shape, only, renamed

NAMES: Names = {
    "W_enc": "W_enc",
    "W_dec": Stored("W_dec", transposed=True),
    "b_enc": "b_enc",
    "b_dec": "b_dec",
}

NAMED = r"\bSAE-Res-([\w.-]+)-W(\d{1,6})K-L0_(\d{1,6})/(?:.*/)?layer(\d{1,4})\.sae\.pt$"


def read(file: Path, source: str) -> Parts:
    """Read one layer's SAE. Raises ValueError where no name says its k, and where its width is another's."""
    named = re.search(NAMED, source)
    if named is None:
        remedy = 'the repository\'s name alone says k: pass source="Qwen/SAE-Res-.../layer12.sae.pt"'
        raise invalid("source", source[-200:], "OWNER/SAE-Res-MODEL-W32K-L0_50/layerN.sae.pt", remedy)
    model, thousands, k, layer = named[1], int(named[2]), int(named[3]), int(named[4])
    tensors = untrusted.state_dict(file)
    only(tensors, NAMES.values(), file.name)
    ours = renamed(tensors, NAMES, file.name)
    d_sae, d_in = matrix_shape(ours["W_enc"], f"{file.name}: W_enc")
    if d_sae != 1024 * thousands:
        found, allowed = f"{d_sae} latents", f"the {1024 * thousands} latents of {named[0].split('/')[0]}"
        raise invalid(f"{file.name}: W_enc", found, allowed, "check which repository it comes from")
    config = {"site": f"resid_post.{layer}", "model": f"Qwen/{model}", "dtype": dtype_of(tensors)}
    where, optional = file.name, ("threshold",)
    return Parts("top_k", d_in, d_sae, {"k": k}, ours, where, False, config, optional=optional, names=NAMES)
