"""The folder of an SAE: ours, which is written and read, and those of other tools, which are read and written
in their own layout.

sae.safetensors  config.json  ours; config.json also has dictionary_learning's "trainer" and "buffer" entries
ae.pt                         beside it in a run, the same autoencoder as dictionary_learning's state dict
monosemy.json                 beside another tool's layout that was converted to: all that has no place in it
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from monosemy.errors import invalid
from monosemy.formats import (
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    goodfire,
    layouts,
    llama_scope,
    qwen_scope,
    sae_lens,
    sparsify,
    untrusted,
)
from monosemy.formats.layouts import KEPT
from monosemy.formats.parts import Parts, check_finite, flag, text, whole
from monosemy.former_names import current_names
from monosemy.sae import SAE
from monosemy.system.files import atomic_path, check_new, new_folder, write_json

_WRITTEN: dict[str, Any] = {
    "dictionary_learning": dictionary_learning,
    "sae_lens": sae_lens,
    "sparsify": sparsify,
}
_OTHERS = _WRITTEN | {
    "gemma_scope": gemma_scope,
    "gemma_scope_2": gemma_scope_2,
    "llama_scope": llama_scope,
    "qwen_scope": qwen_scope,
    "goodfire": goodfire,
}
FORMATS = ("native", *_OTHERS)
TARGETS = ("native", *_WRITTEN)

_ABOUT_THE_SAE = (
    "format",
    "version",
    "architecture",
    "d_in",
    "d_sae",
    "settings",
    "pre_bias",
    "transcode",
    "d_out",
    "skip_connection",
    "cross_layer",
    "crosscode",
    "widths",
    "mask",
    "dedicated_share",
    "files",
    "from",
    "tensors",
)


def save(sae: SAE, folder: str | Path, config: dict[str, Any]) -> None:
    """Write a finished SAE with its configuration; each file is written beside and renamed, config.json last.
    Raises DiskFull."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_tensors(sae, folder)
    if dictionary_learning.has(sae):
        with atomic_path(folder / "ae.pt", _bytes(sae)) as part:
            torch.save(dictionary_learning.state_dict(sae), part)
    write_json(folder / "config.json", _about(sae) | config)


def load(
    path: str | Path, format: str | None = None, *, unfinished: bool = False, source: str | None = None
) -> SAE:
    """Open an SAE of any layout, for raw activations [.., d_in], in evaluation mode on the CPU.

    `path` is a folder, or the file in layouts of one file for each SAE. Layouts are told apart by their
    files, none of which is unpickled; those that are pickles (dictionary_learning, qwen_scope, goodfire) open
    only where `format` names them, restricted to tensors. `source`, "OWNER/REPO/path/in/repo", is where a
    copy comes from: some layouts say model, layer or k in names alone.
    Raises ValueError for a folder that holds no SAE or a damaged one, for one that is computed otherwise
    here, and for one of a run that did not complete unless `unfinished`.
    """
    return read(path, format, unfinished=unfinished, source=source)[0]


def read(
    path: str | Path, format: str | None = None, *, unfinished: bool = False, source: str | None = None
) -> tuple[SAE, dict[str, Any]]:
    """Load an SAE, and return what its folder says of the SAE: its site, model, status, ... where known."""
    parts = _parts(Path(path), format, unfinished, source)
    sae = parts.build()
    if sae.constraint == "free":
        norm_F = sae.decoder_norms()
        if not ((norm_F == 0) | torch.isclose(norm_F, torch.ones(()), atol=1e-5)).all():
            sae.fold_decoder_norm_()
    sae.metadata = parts.config
    return sae, parts.config


def detect(path: str | Path, source: str | None = None) -> str:
    """Tell which of FORMATS a folder or file is, by names alone.

    Raises ValueError for none, and for a pickle, which is opened only where its format is named.
    """
    path = Path(path)
    found = _found(path, source)
    entry = _entry(path, found)
    if entry is None:
        raise _nothing(path, found)
    if entry.note:
        raise _closed(path, entry)
    if entry.named:
        remedy = f'pass format="{entry.format}" if you trust where it comes from (--format {entry.format})'
        raise invalid("format", None, f'"{entry.format}" for {entry.files[0]}, which is a pickle', remedy)
    return entry.format


