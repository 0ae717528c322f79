"""Gemma Scope 2's `params.safetensors`: JumpReLU SAEs whose encoder sees x itself.

w_enc is [D, F] and w_dec [F, D]. A config.json lies beside some of them; layer, place and model stand in
the path: `google/gemma-scope-2-1b-pt/resid_post/layer_13_width_16k_l0_small`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from monosemy.errors import invalid
from monosemy.formats import untrusted
from monosemy.formats.gemma_scope import LOWER as NAMES
from monosemy.formats.parts import Parts, matrix_shape, neutral, only, renamed

WEIGHTS = "params.safetensors"
# the last place is read nowhere here
PLACES = {"resid_post": "resid_post.{}", "mlp_out": "mlp_out.{}", "attn_out": "blocks.{}.attn.hook_z"}
HOOKS = {
    "output": "resid_post",
    "post_feedforward_layernorm.output": "mlp_out",
    "self_attn.o_proj.input": "attn_out",
}


def read(folder: Path, source: str) -> Parts:
    """Read the SAE in a params.safetensors. Raises ValueError for a transcoder, and for a damaged one."""
    tensors = untrusted.safetensors(folder / WEIGHTS)
    if "affine_skip_connection" in tensors:
        where = f"{WEIGHTS}: affine_skip_connection"
        raise invalid(where, "there", "the tensors of an SAE", "a transcoder is no SAE")
    only(tensors, NAMES.values(), WEIGHTS)
    metadata = untrusted.json_object(folder / "config.json") if (folder / "config.json").exists() else {}
    _check(metadata)
    ours = renamed(tensors, NAMES, WEIGHTS)
    d_sae, d_in = matrix_shape(ours["W_enc"], f"{WEIGHTS}: w_enc")
    config = {"site": _site(metadata.get("hf_hook_point_in"), source), "model": _model(source)}
    return Parts("jump_relu", d_in, d_sae, {}, ours, WEIGHTS, False, config, names=NAMES)


def _check(config: dict[str, Any]) -> None:
    """Refuse what a config.json says of anything but a JumpReLU SAE."""
    point = config.get("hf_hook_point_in")
    neutral(config, "config.json", "a transcoder is no SAE", affine_connection=False, hf_hook_point_out=point)
    neutral(config, "config.json", "it is not computed here", architecture="jump_relu", type="sae")


def _site(hook: Any, source: str) -> str | None:
    """Return where it reads, by its config.json and by its path. Raises ValueError where they differ."""
    named = re.search(r"(?:^|/)(resid_post|mlp_out|attn_out)(?:_all)?/layer_(\d{1,3})_", source)
    match = re.fullmatch(r"model\.(?:language_model\.)?layers\.(\d{1,3})\.([\w.]{1,80})", str(hook)[:200])
    by_path = PLACES[named[1]].format(named[2]) if named else None
    by_config = PLACES[HOOKS[match[2]]].format(match[1]) if match and match[2] in HOOKS else None
    if by_path and by_config and by_path != by_config:
        allowed = f"{by_path}, as in its path"
        raise invalid("config.json: hf_hook_point_in", str(hook)[:80], allowed, "copy both files again")
    return by_config or by_path


def _model(source: str) -> str | None:
    found = re.search(r"\bgemma-scope-2-(\d+[mb])-(pt|it)\b", source)
    if found is None:
        return None
    plain = found[2] == "pt" and found[1] == "270m"  # the one whose name on the hub has no -pt
    return f"google/gemma-3-{found[1]}" if plain else f"google/gemma-3-{found[1]}-{found[2]}"
