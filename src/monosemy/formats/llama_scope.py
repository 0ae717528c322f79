"""Llama Scope's folders: JumpReLU SAEs of activations scaled to a mean norm of sqrt(D).

checkpoints/final.safetensors  hyperparams.json  one threshold for all latents, for activations as they are
sae_weights.safetensors        config.json       R1's: the logarithm of each latent's threshold, scaled

The weights are [out, in], as nn.Linear keeps them. Latents come out as the authors have them at inference: in
the scale of the raw activations, and for decoder rows of length 1 where thresholds are compared with latents
times that length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from monosemy.errors import invalid
from monosemy.formats import untrusted
from monosemy.formats.parts import (
    Names,
    Parts,
    Stored,
    dtype_of,
    neutral,
    only,
    renamed,
    site_of,
    stored,
    whole,
)

NAMES: Names = {
    "W_enc": "encoder.weight",
    "W_dec": Stored("decoder.weight", transposed=True),
    "b_enc": "encoder.bias",
    "b_dec": "decoder.bias",
}
LOG_THRESHOLD = "log_jumprelu_threshold"
NORM = "dataset_average_activation_norm"
MODELS = {
    "Llama3_1-8B-Base": "meta-llama/Llama-3.1-8B",
    "Llama-Scope-R1-Distill": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
}


def read(folder: Path, source: str) -> Parts:
    """Read the SAE in a folder of either kind. Raises ValueError for a transcoder, and other activations."""
    r1 = not (folder / "hyperparams.json").is_file()
    where = "config.json" if r1 else "hyperparams.json"
    weights = "sae_weights.safetensors" if r1 else "final.safetensors"
    config = untrusted.json_object(folder / where)
    _check(config, where)
    tensors = untrusted.safetensors(folder / weights if r1 else folder / "checkpoints" / weights)
    norms = {name: tensors.pop(name) for name in list(tensors) if name.startswith(f"{NORM}.")}
    names = NAMES | ({"threshold": LOG_THRESHOLD} if r1 else {})
    only(tensors, names.values(), weights)
    ours = renamed(tensors, names, weights)
    d_in, d_sae = _sizes(config, ours, where)
    scale = _scale(config, norms, d_in, where)
    threshold_F = ours["threshold"].float().exp() / scale if r1 else _threshold(config, where).expand(d_sae)
    metadata = {
        "site": site_of(config.get("hook_point_in")),
        "model": next((model for name, model in MODELS.items() if name in source), None),
        "dtype": dtype_of(tensors),
    }
    folded = _folded(ours, scale, config.get("sparsity_include_decoder_norm") is not False)
    pre_bias = config.get("apply_decoder_bias_to_pre_encoder") is True
    return Parts(
        "jump_relu",
        d_in,
        d_sae,
        {},
        folded | {"threshold": threshold_F},
        weights,
        pre_bias,
        metadata,
        names=names,
    )


def _sizes(config: Mapping[str, Any], ours: Mapping[str, Tensor], where: str) -> tuple[int, int]:
    """D and F, which the weights must have before they are multiplied."""
    d_in = whole(config, "d_model", where)
    stated = "d_sae" in config
    d_sae = whole(config, "d_sae", where) if stated else d_in * whole(config, "expansion_factor", where)
    for name, shape in {"W_enc": (d_sae, d_in), "W_dec": (d_sae, d_in), "b_enc": (d_sae,)}.items():
        if ours[name].shape != shape:
            allowed = f"{shape}, by {where}"
            raise invalid(stored(NAMES[name]).name, tuple(ours[name].shape), allowed, "copy both files again")
    return d_in, d_sae


def _check(config: Mapping[str, Any], where: str) -> None:
    """Refuse what is no JumpReLU SAE of the kind that is computed here."""
    if config.get("act_fn") != "jumprelu":
        found = str(config.get("act_fn"))[:80]
        raise invalid(f"{where}: act_fn", found, "jumprelu", "others are not read here")
    neutral(config, where, "its transcoders are not read here", hook_point_out=config.get("hook_point_in"))
    reason = "it is not computed here"
    neutral(config, where, reason, sae_type="sae", use_glu_encoder=False, use_decoder_bias=True)
    for key in ("sparsity_include_decoder_norm", "apply_decoder_bias_to_pre_encoder"):
        if not isinstance(config.get(key, True), bool):
            raise invalid(f"{where}: {key}", str(config[key])[:80], "true or false", "copy the folder again")


def _scale(config: Mapping[str, Any], norms: Mapping[str, Tensor], d_in: int, where: str) -> float:
    """Return what activations are multiplied with before they are encoded."""
    kind = config.get("norm_activation")
    if kind == "inference":
        return 1.0
    if kind != "dataset-wise":
        allowed, reason = "dataset-wise or inference", "others differ for each token or batch"
        raise invalid(f"{where}: norm_activation", str(kind)[:80], allowed, reason)
    stated = config.get(NORM)
    if isinstance(stated, dict):
        found = [stated[side] for side in ("in", "out") if side in stated]
    else:
        points = (config.get("hook_point_in"), config.get("hook_point_out"))
        found = [norms[f"{NORM}.{point}"] for point in points if f"{NORM}.{point}" in norms]
    values = [_number(value) for value in found]
    if not values or not all(0 < value < math.inf for value in values):
        remedy = "the scale of its activations stands there alone"
        raise invalid(f"{where}: {NORM}", str(values)[:80] if values else None, "a number above 0", remedy)
    if len(set(values)) > 1:
        allowed = "one norm of input and output"
        raise invalid(f"{where}: {NORM}", str(values)[:80], allowed, "its transcoders are not read here")
    return float(math.sqrt(d_in) / values[0])


def _threshold(config: Mapping[str, Any], where: str) -> Tensor:
    value = _number(config.get("jump_relu_threshold"))
    if not 0 <= value < math.inf:
        found, field = str(config.get("jump_relu_threshold"))[:80], f"{where}: jump_relu_threshold"
        raise invalid(field, found, "a number of at least 0", "copy the folder again")
    return torch.tensor(value)


def _number(value: Any) -> float:
    """Return a number, or NaN for anything else."""
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 else math.nan
    return float(value) if type(value) in (int, float) and abs(value) < 1e30 else math.nan


def _folded(ours: dict[str, Tensor], scale: float, by_norm: bool) -> dict[str, Tensor]:
    """Return the same SAE for raw activations, its decoder's norms in the encoder if `by_norm`."""
    W_enc, W_dec, b_enc, b_dec = (ours[name].float() for name in ("W_enc", "W_dec", "b_enc", "b_dec"))
    norm_F = torch.linalg.vector_norm(W_dec, dim=1) if by_norm else torch.ones(len(W_dec))
    return {
        "W_enc": W_enc * norm_F[:, None],
        "W_dec": W_dec / torch.where(norm_F > 0, norm_F, 1)[:, None],
        "b_enc": b_enc * norm_F / scale,
        "b_dec": b_dec / scale,
    }