def convert(
    path: str | Path,
    target: str | Path,
    to: str,
    *,
    format: str | None = None,
    unfinished: bool = False,
    source: str | None = None,
) -> None:
    """Write an SAE, given as `read` takes it, to a new folder in another tool's layout.

    What the layout has no place for goes to monosemy.json beside it, with which the SAE is read again as it
    was, to the bit.
    Raises ValueError where that tool would compute something else, for what `load` refuses, and for a target
    that is not empty.
    """
    path, target = Path(path), Path(target)
    if to not in TARGETS:
        raise invalid("to", to, ", ".join(TARGETS), "these layouts can be written")
    check_new(target)
    parts = _parts(path, format, unfinished, source)
    sae = parts.build()
    if to != "native" and "widths" in sae.family:
        allowed = "native for crosscoders and cross-layer transcoders"
        raise invalid("to", to, allowed, f"{to} has no layout for them")
    check_finite(sae, str(path))
    with new_folder(target) as part:
        if to == "native":
            _write_tensors(sae, part)
            write_json(part / "config.json", _about(sae) | parts.config)
        else:
            _WRITTEN[to].write(sae, parts.config, part)
            _keep(sae, parts.config, part, to)


# --- reading ------------------------------------------------------------------------------------------------


def _parts(path: Path, format: str | None, unfinished: bool, source: str | None = None) -> Parts:
    """Return what lies in a folder or file, with what was kept beside another tool's layout."""
    if format is not None and format not in FORMATS:
        raise invalid("format", format, ", ".join(FORMATS), "leave it out to have it detected")
    if format is None:
        format = detect(path, source)
    found = _found(path, source)
    entry = _entry(path, found)
    if entry is not None and entry.format == format and entry.note:
        raise _closed(path, entry)
    if format in layouts.ONE_FILE and path.is_dir():
        raise _nothing(path, found)
    parts = (
        _native(path)
        if format == "native"
        else _OTHERS[format].read(path, source or path.absolute().as_posix())
    )
    if format in _WRITTEN and (path / KEPT).exists():
        parts = _restored(parts, path, format)
    status = _status(path, parts.config)
    if status != "complete" and not unfinished:
        raise invalid(
            "folder",
            str(path),
            "an SAE whose training is complete",
            f"this one is {status}; pass unfinished=True to take it as it is",
        )
    return parts


def _found(path: Path, source: str | None) -> dict[str, layouts.Entry]:
    """Return what the names of its files make of a folder or file."""
    source = source or path.absolute().as_posix()
    if path.is_file():
        return layouts.find([path.name], source)
    files = [file for pattern in ("*", "checkpoints/*") for file in path.glob(pattern) if file.is_file()]
    return layouts.find([file.relative_to(path).as_posix() for file in files], source)


def _entry(path: Path, found: dict[str, layouts.Entry]) -> layouts.Entry | None:
    return found.get(path.name if path.is_file() else ".")


def _closed(path: Path, entry: layouts.Entry) -> ValueError:
    return invalid("folder", str(path), "an SAE that can be opened here", f"it cannot be: {entry.note}")


def _nothing(path: Path, found: dict[str, layouts.Entry]) -> ValueError:
    """Return the error for a folder that is no SAE's own, though its files may be SAEs."""
    files = [entry.path for entry in found.values() if entry.format in layouts.ONE_FILE]
    own = f"file, such as {path / files[0]}" if files else "folder, such as RUN/resid_post_layer_3/trainer_0"
    allowed = (
        "the folder or file of an SAE, such as sae.safetensors with its config.json (docs/formats.md "
        "has all layouts)"
    )
    return invalid("folder", str(path), allowed, f"name an SAE's own {own}")


def _native(folder: Path) -> Parts:
    config = untrusted.json_object(folder / "config.json")
    tensors = untrusted.safetensors(folder / "sae.safetensors")
    return _described(config, current_names(tensors), "sae.safetensors and config.json")


def _described(metadata: dict[str, Any], tensors: dict[str, Tensor], where: str) -> Parts:
    """Tensors with the description that `_about` made."""
    for key in ("architecture", "d_in", "d_sae", "settings"):
        if key not in metadata:
            raise invalid(
                where, f"no {key}", "the configuration that was saved with these weights", "copy both again"
            )
    pre_bias = flag(metadata, "pre_bias", where) if metadata.get("pre_bias") is not None else None
    flags = ("transcode", "skip_connection", "cross_layer", "crosscode")
    family: dict[str, Any] = {name: flag(metadata, name, where) for name in flags}
    family |= {name: metadata[name] for name in ("mask", "dedicated_share") if name in metadata}
    several = family["crosscode"] or family["cross_layer"]
    widths: dict[str, Any] = {"widths": metadata.get("widths")} if several else {}
    if (family["transcode"] and not several) or metadata.get("d_out") is not None:
        widths["d_out"] = whole(metadata, "d_out", where)
    config = {key: value for key, value in metadata.items() if key not in _ABOUT_THE_SAE}
    if not _is_origin(config.get("origin", {})):
        raise invalid(
            f"{where}: origin",
            str(config["origin"])[:80],
            "a format and its configuration",
            "copy the folder again",
        )
    return Parts(
        metadata["architecture"],
        metadata["d_in"],
        metadata["d_sae"],
        metadata["settings"],
        tensors,
        where,
        pre_bias,
        config,
        **family,
        **widths,
    )


