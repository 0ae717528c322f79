"""A repository on the hub, or what the cache has of it: its commit, its files, and what went wrong."""

from __future__ import annotations

import errno
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import RepoFile, RepoSibling

from monosemy.errors import invalid
from monosemy.system.files import check_disk_space
from monosemy.system.http import answer_to, causes, status_of
from monosemy.system.redact import without_secrets

SECONDS = 10.0  # that the hub has to answer before what is in the cache serves
MANY = 50_000  # files of a repository, from which on the hub may leave some out of its description


class HubUnreachable(ConnectionError):
    """The hub gave no answer, or none that helps, and the cache does not have what was asked for."""


@dataclass(frozen=True)
class Repository:
    """A repository at one commit."""

    repo_id: str
    revision: str  # the branch, tag or commit that was asked for
    commit: str  # what it was when it was resolved
    files: dict[str, int | None]  # all of its files, with their sizes where they are known
    silence: str = ""  # why the hub was not heard: the files are then those that the cache has

    def fetch(self, files: tuple[str, ...]) -> Path:
        """Have files of this commit on this machine, and return the folder that they lie in as in the
        repository.

        What is fetched anew is held to the size and the digest that the hub names. Raises ValueError where it
        differs, and DiskFull.
        """
        known = {name: try_to_load_from_cache(self.repo_id, name, revision=self.commit) for name in files}
        wanted = [name for name, path in known.items() if not isinstance(path, str)]
        if wanted:
            with _answers(self.repo_id, self.commit):
                _, listed = _described(self.repo_id, self.commit, sizes=True)
            for name in wanted:
                with (
                    _cached_at(_home(self.repo_id) / name, listed[name].size or 0),
                    _answers(self.repo_id, self.commit),
                ):
                    path = Path(hf_hub_download(self.repo_id, name, revision=self.commit))
                    _check(path, name, self.repo_id, listed[name])
            self._remember()
        with _answers(self.repo_id, self.commit):
            return Path(snapshot_download(self.repo_id, revision=self.commit, local_files_only=True))

    def _remember(self) -> None:
        """Note in the cache what the revision was, as the hub's library does: offline it is looked up
        there."""
        ref = _home(self.repo_id) / "refs" / self.revision
        if self.revision != self.commit:
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(self.commit, encoding="utf-8")


def _home(repo_id: str) -> Path:
    """Return the repository's folder in the cache of the hub's library."""
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type="model")


def repository_of(repo_id: str, revision: str | None, *, sizes: bool = False) -> Repository:
    """Return the repository at the commit that a revision means now; from the cache where the hub is out of
    reach."""
    if revision is not None and not re.fullmatch(r"(?!.*(\.\.|//))\w[\w./-]*", revision, re.ASCII):
        raise invalid("revision", revision, "a branch, tag or commit", "correct it")
    try:
        with _answers(repo_id, revision):
            commit, described = _described(repo_id, revision, sizes)
    except HubUnreachable as error:
        if (cached := _cached(repo_id, revision, _reason(error.__cause__ or error))) is None:
            raise
        return cached
    return Repository(
        repo_id, revision or "main", commit, {name: file.size for name, file in described.items()}
    )


def _cached(repo_id: str, revision: str | None, silence: str) -> Repository | None:
    """Return what the cache has of a repository at a revision."""
    home = _home(repo_id)
    ref = home / "refs" / (revision or "main")
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision
    snapshot = home / "snapshots" / str(commit)
    if commit is None or not snapshot.is_dir():
        return None
    files: dict[str, int | None] = {
        p.relative_to(snapshot).as_posix(): p.stat().st_size for p in snapshot.rglob("*") if p.is_file()
    }
    return Repository(repo_id, revision or "main", commit, files, silence)


def _described(
    repo_id: str, revision: str | None, sizes: bool
) -> tuple[str, dict[str, RepoSibling | RepoFile]]:
    """Return a revision's commit and its files, with their sizes and digests where those are asked for."""
    info = HfApi().model_info(repo_id, revision=revision, timeout=SECONDS, files_metadata=sizes)
    files: dict[str, RepoSibling | RepoFile] = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    if len(files) >= MANY:
        tree = HfApi().list_repo_tree(repo_id, recursive=True, revision=info.sha)
        files = {item.path: item for item in tree if isinstance(item, RepoFile)}
    return str(info.sha), files


