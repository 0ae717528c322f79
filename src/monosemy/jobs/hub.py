"""A run on the Hugging Face hub: upload with retries, and the model card.

A failed upload never costs a run: the folder on disk is whole, and the error names the command that repeats
the upload. The token is the hub library's own (HF_TOKEN or `hf auth login`); it is no argument here, so it
can be in no log.
"""

from __future__ import annotations

import html
import json
import logging
import queue
import random
import re
import shlex
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub  # its own names are looked up when they are used: importing it costs little

from monosemy.system.http import causes, limit_waits, retry, retry_after, status_of
from monosemy.system.redact import without_secrets

log = logging.getLogger(__name__)

SAE_FILES = ("sae.safetensors", "config.json", "ae.pt", "eval_results.json")
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
WAITS = (
    1.0,
    2.0,
    4.0,
    8.0,
    16.0,
    32.0,
)  # seconds before each further try, each drawn from half to one and a half times that
SILENCE = 60.0  # seconds without a byte after which a request has failed
LONGEST_WAIT = 120.0  # whatever the hub's Retry-After asks for
HUB_NAMES = {
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"
}  # models that come from a package, under their names on the hub
PLOTS = {
    "loss_recovered": "Loss recovered against L0",
    "fvu": "Fraction of variance unexplained against L0",
    "alive": "Share of live latents",
    "training_curves": "Training curves",
    "firing_frequencies": "Firing frequencies",
}
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

    Raises `UploadFailed`.
    """
    run_folder = Path(run_folder)
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
        except (
            Exception
        ) as error:  # a card that cannot be written (a full disk) must not take the run with it either
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


# The model card


def model_card(run_folder: str | Path, repo_id: str = "USER/NAME") -> str:
    """The README.md of a run: what it is, every SAE with its numbers, the plots, how to load one, where it
    comes from, what it is not.

    Everything is read from the run's folder, whatever part of it exists. Text from names and settings is
    escaped.
    """
    folder = Path(run_folder)
    run = without_secrets(_read(folder / "run.json"))
    config = run.get("config", {})
    lines = (
        (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
        if (folder / "rows.jsonl").exists()
        else []
    )
    by_sae = {row["sae"]: row for row in map(json.loads, lines)}
    for path in sorted(
        folder.glob("*/trainer_*/config.json")
    ):  # saved and not evaluated: in the table with nothing but its name
        by_sae.setdefault(
            path.parent.relative_to(folder).as_posix(), {"sae": path.parent.relative_to(folder).as_posix()}
        )
    rows = list(by_sae.values())
    sections = [
        _front_matter(config, rows),
        _summary(run, rows, _read(folder / "status.json")),
        "## Results\n\n" + _table(rows) if rows else "",
        "\n\n".join(
            f"![{title}](plots/{name}.png)"
            for name, title in PLOTS.items()
            if (folder / "plots" / f"{name}.png").exists()
        ),
        _loading(repo_id, next(iter(rows), {}), config, _read(folder / "status.json")),
        _limits(config, rows),
        _provenance(run),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _front_matter(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """YAML, in which every JSON string is a string."""
    tags = ["sparse-autoencoder", "sae", "mechanistic-interpretability", "monosemy"]
    tags += sorted({row["architecture"] for row in rows if "architecture" in row})
    lines = ["library_name: monosemy", "tags:", *(f"- {json.dumps(tag)}" for tag in tags)]
    model = config.get("model_name", "")
    for key, name in (("base_model", HUB_NAMES.get(model, model)), ("datasets", config.get("dataset"))):
        if (
            name and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()
        ):  # a folder is not on the hub
            lines += [f"{key}:", f"- {json.dumps(name)}"]
    return "\n".join(["---", *lines, "---"])


def _summary(run: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], status: Mapping[str, Any]) -> str:
    config = run.get("config", {})
    tokens = run.get("training", {}).get("tokens", config.get("num_tokens"))
    sites = list(dict.fromkeys(row["site"] for row in rows if "site" in row))
    names = list(dict.fromkeys(row["architecture"] for row in rows if "architecture" in row))
    model = config.get("model_name", "a language model")
    text = (
        f"# Sparse autoencoders on {_text(model)}\n\n"
        f"{len(rows)} sparse autoencoder{'s' if len(rows) != 1 else ''} (SAEs) on activations of "
        f"{_code(model)}"
        + (f", read at {', '.join(map(_code, sites))}" if sites else "")
        + (f"; architectures: {', '.join(map(_code, names))}" if names else "")
        + ". Each was trained"
        + (f" on {tokens:,} tokens" if isinstance(tokens, int) else "")
        + (f" of {_code(config['dataset'])}" if config.get("dataset") else "")
        + (
            f" mixed with {_code(config['chat_dataset'])}"
            if config.get("mixed_dataset") and config.get("chat_dataset")
            else ""
        )
        + " with monosemy."
    )
    state = status.get("status")
    if isinstance(state, str) and state != "complete":
        why = (
            "parts of its evaluation are missing"
            if state == "incomplete"
            else "it did not reach its planned end"
        )
        text += f"\n\n**The run's status is {_code(state)}: {why}.**"
    return text


COLUMNS: tuple[tuple[str, Callable[[Mapping[str, Any]], str]], ...] = (
    ("SAE", lambda row: _code(row["sae"])),
    ("site", lambda row: _code(row["site"])),
    ("architecture", lambda row: _code(row["architecture"])),
    ("latents", lambda row: f"{row['d_sae']:,}"),
    ("L0", lambda row: f"{row['l0']:.1f}"),
    (
        "loss recovered (zero ablation) [95 %]",
        lambda row: f"{row['loss_recovered_zero']:.4f}{_interval(row)}",
    ),
    ("KL", lambda row: f"{row['kl']:.4f}"),
    ("FVU", lambda row: f"{row['fvu']:.4f}" + (" †" if row.get("threshold_flag") else "")),
    ("alive", lambda row: f"{100 * row['frac_alive']:.1f} %"),
)


def _interval(row: Mapping[str, Any]) -> str:
    low, high = row.get("loss_recovered_zero_low"), row.get("loss_recovered_zero_high")
    return "" if low is None or high is None else f" [{low:.4f}, {high:.4f}]"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """All SAEs; a number that a row does not have is a dash, never 0."""

    def cell(write: Callable[[Mapping[str, Any]], str], row: Mapping[str, Any]) -> str:
        try:
            return write(row)
        except (KeyError, TypeError):  # absent, or null
            return "-"

    table = [
        [title for title, _ in COLUMNS],
        ["---"] * len(COLUMNS),
        *([cell(write, row) for _, write in COLUMNS] for row in rows),
    ]
    tokens = {row["tokens"] for row in rows if isinstance(row.get("tokens"), int)}
    measured = f" Measured on {max(tokens):,} held-out tokens." if tokens else ""
    flagged = any(row.get("threshold_flag") for row in rows)
    return "\n".join("| " + " | ".join(line) + " |" for line in table) + (
        "\n\nL0: active latents per token. Loss recovered: 1 = the model predicts as well with the "
        "reconstruction in place, "
        "0 = as badly as with the activations set to zero; in brackets its 95 % interval over re-draws of "
        "the text. "
        "KL: nats by which the next-token probabilities move. FVU: fraction of variance unexplained. "
        "Alive: latents that fired at least once."
        + measured
        + (" †: under its threshold this SAE does much worse than with exact top-k." if flagged else "")
    )


def _loading(
    repo_id: str, row: Mapping[str, Any], config: Mapping[str, Any], status: Mapping[str, Any]
) -> str:
    sae = row.get("sae", "SITE/trainer_0")
    unfinished = ", unfinished=True" if status.get("saes", {}).get(sae, "complete") != "complete" else ""
    where = f"{config.get('model_name', 'the model')} at {row.get('site', 'the site')}".replace("\n", " ")
    return f"""## Loading

