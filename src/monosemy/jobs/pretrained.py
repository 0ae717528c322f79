"""SAEs by their names on the Hugging Face hub: found, fetched at one commit, listed and pushed.

A name is a path that exists, OWNER/REPO, OWNER/REPO/SAE_ID, or a release as the field calls it
(`releases.py`). A branch is resolved to its commit once; the files are then those of that commit, and no
others than the SAE's own are fetched.
"""

from __future__ import annotations

import difflib
import logging
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch

from monosemy import formats
from monosemy.errors import invalid
from monosemy.formats import layouts, names
from monosemy.jobs.hub import upload_saved
from monosemy.jobs.model_card import sae_card
from monosemy.jobs.releases import repository, sae_of
from monosemy.jobs.repository import HubUnreachable, Repository, repository_of
from monosemy.system.files import path_of

if TYPE_CHECKING:
    from monosemy.formats.layouts import Entry
    from monosemy.sae import SAE

log = logging.getLogger(__name__)

NAMED = 8  # ids of SAEs in an error


@dataclass(frozen=True)
class Resolved:
    """An SAE's files on this machine, as `formats.read` takes them."""

    path: Path
    source: str | None = None  # OWNER/REPO/path in it
    format: str | None = None
    origin: dict[str, str] = field(default_factory=dict)  # repo_id, commit and sae_id of one from the hub


@dataclass(frozen=True)
class SAERecord:
    """One SAE of a repository, by the names of its files alone."""

    sae_id: str
    format: str
    architecture: str | None  # this and the next two where names say them
    site: str | None
    d_sae: int | None
    bytes: int | None  # of its files, where the hub says
    note: str = ""  # why it is not opened, or what that takes


def load(
    name_or_path: str | Path,
    sae_id: str | None = None,
    *,
    revision: str | None = None,
    format: str | None = None,
    unfinished: bool = False,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
) -> SAE:
    """Open an SAE by name or path, for raw activations [.., d_in], in evaluation mode.

    Args:
        name_or_path: a folder or file, OWNER/REPO or OWNER/REPO/SAE_ID on the hub, or a release such as
        gemma-scope-2b-pt-res.
        sae_id: which SAE of a repository, as `list_saes` names it; not needed where there is one.
        revision: a branch, tag or commit of the repository.
        format: the layout. Needed for those that are pickles (dictionary_learning, qwen_scope, goodfire),
        which then open restricted to
            tensors; all others are told apart by their files.
        unfinished: also an SAE whose training did not complete.
        device, dtype: where and in which precision the weights are put.

    Raises ValueError for what is not there, cannot be read or would be computed otherwise here, and
    ConnectionError for a hub that cannot be reached, where the cache does not have the files.
    """
    precision = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if precision not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise invalid("dtype", str(dtype), "float32, bfloat16, float16 or float64", "choose one of them")
    place = _device(device)
    found = resolve(name_or_path, sae_id, revision=revision, format=format)
    sae, metadata = formats.read(found.path, found.format, unfinished=unfinished, source=found.source)
    sae.metadata = metadata | found.origin
    return sae.to(device=place, dtype=precision)


def list_saes(repo: str, revision: str | None = None) -> list[SAERecord]:
    """List the SAEs of a repository, a release or a local folder, in the order of their ids. Fetches no
    weights.

    Raises as `load`.
    """
    folder = path_of("repo", repo)
    if folder.is_dir():
        files = {
            path.relative_to(folder).as_posix(): path.stat().st_size
            for path in folder.rglob("*")
            if path.is_file()
        }
        entries = layouts.find(files, repo)
        return [
            _record(folder.absolute().as_posix(), sae_id, entry, files) for sae_id, entry in entries.items()
        ]
    repo_id, inside = _parsed(repo)
    held = repository_of(repo_id, revision, sizes=True)
    if held.silence:
        log.warning(
            "the hub cannot be reached (%s): these SAEs of %s are in the cache", held.silence, repo_id
        )
    entries = layouts.find(held.files, repo_id)
    within = {sae_id: entry for sae_id, entry in entries.items() if _is_within(sae_id, inside)}
    return [_record(repo_id, sae_id, entry, held.files) for sae_id, entry in within.items()]


def save(sae: SAE, folder: str | Path, config: dict[str, Any] | None = None) -> None:
    """Write an SAE's folder in our layout, with what its own folder said of it and `config` over that.

    Raises DiskFull.
    """
    formats.save(sae, folder, {"status": "complete"} | sae.metadata | (config or {}))


def push(
    sae: SAE,
    repo_id: str,
    path_in_repo: str = ".",
    *,
    private: bool = False,
    commit_message: str | None = None,
) -> str:
    """Upload an SAE to the hub in our layout, and a model card where the repository has none. Returns the
    address of the commit.

    The repository is created if it does not exist. Raises ValueError for a name that is none, and
    `UploadFailed`.
    """
    _parsed(repo_id)
    place = PurePosixPath(path_in_repo)
    if place.is_absolute() or ".." in place.parts:
        raise invalid(
            "path_in_repo", path_in_repo, "a folder in the repository", "such as resid_post_layer_3/my_sae"
        )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / place
        save(sae, folder)
        message = commit_message or "Upload an SAE with monosemy"
        return upload_saved(
            Path(scratch),
            repo_id,
            sae_card(sae, repo_id, "" if str(place) == "." else str(place)),
            message,
            private=private,
        )


# --- names --------------------------------------------------------------------------------------------------


