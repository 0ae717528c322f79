"""The one driver of training: a sweep over batches, with checkpoints and signals; and `fit`, which drives it
over an iterable.

B tokens, D d_in.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from monosemy.errors import EndOfData, TryAgain, invalid
from monosemy.limits import EVERY
from monosemy.ops import Workspace
from monosemy.recipe import MONOSEMY, Recipe
from monosemy.sae import SAE
from monosemy.schedule import Schedule
from monosemy.system.devices import checked_device
from monosemy.system.files import exclusive_lock
from monosemy.system.interrupts import Interrupts
from monosemy.training.checkpoints import Checkpoint, Checkpoints
from monosemy.training.sweep import Record, Sweep
from monosemy.training.trainer import OnNonfinite, SAESpec, SAETrainer


class TrainingLoop:
    """Trains a sweep to its last step, saves checkpoints, and stops at signals, at the end of the data and at
    faults of a source.

    `extra_state` returns what a checkpoint holds beside the sweep. Without `checkpoints` nothing is saved.
    """

    def __init__(
        self,
        sweep: Sweep,
        interrupts: Interrupts,
        *,
        checkpoints: Checkpoints | None = None,
        extra_state: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self.sweep, self.interrupts = sweep, interrupts
        self.checkpoints, self.extra_state = checkpoints, extra_state

    def run(
        self,
        batches: Callable[[], dict[Any, Tensor]],
        steps: int,
        *,
        resume_from: Checkpoint | None = None,
        log_steps: int = 100,
        on_record: Callable[[Record], None] = lambda record: None,
        before_step: Callable[[int], None] = lambda step: None,
    ) -> str:
        """Train up to `steps`. Returns "" where all steps were made, else why the data ended.

        `batches` raises EndOfData where it has no more, and TryAgain where a source broke off, before which a
        checkpoint is saved. Raises KeyboardInterrupt between two steps where a signal asked for it, after a
        checkpoint.
        """
        start = 0
        if resume_from is not None:
            start = resume_from.step
            self.sweep.load_checkpoint(resume_from)

        def next_batch() -> dict[Any, Tensor]:
            try:
                return batches()
            except TryAgain:
                self.save()
                raise

        def between_steps(step: int) -> None:
            before_step(step)
            if self.checkpoints and step > start and (self.checkpoints.due(step) or self.interrupts.asked):
                self.save()
            self.interrupts.raise_if_requested()

        ended = ""
        with self.interrupts.held():
            try:
                self.sweep.run(
                    next_batch,
                    steps,
                    start=start,
                    log_steps=log_steps,
                    on_record=on_record,
                    before_step=between_steps,
                )
            except EndOfData as end:
                ended = f"after {self.sweep.done} of {steps} steps: {end}"
            if self.checkpoints and self.sweep.done > start:
                self.save()  # whatever breaks off what comes next, nothing is trained again
                self.checkpoints.wait()  # before that needs memory and room on the disk
            self.interrupts.raise_if_requested()
        return ended

    def save(self) -> None:
        """Save a checkpoint of the steps that are done."""
        if self.checkpoints is not None:
            self.sweep.flush_metrics()
            state = {**self.sweep.state(), **self.extra_state()}
            self.checkpoints.save(self.sweep.done, self.sweep.state_dict(), state)


@dataclass(frozen=True)
class Fitted:
    """What `fit` returns: finished SAEs for raw activations, in the order of the specs, and the record of
    their training."""

    saes: list[SAE]
    metrics: list[Record]
    norm_factor: float
    status: str
    """"complete", "stopped_early" where the batches ran out, "failed" where an SAE's loss did not stay
    finite."""
    failed: dict[int, str]
    """By place in the list, why an SAE was stopped."""


def fit(
    batches: Iterable[Tensor],
    saes: Sequence[SAESpec],
    *,
    steps: int | None = None,
    normalize: bool = True,
    recipe: Recipe = MONOSEMY,
    bf16: bool = False,
    device: str | torch.device = "cpu",
    log_steps: int = 100,
    on_nonfinite: OnNonfinite = "stop",
    checkpoints: str | Path | None = None,
    checkpoint_every: int | None = None,
    **schedule: Any,
) -> Fitted:
    """Train SAEs on any iterable of activations [B, D], all on the same batches, without a language model.

    `steps` defaults to the number of batches, where they have one; `schedule` takes the keywords of
    `Schedule.of_run`. With `normalize` the first batches (up to 100, which are then trained on) measure
    sqrt(E ||x||^2), by which activations are divided and which is folded into the SAEs' weights at the end.
    `checkpoints` names a folder for checkpoints, every `checkpoint_every` steps (by default 1,000 on a CPU)
    or ten minutes, from which the same call goes on: batches must then be the same ones again, and those
    already trained on are skipped. SIGTERM and Ctrl-C save one first.
    Raises ValueError where the number of steps is unknown, batches are empty or no matrices, those that are
    measured are not finite, or the folder holds checkpoints of another call.
    """
    device = checked_device(device)
    steps = _check_arguments(batches, saes, steps, log_steps, checkpoint_every)
    every = checkpoint_every or (None if device.type == "cuda" else EVERY)
    store = Checkpoints(Path(checkpoints), every) if checkpoints else None
    checkpoint = store.newest() if store else None
    source = _Batches(batches, checkpoint, min(100, steps) if normalize else 1, normalize)
    B, D = source.shape
    plan = Schedule.of_run(steps, B, recipe=recipe, **schedule)
    specs = [dataclasses.replace(spec, init_from=None) for spec in saes]
    payload = json.dumps([specs, steps, schedule, recipe], default=vars)
    if checkpoint and checkpoint.state["told"] != payload:
        allowed = "a folder for these SAEs and this schedule alone"
        raise invalid("checkpoints", str(checkpoints), allowed, "name another folder")
    metrics: list[Record] = checkpoint.state["metrics"] if checkpoint else []
    workspace, interrupts = Workspace(), Interrupts()
    shared: dict[str, Any] = {"device": device, "recipe": recipe, "bf16": bf16, "workspace": workspace}
    shared |= {"norm_factor": source.norm_factor, "on_nonfinite": on_nonfinite}
    trainers = [SAETrainer(f"{i}", spec, D, plan, **shared) for i, spec in enumerate(saes)]
    sweep = Sweep({"": trainers})

    def extra_state() -> dict[str, Any]:
        return {"told": payload, "norm_factor": source.norm_factor, "metrics": metrics, "shape": (B, D)}

    loop = TrainingLoop(sweep, interrupts, checkpoints=store, extra_state=extra_state)
    options: dict[str, Any] = {"resume_from": checkpoint, "log_steps": log_steps, "on_record": metrics.append}
    with _on(device), _owned(store, interrupts):
        ended = loop.run(lambda: {"": source.next(device)}, steps, **options)
    status = "failed" if sweep.failed else "stopped_early" if ended else "complete"
    failed = {int(name): why for name, why in sweep.failed.items()}
    return Fitted([trainer.finished() for trainer in trainers], metrics, source.norm_factor, status, failed)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one, on which kernels and streams are made."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def _owned(store: Checkpoints | None, interrupts: Interrupts) -> Iterator[None]:
    """Lock the folder of checkpoints, and take signals; without checkpoints there is nothing to save at
    one."""
    if store is None:
        yield
        return
    with exclusive_lock(store.folder, "checkpoints"), interrupts, closing(store):
        yield


class _Batches:
    """The batches of `fit`: checked, scaled by their norm factor, and without those that a checkpoint has
    been trained on."""

    def __init__(
        self, batches: Iterable[Tensor], checkpoint: Checkpoint | None, measured: int, normalize: bool
    ) -> None:
        source = iter(batches)
        self.shape: tuple[int, int]
        self._stream: Iterator[Tensor]
        if checkpoint:
            self.norm_factor, self.shape = checkpoint.state["norm_factor"], checkpoint.state["shape"]
            self._stream = map(_checked, itertools.islice(source, checkpoint.step, None))
            return
        first = [_checked(x) for x in itertools.islice(source, measured)]
        if not first:
            raise invalid("batches", "empty", "at least one batch [B, D]", "pass activations")
        if normalize and not all(x.isfinite().all() for x in first):
            remedy = "find where infinities come from, or drop those rows"
            raise invalid("batches", "not finite", "finite activations", remedy)
        self.norm_factor = _norm_factor(first) if normalize else 1.0
        self.shape = len(first[0]), first[0].shape[1]
        self._stream = itertools.chain(first, map(_checked, source))

    def next(self, device: torch.device) -> Tensor:
        """Return the next batch, scaled, on a device. Raises EndOfData."""
        x_BD = next(self._stream, None)
        if x_BD is None:
            raise EndOfData("the batches ran out")
        return x_BD.to(device, torch.float32) / self.norm_factor


def _check_arguments(
    batches: Iterable[Tensor],
    saes: Sequence[SAESpec],
    steps: int | None,
    log_steps: int,
    checkpoint_every: int | None,
) -> int:
    """Return the number of steps. Raises ValueError for what `fit` cannot do."""
    if not saes:
        remedy = "say what to train, such as SAESpec('batch_top_k', d_sae=4096)"
        raise invalid("saes", saes, "one SAESpec or more", remedy)
    for field, value in (("steps", steps), ("log_steps", log_steps), ("checkpoint_every", checkpoint_every)):
        if value is not None and value < 1:
            raise invalid(field, value, "1 or more", "raise it")
    if steps is not None:
        return steps
    if not isinstance(batches, Sized):
        raise invalid(
            "steps", None, "a number of steps where the batches do not have a length", "pass steps="
        )
    return len(batches)


def _norm_factor(batches: Sequence[Tensor]) -> float:
    """Compute sqrt(E ||x||^2); 1 where everything is zero."""
    return (
        math.sqrt(sum(float(x.double().pow(2).sum()) for x in batches) / sum(len(x) for x in batches)) or 1.0
    )


def _checked(x: Tensor) -> Tensor:
    """Return a batch as it is. Raises ValueError for what is not [B, D]."""
    if not isinstance(x, Tensor) or x.ndim != 2 or not len(x):
        shape = getattr(x, "shape", type(x).__name__)
        raise invalid("batches", shape, "tensors [B, D]", "flatten leading dimensions first")
    return x
