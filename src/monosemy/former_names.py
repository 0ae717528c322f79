"""What tensors were called in files before version 2 of the layout; such folders and checkpoints load for
ever."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from monosemy.errors import invalid

T = TypeVar("T")

FORMER_NAMES = {
    "W_enc_FD": "W_enc",
    "b_enc_F": "b_enc",
    "W_dec_FD": "W_dec",
    "b_dec_D": "b_dec",
    "threshold_F": "threshold",
    "b_mag_F": "b_mag",
    "r_mag_F": "r_mag",
    "queue_Q2": "queue",
}


def current_names(tensors: Mapping[str, T]) -> dict[str, T]:
    """Rename tensors that an earlier version wrote; a name may have a prefix, as in `optimizer.m.W_enc_FD`.

    Raises ValueError where one tensor is there under both names.
    """
    parted = {name: name.rpartition(".") for name in tensors}
    renamed = {
        prefix + dot + FORMER_NAMES.get(last, last): tensors[name]
        for name, (prefix, dot, last) in parted.items()
    }
    if len(renamed) < len(tensors):
        twice = sorted(name for name in tensors if name not in renamed)
        raise invalid(
            "tensors",
            ", ".join(twice),
            "each under its present name or its former one",
            "copy the file again",
        )
    return renamed
