"""sparsify's folders: `sae.safetensors` and `cfg.json`, as its `SparseCoder.load_from_disk` opens them.

It keeps the k largest of each token and nothing else; with k of all latents that is a ReLU. Both weights are
[F, D] there, as it has one width for what a transcoder reads and what it writes; W_skip is [D, D].
"""

from __future__ import annotations

import copy
import json
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors.torch import save_file

from monosemy.errors import invalid
from monosemy.formats import untrusted
from monosemy.formats.parts import (
    RELU,
    Names,
    Parts,
    dtype_of,
    flag,
    module_site,
    neutral,
    only,
    renamed,
    whole,
    written,
)
from monosemy.sae import SAE
from monosemy.transcoder import Transcoder

FILES = ("sae.safetensors", "cfg.json")
NAMES: Names = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}


def read(folder: Path, source: str) -> Parts:
    """Return the SAE or transcoder in one of sparsify's folders.

    Raises ValueError for a skip connection of an autoencoder, and for selections that are not computed here.
    """
    cfg = untrusted.json_object(folder / "cfg.json")
    neutral(cfg, "cfg.json", "an SAE here keeps the k largest", activation="topk", signed=False)
    transcode, skip = (flag(cfg, name, "cfg.json") for name in ("transcode", "skip_connection"))
    if skip and not transcode:
        reason = "no autoencoder here adds a linear map of x"
        raise invalid("cfg.json: skip_connection", True, "false without transcode", reason)
    names = NAMES | ({"W_skip": "W_skip"} if skip else {})
    d_in = whole(cfg, "d_in", "cfg.json")
    d_sae = (
        whole(cfg, "num_latents", "cfg.json")
        if cfg.get("num_latents")
        else d_in * whole(cfg, "expansion_factor", "cfg.json")
    )
    tensors = untrusted.safetensors(folder / "sae.safetensors")
    only(tensors, names.values(), "sae.safetensors")
    return Parts(
        "top_k",
        d_in,
        d_sae,
        {"k": whole(cfg, "k", "cfg.json")},
        renamed(tensors, names, "sae.safetensors"),
        "sae.safetensors",
        not transcode,
        {
            "site": module_site(PurePosixPath(source), transcode),
            "model": None,
            "dtype": dtype_of(tensors),
            "origin": {"format": "sparsify", "config": cfg},
        },
        optional=("threshold",),
        names=names,
        transcode=transcode,
        skip_connection=skip,
    )


def write(sae: SAE, config: dict[str, Any], folder: Path) -> None:
    """Write an SAE as sparsify would. Raises ValueError for one that it would compute differently."""
    thresholds = [sae.state_dict()["threshold"]] if "threshold" in sae.state_dict() else []
    relu = sae.name in RELU or (bool(thresholds) and all(bool((t <= 0).all()) for t in thresholds))
    if sae.name != "top_k" and not relu:
        reason = (
            "sparsify keeps the k largest of each token: it has no thresholds, gates or selections "
            "over a batch"
        )
        raise invalid(
            "architecture",
            sae.name,
            f"for sparsify: top_k, {', '.join(RELU)}, or thresholds of at most 0",
            reason,
        )
    transcode = isinstance(sae, Transcoder)
    skip = isinstance(sae, Transcoder) and sae.skip_connection
    if sae.d_out != sae.d_in:
        reason = "sparsify has one width for what a transcoder reads and what it writes"
        raise invalid("d_out", sae.d_out, f"{sae.d_in}, its d_in, for sparsify", reason)
    if not transcode and not sae.pre_bias:
        sae = copy.deepcopy(sae)
        sae.set_pre_bias_(True)
    names = NAMES | ({"W_skip": "W_skip"} if skip else {})
    save_file(written(sae, names, config.get("dtype")), folder / "sae.safetensors")
    origin = config.get("origin", {})
    cfg = {
        "activation": "topk",
        "expansion_factor": max(sae.d_sae // sae.d_in, 1),
        "normalize_decoder": True,
        "num_latents": sae.d_sae,
        "k": sae.settings.k if sae.name == "top_k" else sae.d_sae,
        "multi_topk": False,
        "skip_connection": skip,
        "transcode": transcode,
        "d_in": sae.d_in,
    }
    cfg = dict(origin["config"]) if origin.get("format") == "sparsify" else cfg
    (folder / "cfg.json").write_text(json.dumps(cfg), encoding="utf-8")
