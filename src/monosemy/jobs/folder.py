"""A run's folder while the run goes on: what is written of it, its trackers and its upload."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import platform
import shutil
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from monosemy.errors import TryAgain
from monosemy.jobs.hub import Uploader
from monosemy.jobs.memory import high_water, size
from monosemy.jobs.plan import Plan
from monosemy.jobs.trackers import Tracker, Wandb
from monosemy.system.files import append, read_json, write_json
from monosemy.system.redact import without_secrets
from monosemy.training.checkpoints import Checkpoint
from monosemy.training.sweep import Record
from monosemy.training.trainer import SAETrainer

log = logging.getLogger(__name__)

LAST_WORDS = 10.0  # seconds that a tracker has where a run is cut off


class Run:
    """A run's folder and what is known of it.

    Every file is written whole or not at all, but for metrics.jsonl, which grows.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.config, self.folder = plan, plan.config, plan.folder
        self.status: dict[str, Any] = {"status": "running", "reason": "", "saes": {}}
        self.facts: dict[str, Any] = {}
        self.trackers: list[Tracker] = []
        self.uploader: Uploader | None = None

    def open(
        self, saes: Sequence[dict[str, Any]], facts: dict[str, Any], checkpoint: Checkpoint | None
    ) -> None:
        """Write down what will be done, before the first step; of a run that goes on, what was recorded after
        its checkpoint is cut off. `saes` is what `told` says of each."""
        c = self.config
        self.folder.mkdir(parents=True, exist_ok=True)
        was = read_json(self.folder / "run.json") if checkpoint else {}
        self.facts = {
            "id": was.get("id") or uuid.uuid4().hex,  # under which trackers go on with the same runs
            "config": c.as_dict(),
            "command": [os.path.basename(sys.argv[0]), *sys.argv[1:]],
            "started": was.get("started") or time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "versions": versions(),
            "schedule": was.get("schedule") or dataclasses.asdict(self.plan.schedule),
            **facts,
        }
        self.write_facts({})
        self._cut_metrics(checkpoint)
        self.write_status("running", saes={sae["name"]: "running" for sae in saes})
        if c.use_wandb:
            group = self.folder.absolute().name
            self.trackers.append(
                Wandb(c.wandb_project, entity=c.wandb_entity, group=group, folder=self.folder)
            )
        if c.hf_repo_id:
            self.uploader = Uploader(self.folder, c.hf_repo_id, waits=c.retry_seconds)
        for tracker in self.trackers:
            tracker.start(self.facts, list(saes))

    def _cut_metrics(self, checkpoint: Checkpoint | None) -> None:
        """Cut off what metrics.jsonl has of steps after a checkpoint."""
        with open(self.folder / "metrics.jsonl", "ab") as file:
            there, wanted = file.tell(), checkpoint.state["metrics_bytes"] if checkpoint else 0
            if there < wanted:
                message = "%s had %d bytes at the checkpoint and has %d: records are missing"
                log.warning(message, file.name, wanted, there)
            file.truncate(min(there, wanted))

    def write_facts(self, more: dict[str, Any]) -> None:
        self.facts |= more
        write_json(self.folder / "run.json", without_secrets(self.facts))

    def write_status(self, status: str, reason: str = "", saes: dict[str, str] | None = None) -> None:
        self.status = {"status": status, "reason": reason, "saes": self.status["saes"] | (saes or {})}
        write_json(self.folder / "status.json", without_secrets(self.status))

    def read(self) -> None:
        """Read run.json and status.json; a run without a status is unknown."""
        self.facts = read_json(self.folder / "run.json")
        path = self.folder / "status.json"
        status = read_json(path, {})
        self.status = {"status": "unknown", "reason": "", "saes": {}} | status

    def finish(self, status: tuple[str, str]) -> tuple[str, str]:
        """Write and return the status of an evaluated run; a complete one needs its checkpoints no more."""
        self.write_status(*status)
        if status[0] == "complete" and not self.config.keep_checkpoints:
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        return status

    def write_memory(self, of: str, predicted: int, **more: Any) -> None:
        """Note the bytes that were predicted for a part of the run, and the most that were taken until
        now."""
        measured = peak_memory(self.plan)
        self.write_facts(
            {
                "memory": self.facts.get("memory", {})
                | more
                | {of: {"predicted": predicted, "measured": measured}}
            }
        )
        log.info("memory of the %s: %s at most, %s predicted", of, size(measured), size(predicted))

    def record(self, record: Record) -> None:
        """Append a line to metrics.jsonl, mirrored to the trackers."""
        append(self.folder / "metrics.jsonl", json.dumps(record) + "\n")
        for tracker in self.trackers:
            tracker.log(record)

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Yield where what is done here breaks off, say so.

        Before the folder was opened there is nothing to tell.
        """
        try:
            yield
        except BaseException as error:
            if self.facts:
                state = "interrupted" if isinstance(error, KeyboardInterrupt | TryAgain) else "failed"
                unfinished = {name: state for name, was in self.status["saes"].items() if was == "running"}
                try:
                    self.write_status(state, f"{type(error).__name__}: {error}", unfinished)
                except OSError as full:
                    log.error("%s is not up to date: %s", self.folder / "status.json", full)
                self.close(state)
            raise

    def close(self, status: str) -> None:
        """Let trackers and the upload end; a run that was cut off does not wait for the hub, and not long for
        trackers."""
        for tracker in self.trackers:
            tracker.finish(status, *[LAST_WORDS] * (status == "interrupted"))
        if self.uploader is not None and status != "interrupted":
            self.uploader.finish()


class Follower(Run):
    """The run as a rank sees it that does not lead: it writes its own SAEs, and nothing else of the
    folder."""

    def open(
        self, saes: Sequence[dict[str, Any]], facts: dict[str, Any], checkpoint: Checkpoint | None
    ) -> None: ...

    def write_facts(self, more: dict[str, Any]) -> None: ...

    def write_status(self, status: str, reason: str = "", saes: dict[str, str] | None = None) -> None: ...

    def write_memory(self, of: str, predicted: int, **more: Any) -> None: ...

    def record(self, record: Record) -> None: ...


def told(trainer: SAETrainer) -> dict[str, Any]:
    """Return what trackers are told of an SAE."""
    sae = trainer.sae
    config = {"architecture": sae.name, "d_sae": sae.d_sae, "lr": trainer.lr, "seed": trainer.spec.seed}
    return {"name": trainer.name, "config": {**config, **vars(sae.settings)}}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("monosemy", "torch", "transformers", "datasets", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a source tree that is not installed
            found[name] = "not installed"
    return found


def peak_memory(plan: Plan) -> int:
    """Return the most bytes that were held at a time: of the GPU's memory where one is used, else
    resident."""
    return high_water(torch.cuda if plan.gpu and torch.cuda.is_available() else None)
