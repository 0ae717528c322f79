"""The folder of a sharded SAE, written by one rank while the others hand it their latents.

It is the folder that `formats.save` writes of a whole SAE, but for dictionary_learning's ae.pt: a pickle of
whole tensors, which one rank may have no room for. `monosemy convert` makes it where there is room.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from monosemy import formats
from monosemy.errors import TryAgain
from monosemy.ops import LatentShards
from monosemy.sae import SAE
from monosemy.system.files import atomic_path, write_json

PIECE = 2**24  # numbers that are handed over at a time
DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.int64: "I64"}


def save_sharded(sae: SAE, folder: str | Path, config: dict[str, Any], of_latents: frozenset[str]) -> None:
    """Write a finished SAE of which every rank has its latents; all ranks of its group call this, and the
    first writes. `of_latents` names the tensors with a row for each latent.

    No rank holds the whole: weights go to the file some rows at a time. Raises DiskFull and OSError on the
    first rank where it cannot be written, and then TryAgain on the others.
    """
    assert sae.shards is not None, "a whole SAE is saved by formats.save"
    folder, tensors = Path(folder), sae.state_dict()
    shapes = {name: _whole_shape(sae, name, t, of_latents) for name, t in tensors.items()}
    # as safetensors orders them: wide numbers first
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header = _header(names, tensors, shapes)
    needed = len(header) + sum(shapes[name].numel() * t.element_size() for name, t in tensors.items())
    with ExitStack() as stack:
        file = _File(stack, folder / "sae.safetensors", needed) if sae.shards.rank == 0 else None
        if file is not None:
            file.write(header)
        for name in names:
            for rank in range(sae.shards.size if name in of_latents else 1):
                _hand_over(sae.shards, tensors[name].detach(), rank, file)
        failed = torch.tensor(file is not None and file.error is not None, device=sae.shards.device)
        failed = sae.shards.most(failed.int())
        if file is not None and file.error is not None:
            raise file.error
        if failed:
            raise TryAgain(f"{folder} could not be written by the first rank of this SAE")
    if sae.shards.rank == 0:
        write_json(folder / "config.json", formats._about(sae) | config)


class _File:
    """A file that keeps its first error, which is raised once all ranks have handed over what they have."""

    def __init__(self, stack: ExitStack, path: Path, needed: int) -> None:
        self.error: OSError | None = None
        try:
            part = stack.enter_context(atomic_path(path, needed))
            self.file = stack.enter_context(part.open("wb"))
        except OSError as error:
            self.error = error

    def write(self, data: bytes) -> None:
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error


def _whole_shape(sae: SAE, name: str, tensor: Tensor, of_latents: frozenset[str]) -> torch.Size:
    return torch.Size((sae.d_sae, *tensor.shape[1:])) if name in of_latents else tensor.shape


def _header(names: list[str], tensors: dict[str, Tensor], shapes: dict[str, torch.Size]) -> bytes:
    """Return what a safetensors file begins with: where each tensor lies."""
    entries, begin = {}, 0
    for name in names:
        end = begin + shapes[name].numel() * tensors[name].element_size()
        kind = DTYPES[tensors[name].dtype]
        entries[name] = {"dtype": kind, "shape": list(shapes[name]), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _hand_over(shards: LatentShards, tensor: Tensor, rank: int, file: _File | None) -> None:
    """Have one rank's tensor written to the first rank's file, some numbers at a time."""
    own, device = shards.rank == rank, shards.device
    for piece in tensor.contiguous().view(-1).split(PIECE):
        handed = piece.to(device) if own else torch.empty_like(piece, device=device)
        if rank:
            shards.broadcast_(handed, rank)
        if file is not None:
            file.write(handed.cpu().view(torch.uint8).numpy().tobytes())
