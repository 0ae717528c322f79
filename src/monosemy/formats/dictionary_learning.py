"""dictionary_learning's folders: `ae.pt`, a state dict of one of its classes, and `config.json` with a "trainer" entry.

Weights there are [out, in] as nn.Linear keeps them: encoder.weight [F, D], decoder.weight [D, F]; JumpReLU and Matryoshka keep
W_enc [D, F] and W_dec [F, D]. D d_in, F d_sae.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from monosemy.config import invalid
from monosemy.sae import SAE, architecture


@dataclass(frozen=True)
class _Layout:
    """How one architecture is written: the names of its classes, and of its tensors ("'" marks a transposed one)."""

    trainer_class: str
    dict_class: str
    tensors: dict[str, str]
    wandb_name: str
    settings: dict[str, str]  # ours -> the trainer's


_LINEAR = {"W_enc_FD": "encoder.weight", "W_dec_FD": "decoder.weight'"}
_RELU = _LINEAR | {"b_enc_F": "encoder.bias", "b_dec_D": "bias"}
_TOPK = _LINEAR | {"b_enc_F": "encoder.bias", "b_dec_D": "b_dec", "threshold": "threshold"}
_PLAIN = {"W_enc_FD": "W_enc'", "W_dec_FD": "W_dec", "b_enc_F": "b_enc", "b_dec_D": "b_dec"}
_GATED = _LINEAR | {"b_enc_F": "gate_bias", "b_mag_F": "mag_bias", "r_mag_F": "r_mag", "b_dec_D": "decoder_bias"}
_K = {"k": "k", "auxk_alpha": "auxk_alpha"}

LAYOUTS = {
    "standard": _Layout("StandardTrainer", "AutoEncoder", _RELU, "StandardTrainer", {"l1_penalty": "l1_penalty"}),
    "standard_new": _Layout("StandardTrainerAprilUpdate", "AutoEncoder", _RELU, "StandardTrainerAprilUpdate", {"l1_penalty": "l1_penalty"}),
    "p_anneal": _Layout(
        "PAnnealTrainer",
        "AutoEncoder",
        _RELU,
        "PAnnealTrainer",
        {"initial_sparsity_penalty": "sparsity_penalty"}
        | {n: n for n in ("p_start", "p_end", "sparsity_queue_length", "n_sparsity_updates")},
    ),
    "gated": _Layout("GatedSAETrainer", "GatedAutoEncoder", _GATED, "GatedSAETrainer", {"l1_penalty": "l1_penalty"}),
    "top_k": _Layout("TopKTrainer", "AutoEncoderTopK", _TOPK, "AutoEncoderTopK", _K),
    "batch_top_k": _Layout("BatchTopKTrainer", "BatchTopKSAE", _TOPK, "BatchTopKSAE", _K),
    "matryoshka_batch_top_k": _Layout(
        "MatryoshkaBatchTopKTrainer",
        "MatryoshkaBatchTopKSAE",
        _PLAIN | {"threshold": "threshold"},
        "MatryoshkaBatchTopKSAE",
        _K | {"group_fractions": "group_fractions"},
    ),
    "jump_relu": _Layout(
        "JumpReluTrainer",
        "JumpReluAutoEncoder",
        _PLAIN | {"threshold_F": "threshold"},
        "JumpRelu",
        {n: n for n in ("target_l0", "sparsity_penalty", "bandwidth")},
    ),
}


def state_dict(sae: SAE) -> dict[str, Tensor]:
    """The SAE's tensors under the names and in the shapes of dictionary_learning's class."""
    layout, ours = LAYOUTS[sae.name], sae.state_dict()
    state = {
        theirs.rstrip("'"): (ours[name].T if theirs.endswith("'") else ours[name]).detach().contiguous().clone()
        for name, theirs in layout.tensors.items()
    }
    if "k" in layout.settings:
        state["k"] = torch.tensor(sae.settings.k, dtype=torch.int)
    if sae.name == "matryoshka_batch_top_k":
        state["group_sizes"] = torch.tensor(sae.group_sizes)
    return state


def load_state(sae: SAE, state: dict[str, Tensor]) -> None:
    """Copy tensors of dictionary_learning's class into the SAE. Raises ValueError where one is missing or has another shape."""
    for name, theirs in LAYOUTS[sae.name].tensors.items():
        target = sae.get_parameter(name) if name in dict(sae.named_parameters()) else sae.get_buffer(name)
        source = state.get(theirs.rstrip("'"))
        source = source.T if isinstance(source, Tensor) and theirs.endswith("'") else source
        if not isinstance(source, Tensor) or source.shape != target.shape:
            found = "missing" if source is None else f"of shape {tuple(getattr(source, 'shape', ()))}"
            raise invalid(
                f"ae.pt: {theirs.rstrip(chr(39))}",
                found,
                f"a tensor of shape {tuple(target.shape)}",
                "check that config.json belongs to this file",
            )
        target.data.copy_(source)


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
    """The "trainer" entry of config.json, with the keys that the architecture's trainer writes and those that it forgets."""
    layout = LAYOUTS[sae.name]
    config: dict[str, Any] = {
        "trainer_class": layout.trainer_class,
        "dict_class": layout.dict_class,
        "activation_dim": sae.d_in,
        "dict_size": sae.d_sae,
        "lr": lr,
        "seed": seed,
        "steps": steps,
        "layer": layer,
        "lm_name": lm_name,
        "wandb_name": layout.wandb_name,
        "submodule_name": submodule_name,
        "device": device,
        "warmup_steps": schedule["warmup_steps"],
        "decay_start": schedule["decay_start"],
    }
    for ours, theirs in layout.settings.items():
        value = getattr(sae.settings, ours)
        config[theirs] = list(value) if isinstance(value, tuple) else value
    if sae.modes == ("threshold", "top_k"):
        config |= {"threshold_beta": schedule["threshold_beta"], "threshold_start_step": schedule["threshold_start_step"]}
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


def from_folder(config: dict[str, Any], state: dict[str, Tensor]) -> SAE:
    """The SAE that a config.json and an ae.pt describe. Raises ValueError for a class that is not known."""
    trainer = config.get("trainer") if isinstance(config, dict) else None
    trainer = trainer if isinstance(trainer, dict) else {}
    by_class = {layout.trainer_class: name for name, layout in LAYOUTS.items()}
    name = by_class.get(str(trainer.get("trainer_class")))
    if name is None:
        raise invalid("config.json: trainer_class", trainer.get("trainer_class"), ", ".join(by_class), "check that this is an SAE's folder")
    layout = LAYOUTS[name]
    settings = {ours: trainer[theirs] for ours, theirs in layout.settings.items() if theirs in trainer}
    settings = {ours: tuple(value) if isinstance(value, list) else value for ours, value in settings.items()}
    try:
        sae = architecture(name)(int(trainer["activation_dim"]), int(trainer["dict_size"]), **settings)
    except (KeyError, TypeError, ValueError) as error:
        raise invalid(
            "config.json: trainer", layout.trainer_class, "the entry that its trainer wrote", f"copy the folder again ({error})"
        ) from error
    load_state(sae, state)
    if sae.constraint == "free":
        sae.unit_decoder_()
    return sae.requires_grad_(False).eval()
