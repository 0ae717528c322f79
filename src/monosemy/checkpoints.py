"""Checkpoints of a run: everything that its next step depends on, written so that any moment may be the last.

RUN/checkpoints/step_00001000/{state.json, MEMBER.safetensors, complete.json}

A checkpoint is written in a folder beside and renamed; complete.json, written last, holds each file's size and sha256. Two are kept.
Tensors are copied when a checkpoint is asked for and written by a thread, so that training goes on meanwhile.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

log = logging.getLogger(__name__)

KEEP = 2
SPARE = 1 << 20  # bytes of a file system that small files and its own records may need


class DiskFull(OSError):
    """There is no room for a file. What was there before is whole."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """How many steps were done."""
        return int(self.state["step"])

    def member(self, name: str) -> dict[str, Tensor]:
        """The tensors of one member."""
        return load_file(self.folder / _file(name))


class Checkpoints:
    """A run's checkpoints: written in the background, the newest whole one found again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
        self.pending: Future[None] | None = None

    def save(self, step: int, members: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Keep what the run is after `step` steps. Returns once it is copied; raises what the writing of the one before met."""
        self.wait()
        copies = {name: _copy(tensors) for name, tensors in members.items()}
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        self.submit(lambda: self._write(step, copies, {"step": step, **state}))

    def submit(self, job: Callable[[], None]) -> None:
        """Have the thread write something else, after what it was asked for before."""
        before = self.pending

        def both() -> None:
            if before is not None:
                before.result()
            job()

        self.pending = self.thread.submit(both)

    def wait(self) -> None:
        """Until everything is written. Raises DiskFull or OSError where it could not be."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Write what is under way and end the thread."""
        try:
            self.wait()
        finally:
            self.thread.shutdown()

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint whose files are all as they were written; a damaged one is named and passed over."""
        for folder in sorted(self.folder.glob("step_*"), reverse=True):
            why = _damage(folder)
            if why is None:
                return Checkpoint(folder, json.loads((folder / "state.json").read_text(encoding="utf-8")))
            log.warning("%s is not whole and was passed over: %s", folder, why)
        return None

    def _write(self, step: int, members: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        final = self.folder / f"step_{step:08d}"
        part = self.folder / f".{final.name}.part"
        needed = sum(t.numel() * t.element_size() for tensors in members.values() for t in tensors.values()) + SPARE
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(part, ignore_errors=True)
            free = shutil.disk_usage(self.folder).free
            if free < needed:
                raise OSError(errno.ENOSPC, "no space")
            part.mkdir()
            for name, tensors in members.items():
                save_file(dict(tensors), part / _file(name))
            (part / "state.json").write_text(json.dumps(state), encoding="utf-8")
            files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(part.iterdir())}
            for path in part.iterdir():
                _sync(path)
            (part / "complete.json").write_text(json.dumps(files, indent=1), encoding="utf-8")
            _sync(part / "complete.json")
            _sync(part)
            shutil.rmtree(final, ignore_errors=True)
            part.rename(final)
            _sync(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(part, ignore_errors=True)
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error).lower():
                free = shutil.disk_usage(self.folder).free
                raise DiskFull(
                    errno.ENOSPC, f"a checkpoint needs {needed:,} bytes and {free:,} are free; make room or move the run", str(final)
                ) from error
            raise
        for old in sorted(self.folder.glob("step_*"))[:-KEEP]:
            shutil.rmtree(old)
        for litter in self.folder.glob(".step_*.part"):
            shutil.rmtree(litter)


def _copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the host, which for those of a GPU may still be on their way."""
    copies = {}
    for name, tensor in tensors.items():
        on_gpu = tensor.is_cuda
        copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu).copy_(tensor.detach(), non_blocking=on_gpu)
    return copies


def _file(member: str) -> str:
    return member.replace("/", ".") + ".safetensors"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Until the file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _damage(folder: Path) -> str | None:
    """What a checkpoint lacks to be whole, or None."""
    try:
        files = json.loads((folder / "complete.json").read_text(encoding="utf-8"))
        for name, wanted in files.items():
            path = folder / name
            if path.parent != folder or path.stat().st_size != wanted["bytes"] or _sha256(path) != wanted["sha256"]:
                return f"{name} is not as it was written"
        return None if "state.json" in files else "state.json is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