def _check(path: Path, name: str, repo_id: str, listed: RepoSibling | RepoFile) -> None:
    """Raises ValueError, and takes the file out of the cache, where it is not what the hub says."""
    found = path.stat().st_size
    wrong = f"{found:,} bytes of {listed.size:,}" if listed.size is not None and found != listed.size else ""
    if not wrong and listed.lfs is not None:
        wrong = _differs(path, "sha256", b"", listed.lfs.sha256)
    elif not wrong and re.fullmatch(r"[0-9a-f]{40}", listed.blob_id or ""):  # git's own name of a small file
        wrong = _differs(path, "sha1", f"blob {found}\0".encode(), str(listed.blob_id))
    if wrong:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        allowed = f"files as the hub has them ({name} arrived with {wrong})"
        raise invalid("name_or_path", repo_id, allowed, "try again; it was not kept")


def _differs(path: Path, kind: str, before: bytes, wanted: str) -> str:
    """Say how the digest of `before` and a file differs from the one that is wanted, "" where it does not."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(
            file, lambda: hashlib.new(kind, before, usedforsecurity=False)
        ).hexdigest()
    return f"{kind} {digest[:12]}.. instead of {wanted[:12]}.." if digest != wanted else ""


@contextmanager
def _answers(repo_id: str, revision: str | None) -> Iterator[None]:
    """Yield the hub's refusals as ValueErrors, and its silence as HubUnreachable."""
    page = f"https://huggingface.co/{repo_id}"
    try:
        yield
    except GatedRepoError as error:
        remedy = f"ask for access on {page}, then run `hf auth login`"
        raise invalid(
            "name_or_path", repo_id, "a repository that you have access to (this one is gated)", remedy
        ) from error
    except RevisionNotFoundError as error:
        raise invalid(
            "revision", revision, f"a branch, tag or commit of {page}", "correct it, or leave it out"
        ) from error
    except RepositoryNotFoundError as error:
        allowed = f"a repository on the hub (looked for {page})"
        raise invalid(
            "name_or_path", repo_id, allowed, "correct the name, or run `hf auth login` if it is private"
        ) from error
    except LocalEntryNotFoundError as error:  # what was to be fetched, and why it was not, in its cause
        raise _failed(repo_id, page, error) from error
    except EntryNotFoundError as error:
        allowed = f"files that are there ({_reason(error)})"
        raise invalid("name_or_path", repo_id, allowed, "the repository has changed: try again") from error
    except (OSError, HTTPError) as error:
        if isinstance(error, ValueError) or _of_disk(error):
            raise
        raise _failed(repo_id, page, error) from error


@contextmanager
def _cached_at(path: Path, needed: int) -> Iterator[None]:
    """Write `needed` bytes below the cache.

    Raises DiskFull, and ValueError for a cache that cannot be written.
    """
    try:
        with check_disk_space(path, needed):
            yield
    except OSError as error:
        if not _of_disk(error):
            raise
        remedy = f"make it so, or set HF_HUB_CACHE to another ({error.strerror})"
        raise invalid(
            "HF_HUB_CACHE", constants.HF_HUB_CACHE, "a folder that can be written", remedy
        ) from error


def _of_disk(error: BaseException) -> bool:
    """Whether an error is that of a file here, and not of a connection."""
    return isinstance(error, OSError) and (
        error.filename is not None or error.errno in (errno.ENOSPC, errno.EDQUOT)
    )


def _failed(repo_id: str, page: str, error: BaseException) -> Exception:
    """Return what it means that the hub refused without a name for it, was in trouble, or did not answer.

    Large files come from a store elsewhere, by addresses that expire; what it refuses may be had in a while.
    """
    status = status_of(error)
    by_hub = status is not None and str(answer_to(error).url).startswith(constants.ENDPOINT)
    if by_hub and status in (401, 403):
        allowed = f"a repository that you may read (to {page} the hub answers HTTP {status})"
        return invalid(
            "name_or_path",
            repo_id,
            allowed,
            "run `hf auth login`, or unset HF_TOKEN if its token is no longer valid",
        )
    if by_hub and status == 404:
        allowed = f"a repository on the hub (looked for {page}), and its revision"
        return invalid("name_or_path", repo_id, allowed, "correct the name")
    remedy = "Connect to the hub and try again" if status is None else "Try again in a while"
    reason = (
        f"{repo_id} could not be had from the hub ({_reason(error)}), and its files are not all in the cache"
    )
    return HubUnreachable(f"{reason}. {remedy}, or give a local folder.")


def _reason(error: BaseException) -> str:
    """Return what lies at the root of an error, in a line."""
    status = status_of(error)
    if status is not None:
        return f"HTTP {status}"
    *_, root = causes(error)
    return str(without_secrets((str(root).strip() or type(root).__name__).splitlines()[0].rstrip(". ")[:200]))
