"""Which SAEs a repository or a folder holds, told from the names of its files alone."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import PurePosixPath

KEPT = "monosemy.json"  # in a folder converted to another tool's layout: all that the layout has no place for


@dataclass(frozen=True)
class Entry:
    """One SAE among the files, or what looks like one and cannot be opened."""

    format: str
    files: tuple[str, ...]  # that its reader needs, relative to the repository
    path: str  # what `formats.read` is given, relative to the repository
    named: bool = False  # whether it is a pickle, which opens only where the user names its format
    note: str = ""  # why it cannot be opened, "" where it can


# The weights come first; of layouts that share them, the first whose files are all there is meant.
_FOLDERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("native", ("sae.safetensors", "config.json")),
    ("sparsify", ("sae.safetensors", "cfg.json")),
    ("sae_lens", ("sae_weights.safetensors", "cfg.json")),
    ("llama_scope", ("sae_weights.safetensors", "config.json")),
    ("llama_scope", ("checkpoints/final.safetensors", "hyperparams.json")),
    ("gemma_scope", ("params.npz",)),
    ("gemma_scope_2", ("params.safetensors",)),
    ("dictionary_learning", ("ae.pt", "config.json")),
)
_OPTIONAL = {"gemma_scope_2": ("config.json",)}
ONE_FILE = {"qwen_scope": r"layer\d+\.sae\.pt", "goodfire": r".+\.pth|.+-SAE-l\d+\.pt"}
_PICKLES = ("dictionary_learning", *ONE_FILE)

_CLT = "a cross-layer transcoder is no SAE"
_CROSSCODER = "a crosscoder is no SAE"
_TRANSCODER = "transcoders of this layout are not read"
_BY_PATH = {  # what lies in files of the same names beside SAEs, or is not all in its files
    "sae_lens": {  # SAELens' own list of SAEs has it
        r".*\bMistral-7B-Residual-Stream-SAEs/.+": "each token's activations are rescaled; its cfg.json is "
        "silent"
    },
    "gemma_scope": {
        r"(.*/)?embedding/width_\w+/average_l0_\w+": "it reads embeddings, whose scale its files do not say",
    },
    "gemma_scope_2": {
        r"(.*/)?crosscoder\w*/[^/]+": _CROSSCODER,
        r"(.*/)?clt\w*/[^/]+": _CLT,
    },
    "llama_scope": {r"(.*/)?Llama3_1-8B-Base-L\d+TC-\d+x": _TRANSCODER},
}
_NO_SAES = {  # files, relative to the repository
    r"(.+/)?W_(enc|dec)_\d+\.safetensors|(.+/)?clt\w*/.+\.safetensors": _CLT,
    r"(.+/)?crosscoder\w*/.+\.safetensors": _CROSSCODER,
    r"(.+/)?layer_\d+\.safetensors": "a set of transcoders, for circuit-tracer, is written here and not read",
    r"(.+/)?latest_ckpt\.safetensors": "a temporal SAE is computed otherwise",
}


def find(files: Collection[str], source: str = "") -> dict[str, Entry]:
    """List the SAEs of a repository by their ids, given the names of all its files, relative and with "/".

    An id is the folder's path ("." for the root), or the file's in layouts of one file for each SAE.
    `source`, "OWNER/REPO", says what some repositories hold. Nothing is opened: a reader may still refuse.
    """
    names: dict[PurePosixPath, set[str]] = defaultdict(set)
    for path in map(PurePosixPath, files):
        names[path.parent].add(path.name)
        if path.parent.name == "checkpoints":
            names[path.parent.parent].add(f"checkpoints/{path.name}")
    found: dict[str, Entry] = {}
    for folder, inside in sorted(names.items()):
        entry = _in_folder(folder, inside, source)
        if entry is not None:
            found[str(folder)] = entry
        found |= {entry.path: entry for entry in _one_file_each(folder, inside)}
    return found


def _in_folder(folder: PurePosixPath, inside: set[str], source: str) -> Entry | None:
    """Return the SAE whose files lie in a folder, if there is one."""
    known = [(format, files) for format, files in _FOLDERS if files[0] in inside]
    for format, files in known:
        if inside.issuperset(files):
            optional = [name for name in (*_OPTIONAL.get(format, ()), KEPT) if name in inside]
            note = _by_path(format, str(PurePosixPath(source, folder)))
            return _entry(format, folder, [*files, *optional], note)
    if known:
        format, (weights, *_) = known[0]
        configs = " or ".join(files[1] for _, files in known)
        return _entry(format, folder, [weights], f"there is no {configs} beside {weights}")
    paths = [str(folder / name) for name in sorted(inside) if "/" not in name]
    notes = [note for pattern, note in _NO_SAES.items() if any(re.fullmatch(pattern, path) for path in paths)]
    return _entry("", folder, [], notes[0]) if notes else None


def _one_file_each(folder: PurePosixPath, inside: set[str]) -> list[Entry]:
    """Return the SAEs of a folder that are one file each."""
    return [
        Entry(format, (str(folder / name),), str(folder / name), named=True)
        for name in sorted(inside)
        for format, pattern in ONE_FILE.items()
        if "/" not in name and re.fullmatch(pattern, name)
    ]


def _entry(format: str, folder: PurePosixPath, names: Collection[str], note: str) -> Entry:
    return Entry(format, tuple(str(folder / name) for name in names), str(folder), format in _PICKLES, note)


def _by_path(format: str, path: str) -> str:
    notes = _BY_PATH.get(format, {})
    return next((note for pattern, note in notes.items() if re.fullmatch(pattern, path)), "")
