"""Checkpoints of a run: everything that its next step depends on, written so that any moment may be the last.

RUN/checkpoints/step_00001000/{state.json, SAE.safetensors, complete.json}

A checkpoint is written in a folder beside and renamed; complete.json, written last, holds each file's size
and sha256. Two are kept. On a CPU tensors are copied when a checkpoint is asked for and written by a thread,
so that training goes on meanwhile. A GPU's may be more than the host has room for: they pass through one
staging buffer, an SAE at a time, while training waits, and checkpoints are made so seldom that this is 2 % of
the time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from monosemy.limits import EVERY, STAGING
from monosemy.system.files import check_disk_space, read_json, sync
from monosemy.system.ranks import ALONE, Ranks

log = logging.getLogger(__name__)

KEEP = 2
SPARE = 1 << 20  # bytes of a file system that small files and its own records may need
SECONDS = 600  # between two checkpoints at most
SHARE = 0.02  # of the time that a GPU's checkpoints may take, since training waits for them


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """How many steps were done."""
        return int(self.state["step"])

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Load the tensors of one SAE."""
        return load_file(self.folder / _file(name))

    def opened(self, name: str) -> Mapping[str, Tensor]:
        """Open the tensors of one SAE, each of which is loaded when it is asked for."""
        return _Opened(self.folder / _file(name))


class _Opened(Mapping[str, Tensor]):
    def __init__(self, path: Path) -> None:
        self.file = safe_open(path, "pt")

    def __getitem__(self, name: str) -> Tensor:
        return self.file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.file.keys())

    def __len__(self) -> int:
        return len(self.file.keys())