def _is_origin(origin: Any) -> bool:
    return origin == {} or (
        isinstance(origin, dict)
        and origin.get("format") in _OTHERS
        and isinstance(origin.get("config"), dict)
    )


def _restored(parts: Parts, folder: Path, format: str) -> Parts:
    """Return the SAE that was converted to this folder: what it has no place for is in monosemy.json."""
    record = untrusted.json_object(folder / KEPT)
    if record.get("files") != {name: untrusted.sha256(folder / name) for name in _WRITTEN[format].FILES}:
        remedy = f"take {KEPT} away to read the folder as it is, without what its layout has no place for"
        raise invalid(
            f"{KEPT}: files",
            "of other files",
            "the digests of the files beside it, which have changed since",
            remedy,
        )
    tensors = record.get("tensors")
    if not isinstance(tensors, dict) or not isinstance(record.get("from"), list):
        raise invalid(KEPT, "no tensors", "what `monosemy convert` wrote", "convert again")
    tensors = current_names({name: _decoded(value) for name, value in tensors.items()})
    as_filed = current_names(dict.fromkeys(map(str, record["from"])))
    return _described(
        record, {name: tensor for name, tensor in parts.tensors.items() if name in as_filed} | tensors, KEPT
    )


def _status(folder: Path, config: dict[str, Any]) -> str:
    """Return "complete", or what its run says of the SAE instead."""
    own = config.get("status", "complete")
    if own != "complete":
        return str(own)[:80]
    run = folder.absolute().parent.parent
    if not (run / "status.json").is_file():
        return "complete"
    saes = untrusted.json_object(run / "status.json").get("saes")
    state = (
        saes.get(f"{folder.absolute().parent.name}/{folder.absolute().name}")
        if isinstance(saes, dict)
        else None
    )
    return text(state) or "complete"


# --- writing ------------------------------------------------------------------------------------------------


def _about(sae: SAE) -> dict[str, Any]:
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in sae.known_settings.items()}
    metadata = {
        "format": "monosemy",
        "version": 2,
        "architecture": sae.name,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "settings": settings,
    }
    metadata |= sae.family
    return metadata if sae.pre_bias == type(sae).pre_bias else metadata | {"pre_bias": sae.pre_bias}


def _write_tensors(sae: SAE, folder: Path) -> None:
    with atomic_path(folder / "sae.safetensors", _bytes(sae)) as part:
        save_file({name: tensor.contiguous() for name, tensor in sae.state_dict().items()}, part)


def _bytes(sae: SAE) -> int:
    return sum(tensor.nbytes for tensor in sae.state_dict().values()) + (1 << 14)


def _keep(sae: SAE, config: dict[str, Any], folder: Path, to: str) -> None:
    """Write monosemy.json: the configuration, and every tensor that does not come back from the folder as it
    went in."""
    back = _WRITTEN[to].read(folder, folder.name).tensors
    state = sae.state_dict()
    same = [
        name
        for name, tensor in state.items()
        if name in back and torch.equal(back[name].to(tensor.dtype), tensor)
    ]
    tensors = {name: _encoded(tensor) for name, tensor in state.items() if name not in same}
    assert not tensors.keys() & {"W_enc", "W_dec"}, "the layout lost weights"
    digests = {name: untrusted.sha256(folder / name) for name in _WRITTEN[to].FILES}
    write_json(folder / KEPT, _about(sae) | config | {"files": digests, "from": same, "tensors": tensors})


def _encoded(tensor: Tensor) -> dict[str, Any]:
    return {
        "shape": list(tensor.shape),
        "float32": base64.b64encode(tensor.float().numpy().tobytes()).decode(),
    }


def _decoded(value: Any) -> Tensor:
    try:
        numbers = np.frombuffer(base64.b64decode(value["float32"], validate=True), "<f4").copy()
        return torch.from_numpy(numbers).reshape([int(n) for n in value["shape"]])
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise invalid(
            f"{KEPT}: tensors", str(value)[:80], "a shape and its numbers", "convert again"
        ) from error