```python
import monosemy

sae = monosemy.load({json.dumps(repo_id)}, {json.dumps(sae)}{unfinished})
latents = sae.encode(activations)         # [..., d_in] -> [..., d_sae]; raw activations of {where}
reconstruction = sae.decode(latents)      # [..., d_in]
```

With [dictionary_learning](https://github.com/saprmarks/dictionary_learning) instead of monosemy:

```python
from dictionary_learning.utils import load_dictionary
from huggingface_hub import snapshot_download

folder = snapshot_download({json.dumps(repo_id)}, allow_patterns={json.dumps(sae + "/*")})
ae, config = load_dictionary(folder + {json.dumps("/" + sae)}, device="cpu")
```"""


def _limits(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    points = [
        "These SAEs describe one model at these sites; other models, fine-tunes and layers need their own.",
        "A latent is a direction that helped to reconstruct activations. Nothing here says that it has one "
        "meaning, or any.",
        "The numbers come from held-out text of the training data. On other text, expect them to be worse.",
        "Loss recovered against zero ablation flatters: setting activations to zero does great harm. "
        "Compare SAEs by it, at equal L0.",
        "A latent that never fired on the held-out tokens may still fire on more of them.",
    ]
    if not config.get("keep_special_tokens", False):
        points.append(
            "Special tokens and the first position of a context were left out of training and evaluation."
        )
    if any("top_k_fvu" in row for row in rows):
        points.append(
            "TopK kinds are measured under their fixed threshold, which is how `encode` works unless told "
            "otherwise."
        )
    return "## Limits\n\n" + "\n".join(f"- {point}" for point in points)


def _provenance(run: Mapping[str, Any]) -> str:
    """Everything that run.json holds: short entries as a list, then the whole configuration."""
    if not run:
        return ""
    points = []
    for key, value in run.items():
        if key == "config":
            continue
        if isinstance(value, Mapping):
            value = ", ".join(
                f"{name} {json.dumps(item) if isinstance(item, list | dict) else item}"
                for name, item in value.items()
            )
        elif isinstance(value, list):
            value = shlex.join(map(str, value)) if key in ("command", "argv") else json.dumps(value)
        points.append(f"- {_text(key.replace('_', ' '))}: {_code(value)}")
    settings = json.dumps(run.get("config", {}), indent=2)
    details = ["<details><summary>Configuration</summary>", "", "```json", settings, "```", "", "</details>"]
    return "\n".join(["## Provenance", "", *points, "", *details])


def _text(value: Any) -> str:
    """A value as plain text in Markdown, also in a table."""
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", html.escape(" ".join(str(value).split()), quote=False))


def _code(value: Any) -> str:
    """A value as a code span, also in a table: the fence is longer than any run of backticks inside."""
    text = " ".join(str(value).split()).replace("|", r"\|")
    fence = "`" * (max((len(ticks) for ticks in re.findall(r"`+", text)), default=0) + 1)
    return (
        f"{fence} {text} {fence}" if text.startswith("`") or text.endswith("`") else f"{fence}{text}{fence}"
    )
