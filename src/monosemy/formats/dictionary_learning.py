"""dictionary_learning's folders: `ae.pt`, a state dict of one of its classes, and `config.json` with a
"trainer" entry.

Weights there are [out, in] as nn.Linear keeps them: encoder.weight [F, D], decoder.weight [D, F]; JumpReLU
and Matryoshka keep W_enc [D, F] and W_dec [F, D]. D d_in, F d_sae.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from monosemy.errors import invalid
from monosemy.formats import untrusted
from monosemy.formats.parts import (
    COLUMN_ENCODER,
    Names,
    Parts,
    Stored,
    dtype_of,
    only,
    renamed,
    text,
    whole,
    written,
)
from monosemy.lm.info import KINDS
from monosemy.sae import SAE
from monosemy.transcoder import Transcoder

FILES = ("ae.pt", "config.json")


@dataclass(frozen=True)
class _Layout:
    """How one architecture is written: the names of its classes, and of its tensors."""

    trainer_class: str
    dict_class: str
    tensors: Names
    wandb_name: str
    settings: dict[str, str]  # ours -> the trainer's


_LINEAR: Names = {"W_enc": "encoder.weight", "W_dec": Stored("decoder.weight", transposed=True)}
_RELU: Names = _LINEAR | {"b_enc": "encoder.bias", "b_dec": "bias"}
_TOPK: Names = _LINEAR | {"b_enc": "encoder.bias", "b_dec": "b_dec", "threshold": "threshold"}
# AutoEncoderNew: the ReLU autoencoder whose encoder sees x itself
_UNCENTERED: Names = _RELU | {"b_dec": "decoder.bias"}
_GATED: Names = _LINEAR | {
    "b_enc": "gate_bias",
    "b_mag": "mag_bias",
    "r_mag": "r_mag",
    "b_dec": "decoder_bias",
}
_K = {"k": "k", "auxk_alpha": "auxk_alpha"}

LAYOUTS = {
    "standard": _Layout(
        "StandardTrainer", "AutoEncoder", _RELU, "StandardTrainer", {"l1_penalty": "l1_penalty"}
    ),
    "standard_new": _Layout(
        "StandardTrainerAprilUpdate",
        "AutoEncoder",
        _RELU,
        "StandardTrainerAprilUpdate",
        {"l1_penalty": "l1_penalty"},
    ),
    "p_anneal": _Layout(
        "PAnnealTrainer",
        "AutoEncoder",
        _RELU,
        "PAnnealTrainer",
        {"initial_sparsity_penalty": "sparsity_penalty"}
        | {n: n for n in ("p_start", "p_end", "sparsity_queue_length", "n_sparsity_updates")},
    ),
    "gated": _Layout(
        "GatedSAETrainer", "GatedAutoEncoder", _GATED, "GatedSAETrainer", {"l1_penalty": "l1_penalty"}
    ),
    "top_k": _Layout("TopKTrainer", "AutoEncoderTopK", _TOPK, "AutoEncoderTopK", _K),
    "batch_top_k": _Layout("BatchTopKTrainer", "BatchTopKSAE", _TOPK, "BatchTopKSAE", _K),
    "matryoshka_batch_top_k": _Layout(
        "MatryoshkaBatchTopKTrainer",
        "MatryoshkaBatchTopKSAE",
        COLUMN_ENCODER | {"threshold": "threshold"},
        "MatryoshkaBatchTopKSAE",
        _K | {"group_fractions": "group_fractions"},
    ),
    "jump_relu": _Layout(
        "JumpReluTrainer",
        "JumpReluAutoEncoder",
        COLUMN_ENCODER | {"threshold": "threshold"},
        "JumpRelu",
        {n: n for n in ("target_l0", "sparsity_penalty", "bandwidth")},
    ),
}
# with the architectures of which it has the trained function, but no trainer
_WRITTEN = LAYOUTS | {"jump_relu_tanh": dataclasses.replace(LAYOUTS["jump_relu"], settings={})}


def has(sae: SAE) -> bool:
    """Tell whether dictionary_learning has a class for an SAE; it has one for autoencoders alone."""
    return sae.name in _WRITTEN and not sae.family


def state_dict(sae: SAE, dtype: str | None = None) -> dict[str, Tensor]:
    """Return the SAE's tensors under the names and in the shapes of dictionary_learning's class; in a narrow
    type where nothing is lost."""
    layout = _WRITTEN[sae.name]
    state = written(sae, layout.tensors if _as_layout(sae) else _UNCENTERED, dtype)
    if "k" in layout.settings:
        state["k"] = torch.tensor(sae.settings.k, dtype=torch.int)
    if sae.name == "matryoshka_batch_top_k":
        state["group_sizes"] = torch.tensor(sae.group_sizes)
    return state


def read(folder: Path, source: str) -> Parts:
    """Return the SAE that a config.json and an ae.pt describe.

    Raises ValueError for a class that is not known.
    """
    config = untrusted.json_object(folder / "config.json")
    trainer = config["trainer"] if isinstance(config.get("trainer"), dict) else {}
    name, layout = _layout(trainer)
    state = untrusted.state_dict(folder / "ae.pt")
    settings = {ours: trainer[theirs] for ours, theirs in layout.settings.items() if theirs in trainer}
    if "k" in state and state["k"].flatten().tolist() != [settings.get("k")]:
        raise invalid(
            "config.json: k",
            str(settings.get("k"))[:80],
            "the k that is in ae.pt",
            "check that config.json belongs to it",
        )
    names = (
        _UNCENTERED
        if trainer.get("dict_class") == "AutoEncoderNew" and layout.tensors is _RELU
        else layout.tensors
    )
    if name == "top_k" and "threshold" not in state:  # as before it had one: the k largest and no more
        names = {ours: theirs for ours, theirs in names.items() if ours != "threshold"}
    only(state, [*names.values(), *(("k", "group_sizes") if "k" in settings else ())], "ae.pt")
    tensors = renamed(state, names, "ae.pt")
    shared = {key: value for key, value in config.items() if key in ("status", "norm_factor")}
    shared |= {"site": _site(trainer), "model": text(trainer.get("lm_name")), "dtype": dtype_of(tensors)}
    return Parts(
        name,
        whole(trainer, "activation_dim", "config.json: trainer"),
        whole(trainer, "dict_size", "config.json: trainer"),
        settings,
        tensors,
        "ae.pt",
        False if names is _UNCENTERED else None,
        shared | {"origin": {"format": "dictionary_learning", "config": config}},
        optional=("coefficient", "queue", *(("threshold",) if name == "top_k" else ())),
        names=names,
    )


def write(sae: SAE, config: dict[str, Any], folder: Path) -> None:
    """Write an SAE as trainSAE would.

    Raises ValueError for one that dictionary_learning would compute differently.
    """
    if not has(sae):
        kind = f"transcoder of {sae.name}" if isinstance(sae, Transcoder) else sae.name
        allowed = f"for dictionary_learning: autoencoders of {', '.join(_WRITTEN)}"
        raise invalid("architecture", kind, allowed, "it has no class that computes it")
    layout = _WRITTEN[sae.name]
    if layout.tensors is not _RELU and not _as_layout(sae):
        sae = copy.deepcopy(sae)
        sae.set_pre_bias_(type(sae).pre_bias)
    if layout.tensors is _RELU and _as_layout(sae) and not bool((sae.W_dec != 0).any(1).all()):
        reason = "dictionary_learning divides by them when it opens the file, and gives NaN"
        raise invalid("W_dec", "rows of zeros", "decoder rows of a length above 0", reason)
    torch.save(state_dict(sae, config.get("dtype")), folder / "ae.pt")
    origin = config.get("origin", {})
    if origin.get("format") == "dictionary_learning":
        theirs = origin["config"]
    else:
        theirs = {key: config[key] for key in ("trainer", "buffer") if isinstance(config.get(key), dict)}
        metadata = {
            "lm_name": config.get("model"),
            "layer": _layer(config.get("site")),
            "submodule_name": _folder(config.get("site")),
        }
        theirs["trainer"] = entry(sae) | metadata | theirs.get("trainer", {})
    (folder / "config.json").write_text(json.dumps(theirs, indent=2), encoding="utf-8")


def entry(sae: SAE) -> dict[str, Any]:
    """Return what the "trainer" entry of config.json says of the SAE itself."""
    layout = _WRITTEN[sae.name]
    settings = {theirs: getattr(sae.settings, ours) for ours, theirs in layout.settings.items()}
    return {
        "trainer_class": layout.trainer_class,
        "dict_class": layout.dict_class
        if layout.tensors is not _RELU or _as_layout(sae)
        else "AutoEncoderNew",
        "activation_dim": sae.d_in,
        "dict_size": sae.d_sae,
        "wandb_name": layout.wandb_name,
        **{key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()},
    }


def trainer_config(
    sae: SAE,
    *,
    lr: float,
    seed: int,
    steps: int,
    schedule: dict[str, Any],
    layer: int | None,
    lm_name: str,
    submodule_name: str,
    device: str,
) -> dict[str, Any]:
    """Return the "trainer" entry of config.json, with the keys that the architecture's trainer writes and
    those that it forgets."""
    config = entry(sae) | {
        "lr": lr,
        "seed": seed,
        "steps": steps,
        "layer": layer,
        "lm_name": lm_name,
        "submodule_name": submodule_name,
        "device": device,
        "warmup_steps": schedule["warmup_steps"],
        "decay_start": schedule["decay_start"],
    }
    if "k" in _WRITTEN[sae.name].settings:
        config |= {
            "threshold_beta": schedule["threshold_beta"],
            "threshold_start_step": schedule["threshold_start_step"],
        }
        config |= {"top_k_aux": sae.d_in // 2} if sae.name != "top_k" else {}
    else:
        config["sparsity_warmup_steps"] = schedule["sparsity_warmup_steps"]
    if sae.name in ("standard", "p_anneal"):
        config["resample_steps"] = None
    if sae.name == "p_anneal":
        config |= {"sparsity_function": "Lp^p", "anneal_start": schedule["anneal_start"]}
    if sae.name == "matryoshka_batch_top_k":
        n = len(sae.settings.group_fractions)
        config |= {"group_sizes": sae.group_sizes, "group_weights": [1 / n] * n}
    return config


def _as_layout(sae: SAE) -> bool:
    """Whether the encoder sees what the class's does."""
    return sae.pre_bias == type(sae).pre_bias


