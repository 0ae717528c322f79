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

from monosemy.errors import invalid
from monosemy.formats.parts import Names, check_finite, halves, text, thresholds, written
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
        lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in entries.items()]
        (part / "config.yaml").write_text("".join(lines), encoding="utf-8")
        yield part


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
