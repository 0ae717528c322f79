"""Gemma Scope 2's `params.safetensors`: JumpReLU SAEs whose encoder sees x itself.

w_enc is [D, F] and w_dec [F, D]. A config.json lies beside some of them; layer, place and model stand in
the path: `google/gemma-scope-2-1b-pt/resid_post/layer_13_width_16k_l0_small`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from monosemy.config import invalid
from monosemy.formats import untrusted
from monosemy.formats.parts import Parts, matrix_shape, neutral, only, renamed

WEIGHTS = "params.safetensors"
NAMES = {"W_enc": "w_enc'", "W_dec": "w_dec", "b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"}


def read(folder: Path, source: str) -> Parts:
    """Read the SAE in a params.safetensors. Raises ValueError for a transcoder, and for a damaged one."""
    tensors = untrusted.safetensors(folder / WEIGHTS)
    if "affine_skip_connection" in tensors:
        where = f"{WEIGHTS}: affine_skip_connection"
        raise invalid(where, "there", "the tensors of an SAE", "a transcoder is no SAE")
    only(tensors, NAMES.values(), WEIGHTS)
    if (folder / "config.json").exists():
        _check(untrusted.json_object(folder / "config.json"))
    ours = renamed(tensors, NAMES, WEIGHTS)
    d_sae, d_in = matrix_shape(ours["W_enc"], f"{WEIGHTS}: w_enc")
    config = {"site": _site(source), "model": _model(source)}
    return Parts("jump_relu", d_in, d_sae, {}, ours, WEIGHTS, False, config, names=NAMES)


def _check(config: dict[str, Any]) -> None:
    """Refuse what a config.json says of anything but a JumpReLU SAE."""
    point = config.get("hf_hook_point_in")
    neutral(config, "config.json", "a transcoder is no SAE", affine_connection=False, hf_hook_point_out=point)
    neutral(config, "config.json", "it is not computed here", architecture="jump_relu")


def _site(source: str) -> str | None:
    found = re.search(r"(?:^|/)(resid_post|mlp_out|attn_out)(?:_all)?/layer_(\d{1,3})_", source)
    if found is None:
        return None
    # "attn_out" is what enters the output projection, which is read nowhere here
    return f"blocks.{found[2]}.attn.hook_z" if found[1] == "attn_out" else f"{found[1]}.{found[2]}"


def _model(source: str) -> str | None:
    found = re.search(r"\bgemma-scope-2-(\d+[mb])-(pt|it)\b", source)
    if found is None:
        return None
    plain = found[2] == "pt" and found[1] == "270m"  # the one whose name on the hub has no -pt
    return f"google/gemma-3-{found[1]}" if plain else f"google/gemma-3-{found[1]}-{found[2]}"
