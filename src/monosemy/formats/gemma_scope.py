"""Gemma Scope's `params.npz`: JumpReLU SAEs with arrays W_enc [D, F], W_dec [F, D], b_enc, b_dec, threshold,
whose encoder sees x itself.

Some files call the weights w_enc and w_dec. Layer, place, model and whether it is a transcoder stand in the
path alone: `google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71/params.npz`.
"""

from __future__ import annotations

import re
from pathlib import Path

from monosemy.formats import untrusted
from monosemy.formats.parts import COLUMN_ENCODER, Names, Parts, Stored, matrix_shape, renamed, stored

NAMES: Names = COLUMN_ENCODER | {"threshold": "threshold"}
LOWER: Names = NAMES | {"W_enc": Stored("w_enc", transposed=True), "W_dec": "w_dec"}
# the last two are read nowhere here
PLACES = {
    "res": "resid_post.{0}",
    "mlp": "mlp_out.{0}",
    "att": "blocks.{0}.attn.hook_z",
    "transcoders": "blocks.{0}.ln2.hook_normalized:mlp_out.{0}",
}


def read(folder: Path, source: str) -> Parts:
    """Read the SAE or transcoder in a params.npz.

    Raises ValueError for a compressed or damaged one, and for other arrays.
    """
    spellings = [[stored(name).name for name in names.values()] for names in (NAMES, LOWER)]
    tensors = untrusted.npz(folder / "params.npz", *spellings)
    names = LOWER if "w_enc" in tensors else NAMES
    ours = renamed(tensors, names, "params.npz")
    d_sae, d_in = matrix_shape(ours["W_enc"], "params.npz: W_enc")
    release = re.search(r"gemma-scope-(2b|9b|27b)-(pt|it)-(res|mlp|att|transcoders)\b", source)
    layer = re.search(r"/layer_(\d{1,3})\b", source)
    config = {
        "site": PLACES[release[3]].format(layer[1]) if release and layer else None,
        "model": f"google/gemma-2-{release[1]}{'-it' if release[2] == 'it' else ''}" if release else None,
    }
    transcode = release is not None and release[3] == "transcoders"
    return Parts(
        "jump_relu", d_in, d_sae, {}, ours, "params.npz", False, config, names=names, transcode=transcode
    )
