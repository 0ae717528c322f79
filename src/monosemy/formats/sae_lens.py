"""SAELens' folders: `sae_weights.safetensors` and `cfg.json`, as its `load_from_disk` opens them.

W_enc is [D, F] and W_dec [F, D] there. BatchTopK kinds are JumpReLU SAEs with the running threshold for every
latent, TopK keeps its k largest and has no threshold. Of a transcoder, which is a ReLU's or a JumpReLU's,
W_dec is [F, O] and W_skip [O, D], with O d_out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from monosemy.errors import invalid
from monosemy.formats import untrusted
from monosemy.formats.parts import (
    COLUMN_ENCODER,
    Names,
    Parts,
    dtype_of,
    halves,
    hook_name,
    neutral,
    only,
    pair,
    renamed,
    site_of,
    text,
    thresholds,
    whole,
    written,
)
from monosemy.sae import SAE
from monosemy.transcoder import Transcoder

FILES = ("sae_weights.safetensors", "cfg.json")
VERSION = "6.54.12"  # whose layout this is

_GATED: Names = COLUMN_ENCODER | {"b_enc": "b_gate", "b_mag": "b_mag", "r_mag": "r_mag"}
_JUMPRELU: Names = COLUMN_ENCODER | {"threshold": "threshold"}
_SKIP: Names = {"W_skip": "W_skip"}
NAMES: dict[str, Names] = {
    "standard": COLUMN_ENCODER,
    "gated": _GATED,
    "jumprelu": _JUMPRELU,
    "topk": COLUMN_ENCODER,
    "transcoder": COLUMN_ENCODER,
    "skip_transcoder": COLUMN_ENCODER | _SKIP,
    "jumprelu_transcoder": _JUMPRELU,
    "jumprelu_skip_transcoder": _JUMPRELU | _SKIP,
}
TRANSCODERS = tuple(name for name in NAMES if name.endswith("transcoder"))
TO_OURS = {
    "standard": "standard",
    "gated": "gated",
    "jumprelu": "jump_relu",
    "topk": "top_k",
    "transcoder": "standard",
    "skip_transcoder": "standard",
    "jumprelu_transcoder": "jump_relu",
    "jumprelu_skip_transcoder": "jump_relu",
}
TO_THEIRS = {
    "standard": "standard",
    "standard_new": "standard",
    "p_anneal": "standard",
    "gated": "gated",
    "top_k": "topk",
} | dict.fromkeys(("jump_relu", "jump_relu_tanh", "batch_top_k", "matryoshka_batch_top_k"), "jumprelu")


def read(folder: Path, source: str) -> Parts:
    """Return the SAE or transcoder in one of SAELens' folders, of version 6 or before.

    Raises ValueError for what is computed otherwise here.
    """
    cfg = untrusted.json_object(folder / "cfg.json")
    metadata = cfg | cfg["metadata"] if isinstance(cfg.get("metadata"), dict) else cfg
    theirs, k = _architecture(cfg, metadata)
    tensors = untrusted.safetensors(folder / "sae_weights.safetensors")
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        scale = tensors.pop(name, None)
        if scale is not None and not bool((scale == 1).all()):
            raise invalid(
                "sae_weights.safetensors",
                f"a {name}",
                "an SAE without one",
                "SAELens 6 has no use for it either: fold it in",
            )
    only(tensors, NAMES[theirs].values(), "sae_weights.safetensors")
    ours = renamed(tensors, NAMES[theirs], "sae_weights.safetensors")
    if cfg.get("rescale_acts_by_decoder_norm") and theirs == "topk":
        ours, cfg = _fold_norms(ours), cfg | {"rescale_acts_by_decoder_norm": False}
    transcode = theirs in TRANSCODERS
    pre_bias = cfg.get("apply_b_dec_to_input", not transcode)
    if not isinstance(pre_bias, bool):
        raise invalid(
            "cfg.json: apply_b_dec_to_input", str(pre_bias)[:80], "true or false", "copy the folder again"
        )
    return Parts(
        TO_OURS[theirs],
        whole(cfg, "d_in", "cfg.json"),
        whole(cfg, "d_sae", "cfg.json"),
        {} if k is None else {"k": k},
        ours,
        "sae_weights.safetensors",
        pre_bias,
        {
            "site": _site(metadata, transcode),
            "model": text(metadata.get("model_name")),
            "dtype": dtype_of(tensors),
            "origin": {"format": "sae_lens", "config": cfg},
        },
        optional=("threshold",) if theirs == "topk" else (),
        names=NAMES[theirs],
        transcode=transcode,
        d_out=whole(cfg, "d_out", "cfg.json") if transcode else None,
        skip_connection="W_skip" in NAMES[theirs],
    )


def write(sae: SAE, config: dict[str, Any], folder: Path) -> None:
    """Write an SAE or transcoder as SAELens would. Raises ValueError for one that it does not compute."""
    theirs = _theirs(sae)
    spread = "threshold" in NAMES[theirs] and not sae.state_dict()["threshold"].dim()
    names = {ours: name for ours, name in NAMES[theirs].items() if not (spread and ours == "threshold")}
    tensors = written(sae, names, None if spread else config.get("dtype"))
    if spread:
        tensors["threshold"] = sae.get_buffer("threshold").expand(sae.d_sae).contiguous()
    save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(
        json.dumps(_cfg(sae, config, theirs, tensors), indent=2), encoding="utf-8"
    )


def _theirs(sae: SAE) -> str:
    """Return which of NAMES computes what an SAE does. Raises ValueError where none does."""
    if not isinstance(sae, Transcoder):
        if sae.name not in TO_THEIRS:
            allowed = f"for sae_lens: {', '.join(TO_THEIRS)}"
            raise invalid("architecture", sae.name, allowed, "SAELens has no SAE that computes it")
        return TO_THEIRS[sae.name]
    kind = "skip_transcoder" if sae.skip_connection else "transcoder"
    return kind if thresholds(sae, "SAELens") is None else f"jumprelu_{kind}"


def _site(metadata: dict[str, Any], transcode: bool) -> str | None:
    source = site_of(metadata.get("hook_name", metadata.get("hook_point")))
    return pair(source, site_of(metadata.get("hook_name_out"))) if transcode else source


def _cfg(sae: SAE, config: dict[str, Any], theirs: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    origin = config.get("origin", {})
    if origin.get("format") == "sae_lens":
        return dict(origin["config"])
    metadata = {
        "sae_lens_version": VERSION,
        "sae_lens_training_version": None,
        "training_architecture": sae.name,
        "prepend_bos": True,
    }
    source, target = halves(config.get("site")) if isinstance(sae, Transcoder) else (config.get("site"), None)
    known = {
        "model_name": config.get("model"),
        "hook_name": hook_name(source),
        "hook_name_out": hook_name(target),
        "dataset_path": config.get("dataset"),
    }
    buffer = config.get("buffer")
    known["context_size"] = buffer.get("ctx_len") if isinstance(buffer, dict) else None
    return {
        "architecture": theirs,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        **({"d_out": sae.d_out} if isinstance(sae, Transcoder) else {}),
        "dtype": dtype_of(tensors),
        "device": "cpu",
        "apply_b_dec_to_input": sae.pre_bias,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **({"k": sae.settings.k, "rescale_acts_by_decoder_norm": False} if theirs == "topk" else {}),
        "metadata": metadata | {key: value for key, value in known.items() if value is not None},
    }


def _architecture(cfg: dict[str, Any], metadata: dict[str, Any]) -> tuple[str, int | None]:
    """Return which of NAMES it is, and its k. Raises ValueError for what is computed otherwise here."""
    theirs, k = _selection(cfg)
    if not isinstance(theirs, str) or theirs not in NAMES:
        allowed = f"{', '.join(NAMES)} (others are no SAE, or compute what none here does)"
        raise invalid(
            "cfg.json: architecture",
            str(theirs)[:80],
            allowed,
            "a training checkpoint is to be saved with save_inference_model",
        )
    normalized = cfg.get("normalize_activations")
    if normalized not in (None, False, "none"):
        remedy = "what is measured for each token anew cannot be folded in"
        if normalized in (True, "expected_average_only_in"):
            remedy = (
                "fold the factor in (norm_scaling_factor in SAELens' list): multiply W_enc, divide "
                "W_dec and b_dec by it"
            )
        allowed = '"none": an SAE of raw activations'
        raise invalid("cfg.json: normalize_activations", str(normalized)[:80], allowed, remedy)
    if theirs != "topk":
        neutral(cfg, "cfg.json", "it is not computed here", rescale_acts_by_decoder_norm=False)
    # heads side by side, which is how activations come here
    if theirs in TRANSCODERS or cfg.get("reshape_activations") != "hook_z":
        neutral(cfg, "cfg.json", "it is not computed here", reshape_activations="none")
    if theirs in TRANSCODERS:
        reason = "neither SAELens nor we subtract b_dec, which has the width of the output"
        neutral(cfg, "cfg.json", reason, apply_b_dec_to_input=False)
        return theirs, None
    same = {"d_out": cfg.get("d_in"), "hook_name_out": metadata.get("hook_name", metadata.get("hook_point"))}
    reason = f"a transcoder is called so there ({', '.join(TRANSCODERS)})"
    neutral(metadata, "cfg.json", reason, is_transcoder=False, **same)
    return theirs, whole({"k": k}, "k", "cfg.json") if theirs == "topk" else None


def _selection(cfg: dict[str, Any]) -> tuple[Any, Any]:
    """Architecture and k; before version 6 the name of an activation made a TopK SAE of a standard one."""
    theirs, k = cfg.get("architecture", "standard"), cfg.get("k")
    named = [cfg[key] for key in ("activation_fn", "activation_fn_str") if cfg.get(key) is not None]
    computed = ("relu", "topk") if theirs in ("standard", "topk") else ("relu",)
    for activation in named:
        if activation != named[0] or activation not in computed:
            allowed = "relu, or topk for a standard SAE"
            raise invalid("cfg.json: activation_fn", str(activation)[:80], allowed, "it is not computed here")
    if "topk" not in named:
        return theirs, k
    kwargs: Any = cfg.get("activation_fn_kwargs")
    plain = isinstance(kwargs, dict) and not kwargs.keys() - {"k", "signed"} and not kwargs.get("signed")
    if not plain or k not in (None, kwargs.get("k")):
        reason = "an SAE here keeps the k largest and takes a ReLU of them"
        raise invalid("cfg.json: activation_fn_kwargs", str(kwargs)[:80], 'an object with "k" alone', reason)
    return "topk", kwargs.get("k")


def _fold_norms(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the same TopK SAE with its decoder's norms in the encoder, by which SAELens selects where it
    rescales."""
    norm_F = torch.linalg.vector_norm(ours["W_dec"].float(), dim=-1)
    if (
        norm_F.shape != ours["b_enc"].shape
        or ours["W_enc"].shape != ours["W_dec"].shape
        or not bool((norm_F > 0).all())
    ):
        raise invalid(
            "sae_weights.safetensors: W_dec",
            tuple(norm_F.shape),
            "rows of a length above 0",
            "copy the folder again",
        )
    return ours | {
        "W_enc": ours["W_enc"].float() * norm_F[:, None],
        "b_enc": ours["b_enc"].float() * norm_F,
        "W_dec": ours["W_dec"].float() / norm_F[:, None],
    }
