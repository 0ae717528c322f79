"""A run on the Hugging Face hub: upload with retries, and the model card.

A failed upload never costs a run: the folder on disk is whole, and the error names the command that repeats
the upload. The token is the hub library's own (HF_TOKEN or `hf auth login`); it is no argument here, so it
can be in no log.
"""

from __future__ import annotations

import logging
import queue
import random
import shlex
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import huggingface_hub  # its own names are looked up when they are used: importing it costs little

from monosemy.errors import invalid
from monosemy.jobs.model_card import model_card
from monosemy.rules import REPOSITORY
from monosemy.system.http import causes, limit_waits, retry, retry_after, status_of
from monosemy.system.redact import without_secrets

log = logging.getLogger(__name__)

SAE_FILES = ("sae.safetensors", "config.json", "ae.pt", "eval_results.json", "labels.json", "latents.parquet")
RUN_FILES = (
    "README.md",
    "run.json",
    "status.json",
    "metrics.jsonl",
    "rows.jsonl",
    "report.html",
    "plots/*.png",
    "plots/*.svg",
)
UPLOADED = (*RUN_FILES, *SAE_FILES, *(f"*/{name}" for name in SAE_FILES))
NOT_UPLOADED = ("checkpoints/*", "*/checkpoints/*", "wandb/*")
# seconds before each further try, each drawn from half to one and a half times that
WAITS = (
    1.0,
    2.0,
    4.0,
    8.0,
    16.0,
    32.0,
)
SILENCE = 60.0  # seconds without a byte after which a request has failed
LONGEST_WAIT = 120.0  # whatever the hub's Retry-After asks for
REFUSALS = {
    401: "the hub does not know who you are: run `hf auth login`, or set HF_TOKEN to a token with write "
    "permission",
    403: "your token may not write there: make one with write permission at "
    "https://huggingface.co/settings/tokens",
    404: "there is no such user, organization or repository, or your token cannot see it: check the name",
    413: "the hub refuses files of this size",
}


class UploadFailed(RuntimeError):
    """An upload that was refused, or failed as often as it was tried. The message ends with the command that
    repeats it.

    `may_pass`: whether the same upload may work in a while.
    """

    def __init__(self, message: str, *, may_pass: bool = False) -> None:
        super().__init__(message)
        self.may_pass = may_pass


def push(run_folder: str | Path, repo_id: str, *, waits: Sequence[float] = WAITS) -> str:
    """Write the run's model card to its README.md and upload the whole run. Returns the address of the
    commit.

    Raises ValueError for a name that is none, and `UploadFailed`.
    """
    run_folder = Path(run_folder)
    if not REPOSITORY.holds(repo_id):
        raise invalid("repo_id", repo_id, REPOSITORY.allowed, "correct it")
    _refuse_links(run_folder, run_folder, repo_id)
    (run_folder / "README.md").write_text(model_card(run_folder, repo_id), encoding="utf-8")
    return upload(run_folder, repo_id, waits=waits)


def upload(
    folder: str | Path, repo_id: str, *, run_folder: str | Path | None = None, waits: Sequence[float] = WAITS
) -> str:
    """Upload the artifact's files of `folder`, as one commit; the repository is made if there is none.

    Checkpoints, trackers' files and anything else that is no part of the artifact stay at home. What may pass
    (5xx, 408, 429, a broken connection) is tried again after each of `waits`; what will not (401, 403, 404,
    413, ...) fails at once.

    Args:
        folder: a run's folder, or that of one of its SAEs.
        repo_id: "user/name".
        run_folder: the run's folder if `folder` is inside it; the files keep their places in it.
        waits: seconds before each further try.

    Returns the address of the commit. Raises `UploadFailed`.
    """
    folder = Path(folder)
    root = folder if run_folder is None else Path(run_folder)
    if not folder.is_dir():
        raise _failure(root, repo_id, f"there is no folder {folder}")
    if not folder.resolve().is_relative_to(root.resolve()):
        raise _failure(root, repo_id, f"{folder} is not inside {root}")
    place = folder.resolve().relative_to(root.resolve()).as_posix()
    _refuse_links(folder, root, repo_id)

    def once() -> str:
        api = huggingface_hub.HfApi()
        api.create_repo(repo_id, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            path_in_repo=None if place == "." else place,
            allow_patterns=list(UPLOADED),
            ignore_patterns=list(NOT_UPLOADED),
            commit_message=f"Upload {root.resolve().name if place == '.' else place} with monosemy",
        )
        return str(commit.commit_url)

    return _tried(once, repo_id, lambda reason: str(_failure(root, repo_id, reason)), waits)


def upload_saved(
    folder: Path,
    repo_id: str,
    card: str,
    message: str,
    *,
    private: bool = False,
    waits: Sequence[float] = WAITS,
) -> str:
    """Upload a folder of saved SAEs as one commit, with `card` for a README.md where the repository has none.
    Returns its address.

    The repository is made if there is none. What may pass is tried again after each of `waits`. Raises
    `UploadFailed`.
    """

    def once() -> str:
        api = huggingface_hub.HfApi()
        api.create_repo(repo_id, exist_ok=True, private=private)
        if not api.file_exists(repo_id, "README.md"):
            (folder / "README.md").write_text(card, encoding="utf-8")
        allowed = ["README.md", *(name for file in SAE_FILES for name in (file, f"*/{file}"))]
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=allowed, commit_message=message
        )
        return str(commit.commit_url)

    return _tried(once, repo_id, lambda reason: f"Upload to {repo_id} failed: {reason}.", waits)


