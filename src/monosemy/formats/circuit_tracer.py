"""circuit-tracer's sets of transcoders: `config.yaml`, and `layer_{i}.safetensors` for every layer from 0.

W_enc and W_dec are [F, D] there, W_skip is [D, D], and activation_function.threshold [F] makes a JumpReLU of
a ReLU; D is the model's width, F d_sae. It has no TopK: those kinds are written with their running threshold.
Sets are written here and not read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from monosemy.cross_layer import CrossLayerTranscoder
from monosemy.errors import invalid
from monosemy.formats.parts import JUMP_RELU, RELU, Names, check_finite, halves, text, thresholds, written
from monosemy.lm.info import HOOKS
from monosemy.sae import SAE
from monosemy.system.files import new_folder
from monosemy.transcoder import Transcoder

VERSION = "0.5.0"  # whose layout this is
NAMES: Names = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
THRESHOLD = "activation_function.threshold"
SOURCES = ("resid_mid", "mlp_in")  # what it can read
TARGET = "mlp_out"


def write_set(
    saes: Mapping[int, tuple[SAE, Mapping[str, Any]]],
    folder: str | Path,
    model_name: str,
    scan: str | None = None,
) -> None:
    """Write the transcoders of a model's layers, each with its configuration, to a new folder.

    Each is looked up once, in the order of its layer, so that a mapping may load them one by one. `scan` is
    what circuit-tracer calls the set; the folder's name where nothing is given. Whether the model has more
    layers is for circuit-tracer to say.
    Raises ValueError for a layer that is missing or of another width or kind than layer 0, for a site that is
    not the layer's MLP, for autoencoders, for what is neither ReLU nor JumpReLU once trained, and for a
    folder that is not empty.
    """
    with writing_set(saes, folder, model_name, scan):
        pass


@contextmanager
def writing_set(
    saes: Mapping[int, tuple[SAE, Mapping[str, Any]]],
    folder: str | Path,
    model_name: str,
    scan: str | None = None,
) -> Iterator[Path]:
    """Write a set as `write_set` does, and yield the folder that becomes it, for what is to lie beside it."""
    if text(model_name) is None:
        raise invalid("model_name", model_name, "the model's name", "name it as TransformerLens does")
    _check_layers(saes)
    with new_folder(Path(folder)) as part:
        first: dict[str, Any] = {}
        for layer in range(len(saes)):
            sae, config = saes[layer]
            kind, tensors = _layer(layer, sae, config)
            _compare(kind, first, layer)
            first = first or kind
            save_file(tensors, part / f"layer_{layer}.safetensors")
        entries = {
            "model_name": model_name,
            "model_kind": "transcoder_set",
            "feature_input_hook": HOOKS[first["source"]],
            "feature_output_hook": HOOKS[TARGET],
            "scan": text(scan or Path(folder).absolute().name) or model_name,
        }
        _write_entries(part, entries)
        yield part


def write_clt(
    sae: CrossLayerTranscoder,
    config: Mapping[str, Any],
    folder: str | Path,
    model_name: str,
    scan: str | None = None,
) -> None:
    """Write a cross-layer transcoder to a new folder: `W_enc_{i}.safetensors` and `W_dec_{i}.safetensors` of
    each layer i from 0, the latter [F, L - i, D].

    `scan` is what circuit-tracer calls it; the folder's name where nothing is given. Raises ValueError for a
    site that is not the MLPs of layers 0, 1, .., for what is neither ReLU nor JumpReLU once trained, and for
    a folder that is not empty.
    """
    with writing_clt(sae, config, folder, model_name, scan):
        pass


@contextmanager
def writing_clt(
    sae: CrossLayerTranscoder,
    config: Mapping[str, Any],
    folder: str | Path,
    model_name: str,
    scan: str | None = None,
) -> Iterator[Path]:
    """Write a cross-layer transcoder as `write_clt` does, and yield the folder that becomes it, for what is
    to lie beside it."""
    if text(model_name) is None:
        raise invalid("model_name", model_name, "the model's name", "name it as TransformerLens does")
    sources, targets = (of or "" for of in halves(config.get("site")))
    row = rf"\.0-{sae.layers - 1}" if sae.layers > 2 else r"\.0\+{0}\.1"
    found = [kind for kind in SOURCES if re.fullmatch(kind + row.format(kind), sources)]
    if not found or not re.fullmatch(TARGET + row.format(TARGET), targets):
        allowed = f"{SOURCES[0]} or {SOURCES[1]} to {TARGET} of layers 0 to {sae.layers - 1}"
        remedy = "circuit-tracer replaces the MLP of each layer, from the first on"
        raise invalid("site", config.get("site"), allowed, remedy)
    check_finite(sae, "the cross-layer transcoder")
    thresholds_LF = _clt_thresholds(sae)
    b_enc_LF, b_dec_LD = sae.b_enc.view(sae.layers, -1), sae.b_dec.view(sae.layers, -1)
    with new_folder(Path(folder)) as part:
        for i, W_dec in enumerate(sae.decoders):
            tensors = {"W_enc": sae.encoders[i], "b_enc": b_enc_LF[i], "b_dec": b_dec_LD[i]}
            if thresholds_LF is not None:
                tensors["threshold"] = thresholds_LF[i]
            named = {f"{name}_{i}": tensor.detach().clone() for name, tensor in tensors.items()}
            save_file(named, part / f"W_enc_{i}.safetensors")
            decoder = W_dec.detach().view(sae.of_layer, sae.layers - i, sae.width).clone()
            save_file({f"W_dec_{i}": decoder}, part / f"W_dec_{i}.safetensors")
        entries = {
            "model_name": model_name,
            "model_kind": "cross_layer_transcoder",
            "feature_input_hook": HOOKS[found[0]],
            "feature_output_hook": HOOKS[TARGET],
            "scan": text(scan or Path(folder).absolute().name) or model_name,
        }
        _write_entries(part, entries)
        yield part


def _clt_thresholds(sae: CrossLayerTranscoder) -> Tensor | None:
    """Return each latent's threshold, [L, F]; None of a ReLU. Raises ValueError for other kinds."""
    if sae.name in RELU:
        return None
    if sae.name not in JUMP_RELU:
        allowed = f"for circuit-tracer: {', '.join(RELU + JUMP_RELU)}"
        raise invalid("architecture", sae.name, allowed, "it has none that computes it")
    threshold = sae.state_dict()["threshold"]
    if sae.always_sparse and (threshold < 0).any():
        allowed = "a running threshold of each layer, 0 or more"
        raise invalid("threshold", threshold.tolist(), allowed, "training sets it; no step did here")
    per_layer = threshold.clamp(min=0).view(sae.layers, -1)
    return per_layer.expand(-1, sae.of_layer)