def _layout(trainer: dict[str, Any]) -> tuple[str, _Layout]:
    """Return the architecture by its trainer's class, or where that is another's, by its dictionary's."""
    by_class = {layout.trainer_class: name for name, layout in LAYOUTS.items()}
    by_dict = {layout.dict_class: name for name, layout in LAYOUTS.items() if layout.tensors is not _RELU}
    by_dict |= {"AutoEncoder": "standard", "AutoEncoderNew": "standard_new"}
    name = by_class.get(str(trainer.get("trainer_class"))) or by_dict.get(str(trainer.get("dict_class")))
    if name is None:
        found = str(trainer.get("trainer_class"))[:80]
        raise invalid(
            "config.json: trainer_class", found, ", ".join(by_class), "check that this is an SAE's folder"
        )
    return name, LAYOUTS[name]


def _site(trainer: dict[str, Any]) -> str | None:
    if match := re.fullmatch(
        rf"({'|'.join(KINDS)})_layer_(\d{{1,4}})", str(trainer.get("submodule_name"))[:100]
    ):
        return f"{match[1]}.{match[2]}"
    layer = trainer.get("layer")
    return (
        f"resid_post.{layer}"
        if type(layer) is int and 0 <= layer < 10_000 and text(trainer.get("submodule_name")) is None
        else None
    )


def _layer(site: str | None) -> int | None:
    match = re.search(r"\.(\d+)(\.|$)", site or "")
    return int(match[1]) if match else None


def _folder(site: str | None) -> str | None:
    return re.sub(r"^(\w+)\.(\d+)$", r"\1_layer_\2", site) if site else None