def _tried(once: Callable[[], str], repo_id: str, said: Callable[[str], str], waits: Sequence[float]) -> str:
    """Do something with the hub, again after each of `waits` where what failed may pass.

    Raises `UploadFailed` with what is said of it.
    """
    jitter = random.Random()  # its own, because the global generator belongs to the caller

    def attempt() -> str:
        limit_waits(SILENCE)
        return once()

    def on_error(error: Exception, wait: float | None) -> float:
        if wait is None or not _may_pass(error):
            raise UploadFailed(said(_reason(error)), may_pass=_may_pass(error)) from error
        wait = max(wait * jitter.uniform(0.5, 1.5), min(retry_after(error), LONGEST_WAIT))
        log.info("Upload to %s: %s; next try in %.0f s", repo_id, _reason(error), wait)
        return wait

    return retry(attempt, waits, on_error)


def _refuse_links(folder: Path, root: Path, repo_id: str) -> None:
    """Raises `UploadFailed` if a file that would be uploaded, or written, lies elsewhere."""
    from huggingface_hub.utils import filter_repo_objects  # which imports all of the hub's library

    links = (
        path
        for path in folder.rglob("*")
        if path.is_symlink() and not path.resolve().is_relative_to(root.resolve())
    )
    names = (path.relative_to(folder).as_posix() for path in links)
    for name in filter_repo_objects(names, allow_patterns=list(UPLOADED), ignore_patterns=list(NOT_UPLOADED)):
        raise _failure(
            root,
            repo_id,
            f"{name} is a link out of the run's folder, to {(folder / name).resolve()}: put a copy in its "
            "place",
        )


class Uploader:
    """Uploads a run while it goes on, from a thread of its own: each SAE when it is saved, the rest at the
    end.

    After a failure the thread waits for the end, where everything that is missing is tried once more.
    """

    def __init__(self, run_folder: str | Path, repo_id: str, *, waits: Sequence[float] = WAITS) -> None:
        self._run_folder, self._repo_id, self._waits = Path(run_folder), repo_id, waits
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._problem: str | None = "it was not tried"
        self._thread = threading.Thread(target=self._serve, name="hub", daemon=True)
        self._thread.start()

    def submit(self, sae: str) -> None:
        """Upload one SAE's folder, such as "resid_post_layer_3/trainer_0": when it is saved, and again when
        it is evaluated."""
        self._queue.put(sae)

    def finish(self, timeout: float = 3600.0) -> bool:
        """Upload what is missing, with the model card, and wait for it.

        False, and a warning with the command, if that failed.
        """
        self._queue.put(None)
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._problem = str(
                _failure(self._run_folder, self._repo_id, f"the hub was not done after {timeout:g} seconds")
            )
        if self._problem:
            log.warning("%s", self._problem)
        return self._problem is None

    def _serve(self) -> None:
        working = True
        while (sae := self._queue.get()) is not None:
            if working:
                try:
                    upload(
                        self._run_folder / sae, self._repo_id, run_folder=self._run_folder, waits=self._waits
                    )
                except UploadFailed as error:
                    working = False
                    log.warning("%s\nThe run goes on; the upload is tried again at its end.", error)
        try:
            log.info("Uploaded: %s", push(self._run_folder, self._repo_id, waits=self._waits))
            self._problem = None
        # a card that cannot be written (a full disk) must not take the run with it either
        except Exception as error:
            self._problem = str(
                error
                if isinstance(error, UploadFailed)
                else _failure(self._run_folder, self._repo_id, str(error))
            )


def _failure(run_folder: Path, repo_id: str, reason: str, may_pass: bool = False) -> UploadFailed:
    command = f"monosemy push {shlex.quote(str(run_folder))} {shlex.quote(repo_id)}"
    said = (
        f"Upload to {repo_id} failed: {reason}. Nothing is lost: {run_folder} is whole. To repeat it:\n  "
        f"  {command}"
    )
    return UploadFailed(said, may_pass=may_pass)


def _may_pass(error: Exception) -> bool:
    """Whether the same upload may work in a while."""
    status = status_of(error)
    if status is not None:
        return status >= 500 or status in (408, 409, 412, 429)  # 409, 412: another commit came in between
    if isinstance(error, ValueError | FileNotFoundError | PermissionError):  # a wrong name, a file of ours
        return False
    clients = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}
    return any(
        isinstance(cause, OSError | RuntimeError) or type(cause).__module__.split(".")[0] in clients
        for cause in causes(error)
    )


def _reason(error: Exception) -> str:
    status = status_of(error)
    if status is None:
        return without_secrets(f"{type(error).__name__}: {error}").rstrip(". ")
    return f"{REFUSALS.get(status, 'the hub answered with an error')} (HTTP {status})"
