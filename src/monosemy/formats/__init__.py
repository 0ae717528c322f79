"""The folder of an SAE: written once here, and read from ours and from others' layouts.

sae.safetensors  config.json     ours; config.json also has the "trainer" and "buffer" entries of dictionary_learning
ae.pt                            the same SAE as dictionary_learning's state dict
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from monosemy.config import invalid
from monosemy.formats import dictionary_learning
from monosemy.sae import SAE, architecture

FORMATS = ("monosemy", "dictionary_learning")


def save(sae: SAE, folder: str | Path, config: dict[str, Any]) -> None:
    """Write a finished SAE with its configuration; each file is written beside and renamed, config.json last."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(sae.settings).items()}
    ours = {"format": "monosemy", "version": 1, "architecture": sae.name, "d_in": sae.d_in, "d_sae": sae.d_sae, "settings": settings}
    save_file({name: tensor.contiguous() for name, tensor in sae.state_dict().items()}, _beside(folder / "sae.safetensors"))
    _beside(folder / "sae.safetensors").replace(folder / "sae.safetensors")
    if sae.name in dictionary_learning.LAYOUTS:
        torch.save(dictionary_learning.state_dict(sae), _beside(folder / "ae.pt"))
        _beside(folder / "ae.pt").replace(folder / "ae.pt")
    write_json(folder / "config.json", ours | config)


def load(folder: str | Path, format: str | None = None, *, unfinished: bool = False) -> SAE:
    """The SAE in a folder, for raw activations [.., d_in], in evaluation mode on the CPU.

    Without `format` only layouts that need no unpickling are looked for; "dictionary_learning" opens its `ae.pt`, restricted to tensors.
    Raises ValueError for a folder that holds no SAE or a damaged one, and for one of a run that did not complete unless `unfinished`.
    """
    folder = Path(folder)
    if format is not None and format not in FORMATS:
        raise invalid("format", format, ", ".join(FORMATS), "leave it out to have it detected")
    config = _read_config(folder)
    status = config.get("status", "complete")
    if status != "complete" and not unfinished:
        raise invalid(
            "folder", str(folder), "an SAE whose training is complete", f"this one is {status}; pass unfinished=True to take it as it is"
        )
    if format == "dictionary_learning":
        return dictionary_learning.from_folder(config, _unpickle(folder / "ae.pt"))
    if not (folder / "sae.safetensors").exists():
        if (folder / "ae.pt").exists():
            raise invalid(
                "format",
                format,
                '"dictionary_learning" for a folder with an ae.pt',
                'pass format="dictionary_learning" if you trust where it comes from',
            )
        raise invalid(
            "folder",
            str(folder),
            "a folder with sae.safetensors and config.json",
            "name an SAE's own folder, such as RUN/resid_post_layer_3/trainer_0",
        )
    return _native(folder, config)


def _native(folder: Path, config: dict[str, Any]) -> SAE:
    path = folder / "sae.safetensors"
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise invalid("sae.safetensors", str(path), "a whole safetensors file", f"copy it again ({error})") from error
    try:
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in config["settings"].items()}
        sae = architecture(str(config["architecture"]))(int(config["d_in"]), int(config["d_sae"]), **settings)
        sae.load_state_dict(tensors)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise invalid(
            "config.json", str(folder / "config.json"), "the configuration that was saved with these weights", f"copy both again ({error})"
        ) from error
    return sae.requires_grad_(False).eval()


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise invalid("folder", str(folder), "a folder with a config.json", f"name an SAE's own folder ({error})") from error
    if not isinstance(config, dict):
        raise invalid("config.json", str(path), "a JSON object", "copy it again")
    return config


def _unpickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise invalid("ae.pt", str(path), "a state dict of tensors and nothing else", f"check where it comes from ({error})") from error
    if not isinstance(state, dict):
        raise invalid("ae.pt", str(path), "a state dict of tensors", "check where it comes from")
    return state


def write_json(path: Path, value: Any) -> None:
    """Write JSON beside and rename, so that a reader sees the old file or the new one."""
    _beside(path).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _beside(path).replace(path)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")
