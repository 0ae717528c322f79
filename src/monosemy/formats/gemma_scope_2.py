"""Gemma Scope 2's `params.safetensors`: JumpReLU SAEs and transcoders whose encoder sees x itself.

w_enc is [D, F] and w_dec [F, D]. Transcoders go from what an MLP reads to what it adds to the residual
stream; some have affine_skip_connection, [D, D], from input to output. A config.json lies beside some of
them; layer, place and model stand in the path, `google/gemma-scope-2-1b-pt/FOLDER`, such as
`resid_post/layer_13_width_16k_l0_small` or `transcoder_all/layer_3_width_16k_l0_big_affine`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from monosemy.errors import invalid
from monosemy.formats import untrusted
from monosemy.formats.gemma_scope import LOWER as NAMES
from monosemy.formats.parts import Parts, Stored, flag, matrix_shape, neutral, only, pair, renamed

WEIGHTS = "params.safetensors"
SKIP = Stored("affine_skip_connection", transposed=True)
# attn_out is read nowhere here
PLACES = {
    "resid_post": "resid_post.{0}",
    "mlp_out": "mlp_out.{0}",
    "attn_out": "blocks.{0}.attn.hook_z",
    "transcoder": "mlp_in.{0}:mlp_out.{0}",
}
HOOKS = {
    "output": "resid_post.{0}",
    "post_feedforward_layernorm.output": "mlp_out.{0}",
    "self_attn.o_proj.input": "blocks.{0}.attn.hook_z",
    "pre_feedforward_layernorm.output": "mlp_in.{0}",
}
IN_PATH = re.compile(rf"(?:^|/)({'|'.join(PLACES)})(?:_all)?/layer_(\d{{1,3}})_")


def read(folder: Path, source: str) -> Parts:
    """Read the SAE or transcoder in a params.safetensors. Raises ValueError for a damaged one, and where its
    config.json says another kind than its path or its tensors."""
    tensors = untrusted.safetensors(folder / WEIGHTS)
    metadata = untrusted.json_object(folder / "config.json") if (folder / "config.json").exists() else {}
    transcode = _transcodes(metadata, source, SKIP.name in tensors)
    _check(metadata, transcode)
    stated = metadata.get("affine_connection") is not None
    skip = flag(metadata, "affine_connection", "config.json") if stated else SKIP.name in tensors
    names = NAMES | ({"W_skip": SKIP} if skip else {})
    only(tensors, names.values(), WEIGHTS)
    ours = renamed(tensors, names, WEIGHTS)
    d_sae, d_in = matrix_shape(ours["W_enc"], f"{WEIGHTS}: w_enc")
    _, d_out = matrix_shape(ours["W_dec"], f"{WEIGHTS}: w_dec")
    config = {"site": _site(metadata, source, transcode), "model": _model(source)}
    return Parts(
        "jump_relu",
        d_in,
        d_sae,
        {},
        ours,
        WEIGHTS,
        False,
        config,
        names=names,
        transcode=transcode,
        d_out=d_out if transcode else None,
        skip_connection=skip,
    )


def _transcodes(config: dict[str, Any], source: str, skips: bool) -> bool:
    """Return whether it is a transcoder, by its config.json, its path and its tensors.

    Raises ValueError where they differ.
    """
    point, kind = config.get("hf_hook_point_in"), config.get("type")
    other_end = config.get("hf_hook_point_out", point) not in (None, point)
    transcode = kind == "transcoder" or other_end or config.get("affine_connection") is True or skips
    named = IN_PATH.search(source)
    if named and transcode and named[1] != "transcoder":
        allowed = f"an SAE of {named[1]}, as in its path"
        raise invalid(WEIGHTS, "a transcoder's, by config.json or tensors", allowed, "copy both files again")
    return transcode or bool(named and named[1] == "transcoder")


def _check(config: dict[str, Any], transcode: bool) -> None:
    """Refuse what a config.json says of anything but a JumpReLU SAE, or a transcoder where it is one."""
    kind = "transcoder" if transcode else "sae"
    neutral(config, "config.json", "it is not computed here", architecture="jump_relu", type=kind)
    if transcode and config.get("hf_hook_point_out") is not None:
        point = config.get("hf_hook_point_in")
        if point == config["hf_hook_point_out"]:
            where = "config.json: hf_hook_point_out"
            raise invalid(
                where, str(point)[:80], "another place than hf_hook_point_in", "copy both files again"
            )


def _site(config: dict[str, Any], source: str, transcode: bool) -> str | None:
    """Return where it reads, SOURCE:TARGET of a transcoder, by its config.json and by its path.

    Raises ValueError where they differ.
    """
    named = IN_PATH.search(source)
    by_path = PLACES[named[1]].format(named[2]) if named else None
    by_config = _place(config.get("hf_hook_point_in"))
    if transcode:
        by_config = pair(by_config, _place(config.get("hf_hook_point_out")))
    if by_path and by_config and by_path != by_config:
        hook = str(config.get("hf_hook_point_in"))[:80]
        allowed = f"{by_path}, as in its path"
        raise invalid("config.json: hf_hook_point_in", hook, allowed, "copy both files again")
    return by_config or by_path


def _place(hook: Any) -> str | None:
    match = re.fullmatch(r"model\.(?:language_model\.)?layers\.(\d{1,3})\.([\w.]{1,80})", str(hook)[:200])
    return HOOKS[match[2]].format(match[1]) if match and match[2] in HOOKS else None


def _model(source: str) -> str | None:
    found = re.search(r"\bgemma-scope-2-(\d+[mb])-(pt|it)\b", source)
    if found is None:
        return None
    plain = found[2] == "pt" and found[1] == "270m"  # the one whose name on the hub has no -pt
    return f"google/gemma-3-{found[1]}" if plain else f"google/gemma-3-{found[1]}-{found[2]}"
