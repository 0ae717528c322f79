"""Gemma Scope's `params.npz`: JumpReLU SAEs with arrays W_enc [D, F], W_dec [F, D], b_enc, b_dec, threshold, whose encoder sees x itself.

Layer, place and model stand in the path alone: `gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71/params.npz`.
"""

from __future__ import annotations

import re
from pathlib import Path

from monosemy.formats import untrusted
from monosemy.formats.parts import Parts, matrix_shape, renamed

NAMES = {"W_enc": "W_enc'", "W_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"}
PLACES = {"res": "resid_post", "mlp": "mlp_out"}  # "att" is what enters the output projection, which is read nowhere here


def read(folder: Path, source: str) -> Parts:
    """The SAE in a params.npz. Raises ValueError for a compressed or damaged one."""
    tensors = untrusted.npz(folder / "params.npz", [name.rstrip("'") for name in NAMES.values()])
    ours = renamed(tensors, NAMES, "params.npz")
    d_sae, d_in = matrix_shape(ours["W_enc"], "params.npz: W_enc")
    release, layer = re.search(r"gemma-scope-(2b|9b|27b)-(pt|it)-(res|mlp)\b", source), re.search(r"/layer_(\d{1,3})\b", source)
    config = {
        "site": f"{PLACES[release[3]]}.{layer[1]}" if release and layer else None,
        "model": f"google/gemma-2-{release[1]}{'-it' if release[2] == 'it' else ''}" if release else None,
    }
    return Parts("jump_relu", d_in, d_sae, {}, ours, "params.npz", False, config, names=NAMES)
