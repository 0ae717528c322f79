"""Named arrays and facts about them in one .npz file: what a report reads. Nothing here imports torch."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from monosemy.errors import invalid
from monosemy.system.files import atomic_path

# columns of an SAE's latents that show text, or say where it is
OF_TEXT = (
    "peak_token",
    "page_at",
    "page_shade",
    "page_peak",
    "page_silent",
)


def save(path: Path, facts: Mapping[str, Any], columns: Mapping[str, np.ndarray]) -> None:
    """Write a file; a reader sees the old one or the new one. Raises DiskFull and OSError."""
    with (
        atomic_path(path, sum(column.nbytes for column in columns.values())) as part,
        open(part, "wb") as file,
    ):
        np.savez_compressed(file, facts=np.array(json.dumps(facts)), **columns)  # type: ignore[arg-type]


def load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the columns and the facts of a file. Raises ValueError for a damaged one, and OSError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if name != "facts"}, json.loads(
                str(file["facts"])
            )
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError) as error:
        raise invalid(
            path.name, str(path), "what an evaluation wrote", f"evaluate again: it is damaged ({error})"
        ) from error