class Checkpoints:
    """A run's checkpoints: written in the background, the newest whole one found again.

    What cannot be written is logged: the ones before are whole, and training need not end for it. Of several
    ranks each writes its own SAEs' files, and rank 0 completes a checkpoint once all are there.
    """

    def __init__(self, folder: Path, every: int | None = EVERY, ranks: Ranks = ALONE) -> None:
        """Without `every` they are made by time alone."""
        self.folder, self.every, self.ranks = folder, every, ranks
        self.last, self.step = time.monotonic(), -1  # when and at which step one was made
        self.waited = 0.0  # seconds that training waited for the last one
        self.staging = Staging(STAGING)
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
        self.pending: list[Future[None]] = []

    def due(self, step: int) -> bool:
        """Whether one is made before this step, on every rank."""
        return self.every is not None and step % self.every == 0

    def overdue(self) -> bool:
        """Whether one should be made by this process's clock: after ten minutes, or so long that waiting for
        a GPU's stays a small share."""
        return time.monotonic() - self.last > max(SECONDS, self.waited / SHARE)

    def save(self, step: int, saes: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Keep what the run is after `step` steps.

        Returns once it is copied, which waits for the one before to be written.
        """
        self.wait()
        if step == self.step:
            return
        text = json.dumps({"step": step, **state})  # now: what it was made of goes on growing
        if any(tensor.is_cuda for tensors in saes.values() for tensor in tensors.values()):
            began = time.monotonic()
            self.submit(lambda: self._write(step, saes, text))
            self.wait()
            self.waited = time.monotonic() - began
        else:
            copies = {name: {n: t.detach().clone() for n, t in of.items()} for name, of in saes.items()}
            self.submit(lambda: self._write(step, copies, text))
        self.last, self.step = time.monotonic(), step

    def submit(self, job: Callable[[], None]) -> None:
        """Have the thread write something else, after what it was asked for before."""
        self.pending.append(self.thread.submit(job))

    def wait(self) -> None:
        """Wait until everything is written."""
        while self.pending:
            try:
                self.pending.pop(0).result()
            except (OSError, SafetensorError) as error:
                log.error("not written: %s", error)

    def close(self) -> None:
        """Write what is under way and end the thread."""
        self.wait()
        self.thread.shutdown()

    def newest(self) -> Checkpoint | None:
        """Return the newest checkpoint whose files are all as they were written; a damaged one is named and
        passed over."""
        return self.ranks.first(self._newest)

    def _newest(self) -> Checkpoint | None:
        for folder in sorted(self.folder.glob("step_*"), reverse=True):
            why = _damage(folder)
            if why is None:
                return Checkpoint(folder, read_json(folder / "state.json"))
            log.warning("%s is not whole and was passed over: %s", folder, why)
        return None

    def delete(self) -> None:
        """Take all of them away."""
        self.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, step: int, saes: Mapping[str, Mapping[str, Tensor]], state: str) -> None:
        final = self.folder / f"step_{step:08d}"
        part = self.folder / f".{final.name}.part"
        try:
            files = self._write_files(final, part, saes, state)
            if not self.ranks.leads:
                return
            with check_disk_space(final, SPARE):
                (part / "complete.json").write_text(json.dumps(files, indent=1), encoding="utf-8")
                sync(part / "complete.json")
                sync(part)
                shutil.rmtree(final, ignore_errors=True)  # only a damaged one can be there
                part.rename(final)
                sync(self.folder)
        finally:
            if self.ranks.leads:
                shutil.rmtree(part, ignore_errors=True)
        found = sorted(self.folder.glob("step_*"))
        # a later one was passed over: the run went on from before it
        newest_two = [folder for folder in found if folder <= final][-KEEP:]
        for folder in {*found, *self.folder.glob(".step_*.part")}.difference(newest_two):
            shutil.rmtree(folder)

    def _write_files(
        self, final: Path, part: Path, saes: Mapping[str, Mapping[str, Tensor]], state: str
    ) -> dict[str, dict[str, Any]]:
        """Write this rank's SAEs, and on rank 0 the state. Returns sizes and digests of all ranks' files.

        Raises OSError on every rank where one of them could not write; none waits for it.
        """
        needed = sum(t.nbytes for tensors in saes.values() for t in tensors.values()) + SPARE
        files: dict[str, dict[str, Any]] = {}
        error: Exception | None = None
        try:
            if self.ranks.leads:
                shutil.rmtree(part, ignore_errors=True)
                with check_disk_space(final, needed):
                    part.mkdir(parents=True)
        except OSError as found:
            error = found
        self.ranks.gather(None, background=True)  # the folder is there now
        try:
            with check_disk_space(final, needed):
                for name, tensors in saes.items():
                    save_file({n: self.staging.to_host(t) for n, t in tensors.items()}, part / _file(name))
                if self.ranks.leads:
                    (part / "state.json").write_text(state, encoding="utf-8")
                for name in sorted([*map(_file, saes), *["state.json"] * self.ranks.leads]):
                    files[name] = {"bytes": (part / name).stat().st_size, "sha256": _sha256(part / name)}
                    sync(part / name)
        except (OSError, SafetensorError) as found:
            error = error or found
        of_ranks = self.ranks.gather((files, error and f"{type(error).__name__}: {error}"), background=True)
        if error is not None:
            raise error
        for rank, (_, why) in enumerate(of_ranks):
            if why:
                raise OSError(f"{final}: rank {rank}: {why}")
        return dict(sorted((name, facts) for of_rank, _ in of_ranks for name, facts in of_rank.items()))


class Staging:
    """Copies tensors from a GPU through one buffer of pinned memory, which is made when first needed.

    Pinning memory takes as long as filling it, and torch rounds each pinned tensor up to a power of two.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.buffer: Tensor | None = None

    def to_host(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the host that holds the same; one that is there already as it is."""
        source = tensor.detach()
        return self.through_buffer(source) if source.is_cuda else source

    def through_buffer(self, source: Tensor) -> Tensor:
        """Copy a tensor piece by piece."""
        if self.buffer is None:
            self.buffer = torch.empty(self.size, dtype=torch.uint8, pin_memory=source.is_cuda)
        host, flat = torch.empty(source.shape, dtype=source.dtype), source.contiguous().view(-1)
        count = max(self.size // source.element_size(), 1)
        staged = self.buffer[: count * source.element_size()].view(source.dtype)
        for piece, target in zip(flat.split(count), host.view(-1).split(count), strict=True):
            target.copy_(staged[: len(piece)].copy_(piece))
        return host


def _file(sae: str) -> str:
    return sae.replace("/", ".") + ".safetensors"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damage(folder: Path) -> str | None:
    """Return what a checkpoint lacks to be whole, or None."""
    try:
        files = read_json(folder / "complete.json")
        for name, wanted in files.items():
            path = folder / name
            if (
                path.parent != folder
                or path.stat().st_size != wanted["bytes"]
                or _sha256(path) != wanted["sha256"]
            ):
                return f"{name} is not as it was written"
        return None if "state.json" in files else "state.json is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"