def _write_entries(folder: Path, entries: Mapping[str, str]) -> None:
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in entries.items()]
    (folder / "config.yaml").write_text("".join(lines), encoding="utf-8")


def _check_layers(saes: Mapping[int, Any]) -> None:
    """Check that every layer from 0 to the last is there. Raises ValueError."""
    missing = sorted(set(range(max(saes, default=0) + 1)) - saes.keys())
    if missing or len(saes) != max(saes) + 1:
        there = ", ".join(map(str, sorted(saes))) or "none"
        allowed = f"every layer from 0 to the last (missing: {', '.join(map(str, missing)) or 'none'})"
        raise invalid("layers", there, allowed, "train a transcoder for each layer of the model")


def _layer(layer: int, sae: SAE, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what all layers have alike, and one layer's tensors. Raises ValueError."""
    if not isinstance(sae, Transcoder):
        allowed = "a transcoder, for circuit-tracer"
        raise invalid(f"layer {layer}", f"an autoencoder of {sae.name}", allowed, "train with transcode")
    if sae.d_in != sae.d_out:
        reason = "circuit-tracer has one width for what a transcoder reads and what it writes"
        raise invalid(f"layer {layer}: d_out", sae.d_out, f"{sae.d_in}, its d_in", reason)
    source, target = halves(config.get("site"))
    match = re.fullmatch(rf"({'|'.join(SOURCES)})\.{layer}", source or "")
    if match is None or target != f"{TARGET}.{layer}":
        allowed = " or ".join(f"{name}.{layer}:{TARGET}.{layer}" for name in SOURCES)
        remedy = "circuit-tracer replaces the MLP of each layer"
        raise invalid(f"layer {layer}: site", config.get("site"), allowed, remedy)
    check_finite(sae, f"layer {layer}")
    threshold_F = thresholds(sae, "circuit-tracer")
    tensors = written(sae, NAMES | ({"W_skip": "W_skip"} if sae.skip_connection else {}))
    if threshold_F is not None:
        # it takes no ReLU of what lies above: of a threshold below 0 that would be negative latents
        tensors[THRESHOLD] = threshold_F.detach().clamp(min=0)
    alike = {"source": match[1], "d_in": sae.d_in, "d_sae": sae.d_sae, "skip_connection": sae.skip_connection}
    return alike, tensors


def _compare(kind: Mapping[str, Any], first: Mapping[str, Any], layer: int) -> None:
    """Compare a layer's kind with layer 0's. Raises ValueError where they differ."""
    for name, value in first.items():
        if kind[name] != value:
            remedy = "a set is of one kind: take the transcoders of one setting"
            raise invalid(f"layer {layer}: {name}", kind[name], f"{value}, as of layer 0", remedy)
