"""What a run's folder holds of an earlier run, and whether this one may go on in it."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from monosemy.config import TrainConfig
from monosemy.errors import invalid
from monosemy.system.files import LOCK, path_of, read_json
from monosemy.system.redact import without_secrets

# settings of which a run goes on with other values
IGNORED_ON_RESUME = {
    "save_dir",
    "dry_run",
    "device",
    "use_wandb",
    "wandb_project",
    "wandb_entity",
    "hf_repo_id",
    "verbose",
    "resume",
    "checkpoint_every",
    "keep_checkpoints",
    "retry_seconds",
    "latent_shards",
}


def recorded_commit(folder: Path, config: TrainConfig) -> str | None:
    """Return the model's commit that a run in this folder was begun with; None where there is no run, or one
    of another model or revision."""
    found = recorded(folder)
    if found is None or (found.get("model_name"), found.get("revision")) != (
        config.model_name,
        config.revision,
    ):
        return None
    model = read_json(folder / "run.json").get("model")
    commit = model.get("revision") if isinstance(model, dict) else None
    return commit if isinstance(commit, str) else None


def recorded_other(folder: Path, config: TrainConfig) -> str | None:
    """Return the commit of the other model that a run in this folder was begun with, as `recorded_commit`
    does."""
    found = recorded(folder)
    if found is None or found.get("diff_model") != config.diff_model:
        return None
    model = read_json(folder / "run.json").get("model")
    other = model.get("other") if isinstance(model, dict) else None
    commit = other.get("revision") if isinstance(other, dict) else None
    return commit if isinstance(commit, str) else None


def folder_of(c: TrainConfig) -> tuple[Path, str]:
    """Return the run's folder: `save_dir`, or one beside it where that one holds another model's or other
    architectures' run."""
    asked = path_of("save_dir", c.save_dir)
    there = recorded(asked)
    folder, note = asked, ""
    if there is not None and (there.get("model_name"), there.get("architectures")) != (
        c.model_name,
        list(c.architectures),
    ):
        named = asked if asked.name not in ("", "..") else Path(os.path.abspath(asked))
        name = re.sub(r"[^\w.-]+", "_", f"{named.name}_{c.model_name}_{'_'.join(c.architectures)}")
        folder = path_of("save_dir", str(named.with_name(name)))
        note = (
            f"{asked} holds a run of {there.get('model_name')} with {there.get('architectures')}; "
            f"this run goes to {folder}"
        )
    if os.path.lexists(folder) and not folder.is_dir():
        raise invalid(
            "save_dir", str(folder), "a folder", "this is a file, or a link to nothing; name another path"
        )
    if (
        recorded(folder) is None
        and folder.is_dir()
        and any(path.name not in (".run.json.part", LOCK) for path in folder.iterdir())
    ):
        raise invalid(
            "save_dir",
            str(folder),
            "a new or empty folder, or one that holds a run",
            "it holds other files; name another path",
        )
    parent = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise invalid(
            "save_dir",
            str(folder),
            "a folder that can be written",
            f"check permissions and space ({os.strerror(error.errno or 0)})",
        ) from error
    return folder, note


def recorded(folder: Path) -> dict | None:
    """Return the configuration of the run that a folder holds, if it holds one."""
    path = folder / "run.json"
    if not path.is_file():
        return None
    try:
        return dict(read_json(path)["config"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise invalid(
            "save_dir",
            str(folder),
            "a folder whose run.json can be read",
            f"name another, or repair it ({error})",
        ) from error


def check_same_run(folder: Path, config: TrainConfig) -> None:
    """Raises ValueError where a folder holds a run of another configuration."""
    found = recorded(folder)
    if found is None:
        return
    now = without_secrets(config.as_dict())  # as it was written
    # an older version's run.json lacks newer settings
    before = TrainConfig(save_dir=".").as_dict() | found
    changed = sorted(k for k in now.keys() - IGNORED_ON_RESUME if now[k] != before[k])
    if changed:
        was = ", ".join(f"{k}={before.get(k)!r}, now {now[k]!r}" for k in changed[:4])
        raise invalid(
            "save_dir",
            str(folder),
            "a folder for this configuration alone",
            f"it holds a run with another one ({was}); name another folder",
        )