def resolve(
    name_or_path: str | Path,
    sae_id: str | None = None,
    *,
    revision: str | None = None,
    format: str | None = None,
    trusted: str | None = None,
) -> Resolved:
    """Find an SAE by name or path, and fetch its files where they are not here.

    `trusted` is the format of pickles that may be opened; unlike `format` it says nothing of other SAEs.
    Raises as `load`.
    """
    path = path_of("name_or_path", str(name_or_path))
    if path.exists():
        if revision is not None:
            raise invalid(
                "revision", revision, "left out for a path on this machine", "a folder has no revisions"
            )
        return Resolved(path / sae_id if sae_id else path, format=format)
    repo_id, inside = _parsed(str(name_or_path))
    held = repository_of(repo_id, revision)
    chosen, entry = _chosen(held, inside, sae_id)
    if held.silence:
        log.warning(
            "the hub cannot be reached (%s): using the cached files of %s, %s", held.silence, repo_id, chosen
        )
    if entry.note and not (format and entry.named):
        raise invalid("sae_id", chosen, f"an SAE of {repo_id} that can be opened", entry.note)
    if entry.named and format is None and trusted == entry.format:
        format = trusted
    if entry.named and format is None:
        remedy = f'pass format="{entry.format}" if you trust {repo_id} (--format {entry.format})'
        raise invalid("format", None, f'"{entry.format}" for {entry.files[0]}, which is a pickle', remedy)
    local = held.fetch(_files(entry, chosen, format, held))
    origin = {"repo_id": repo_id, "commit": held.commit, "sae_id": chosen}
    return Resolved(
        local / entry.path,
        f"{repo_id}/{entry.path}" if entry.path != "." else repo_id,
        format or entry.format,
        origin,
    )


def _parsed(name: str) -> tuple[str, str]:
    """OWNER/REPO and what follows in it, of a name on the hub or a release.

    Raises ValueError for what is neither.
    """
    name = repository(name) or name
    part = r"[A-Za-z0-9_][\w.-]*"
    match = re.fullmatch(rf"({part}/{part})(?:/(.+?))?/?", name, re.ASCII)
    if match is None:
        allowed = (
            "a folder (there is none of this name), OWNER/REPO on the hub, or a release such as "
            "gemma-scope-2b-pt-res"
        )
        raise invalid("name_or_path", name, allowed, "correct it")
    return match[1], match[2] or ""


def _chosen(held: Repository, inside: str, sae_id: str | None) -> tuple[str, Entry]:
    """Return the SAE that is meant, by its whole id.

    Raises ValueError with the ids that come nearest, and HubUnreachable.
    """
    entries = layouts.find(held.files, held.repo_id)
    if not entries and not held.silence:
        allowed = "a repository with SAEs in a layout that is read here (docs/formats.md has them)"
        raise invalid(
            "name_or_path",
            held.repo_id,
            allowed,
            f"look at https://huggingface.co/{held.repo_id}/tree/{held.commit}",
        )
    asked = "/".join(part.strip("/") for part in (inside, sae_id or "") if part.strip("/"))
    for whole in (asked, (sae_id or "").strip("/")):
        if whole in entries:
            return whole, entries[whole]
    if (meant := sae_of(held.repo_id, asked, entries)) is not None:
        return meant, entries[meant]
    within = {name: entry for name, entry in entries.items() if _is_within(name, asked)}
    if len(within) == 1:
        return next(iter(within.items()))
    remedy = f"`monosemy list {held.repo_id}` shows all of them"
    if within:
        allowed = f"one of the {len(within)} there: {_some(list(within))}"
        raise invalid("sae_id", asked or None, allowed, remedy)
    if held.silence:
        raise HubUnreachable(
            f"the hub cannot be reached ({held.silence}), and the cache does not have {asked or 'an SAE'} "
            f"of {held.repo_id}"
            f"{f', but {_some(list(entries))}' if entries else ''}. Connect to the hub and try again, or "
            "give a local folder."
        )
    near = difflib.get_close_matches(asked, entries, NAMED, 0.5) or list(entries)
    raise invalid("sae_id", asked, f"an SAE of {held.repo_id}, such as {_some(near)}", remedy)


def _is_within(name: str, folder: str) -> bool:
    return not folder or name == folder or name.startswith(f"{folder.rstrip('/')}/")


def _some(names: list[str]) -> str:
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _files(entry: Entry, sae_id: str, format: str | None, held: Repository) -> tuple[str, ...]:
    """Return the files to fetch: the entry's, or where dictionary_learning's of a folder that has both are
    asked for, those.

    With them comes what an SAE's run says of all of its SAEs: whether their training is complete.
    """
    status = str(PurePosixPath(entry.path).parent.parent / "status.json")
    run = (status,) if status in held.files and len(PurePosixPath(entry.path).parts) > 1 else ()
    if format in (None, entry.format):
        return entry.files + run
    if format == "dictionary_learning":
        files = tuple(str(PurePosixPath(sae_id, name)) for name in ("ae.pt", "config.json"))
        if all(name in held.files for name in files):
            return files + run
    raise invalid("format", format, f"{entry.format}, which {sae_id} of {held.repo_id} is", "leave it out")


def _record(repo: str, sae_id: str, entry: Entry, sizes: Mapping[str, int | None]) -> SAERecord:
    place = str(PurePosixPath(repo, sae_id))
    known = [size for name in entry.files if (size := sizes.get(name)) is not None]
    note = entry.note or (f'a pickle: opens with format="{entry.format}"' if entry.named else "")
    architecture = names.ARCHITECTURES.get(entry.format)
    return SAERecord(
        sae_id,
        entry.format,
        architecture,
        names.site(place),
        names.width(place),
        sum(known) if known else None,
        note,
    )


def _device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:120]
        raise invalid("device", str(device), f"a device that torch has here ({reason})", "use cpu") from error
    return place


# --- the hub ------------------------------------------------------------------------------------------------
