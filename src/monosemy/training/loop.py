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
from signal import Signals
from typing import Any

import torch
from torch import Tensor

from monosemy.errors import EndOfData, TryAgain, invalid, is_shared
from monosemy.families import Family
from monosemy.limits import EVERY
from monosemy.lm.site_groups import of_parts
from monosemy.ops import Workspace
from monosemy.recipe import MONOSEMY, Recipe
from monosemy.sae import SAE
from monosemy.schedule import Schedule
from monosemy.system.devices import checked_device
from monosemy.system.files import exclusive_lock
from monosemy.system.interrupts import Interrupts
from monosemy.training.checkpoints import Checkpoint, Checkpoints
from monosemy.training.readback import OnNonfinite
from monosemy.training.sweep import Record, Sweep
from monosemy.training.trainer import SAESpec, SAETrainer


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
        start = resume_from.step if resume_from else 0
        if resume_from:
            self.sweep.load_checkpoint(resume_from)

        def next_batch() -> dict[Any, Tensor]:
            try:
                return batches()
            except TryAgain as error:
                if self.sweep.ranks.size == 1 or is_shared(error):  # else not all ranks are here to save
                    self.save()
                raise

        agreement = self.sweep.ranks.agreement()

        def between_steps(step: int) -> None:
            before_step(step)
            store, signal = self.checkpoints, self.interrupts.asked or 0
            overdue, asked = agreement(store is not None and store.overdue(), signal)
            if store and step > start and (overdue or asked or store.due(step)):
                self.save()
            if asked:  # by now of every rank, so that all end with the same checkpoint
                self.interrupts.asked_elsewhere = Signals(asked)
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
            agreement.result()
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
    norm_factors: tuple[float, ...]
    """Of each part of a batch: of a transcoder's x and y, of a crosscoder's sources."""
    status: str
    """"complete", "stopped_early" where the batches ran out, "failed" where an SAE's loss did not stay
    finite."""
    failed: dict[int, str]
    """By place in the list, why an SAE was stopped."""

    @property
    def norm_factor(self) -> float:
        """Of what is read; of several sources the first's."""
        return self.norm_factors[0]

    @property
    def target_norm_factor(self) -> float | None:
        """Of what transcoders reconstruct; None where batches had one part."""
        return self.norm_factors[1] if len(self.norm_factors) > 1 else None


Parts = tuple[Tensor, ...]


def fit(
    batches: Iterable[Tensor | Parts],
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
    """Train SAEs on any iterable of activations [B, D], all on the same batches, without a language model;
    or transcoders (`SAESpec(..., transcode=True)`) on pairs of what a component reads, [B, d_in], and what it
    writes, [B, d_out]; crosscoders (crosscode=True) on tuples of what all sources have on the same tokens;
    cross-layer transcoders (cross_layer=True, too) on what all layers read, then what all write.

    `steps` defaults to the number of batches, where they have one; `schedule` takes the keywords of
    `Schedule.of_run`. With `normalize` the first batches (up to 100, which are then trained on) measure
    sqrt(E ||x||^2), of each part of a tuple, by which activations are divided and which is folded into the
    SAEs' weights at the end.
    `checkpoints` names a folder for checkpoints, every `checkpoint_every` steps (by default 1,000 on a CPU)
    or ten minutes, from which the same call goes on, with the same batches; those already trained on are
    skipped. SIGTERM and Ctrl-C save one first.
    Raises ValueError for an unknown number of steps; batches that are empty, no matrices, of a wrong number
    of parts or, where measured, not finite; and for checkpoints of another call.
    """
    device = checked_device(device)
    steps = _check_arguments(batches, saes, steps, log_steps, checkpoint_every)
    every = checkpoint_every or (None if device.type == "cuda" else EVERY)
    store = Checkpoints(Path(checkpoints), every) if checkpoints else None
    checkpoint = store.newest() if store else None
    source = _Batches(batches, checkpoint, min(100, steps) if normalize else 1, normalize)
    _check_kinds(saes, len(source.widths) - 1)
    B, *widths = source.widths
    plan = Schedule.of_run(steps, B, recipe=recipe, **schedule)
    specs = [dataclasses.replace(spec, init_from=None) for spec in saes]
    payload = json.dumps([specs, steps, schedule, recipe], default=_told)
    if checkpoint and checkpoint.state["told"] != payload:
        allowed = "a folder for these SAEs and this schedule alone"
        raise invalid("checkpoints", str(checkpoints), allowed, "name another folder")
    metrics: list[Record] = checkpoint.state["metrics"] if checkpoint else []
    workspace, interrupts = Workspace(), Interrupts()
    shared: dict[str, Any] = {"device": device, "recipe": recipe, "bf16": bf16, "workspace": workspace}
    shared |= {"on_nonfinite": on_nonfinite, "norm_factors": source.norm_factors}
    trainers = [SAETrainer(f"{i}", spec, widths, plan, **shared) for i, spec in enumerate(saes)]
    sweep = Sweep({"": trainers})
    state = {"told": payload, "metrics": metrics, **source.state()}  # metrics grow
    loop = TrainingLoop(sweep, interrupts, checkpoints=store, extra_state=lambda: state)
    options: dict[str, Any] = {"resume_from": checkpoint, "log_steps": log_steps, "on_record": metrics.append}
    with _on(device), _owned(store, interrupts):
        ended = loop.run(lambda: {"": source.next(device)}, steps, **options)
    saved, failed = [t.finished() for t in trainers], {int(i): why for i, why in sweep.failed.items()}
    status = "failed" if failed else "stopped_early" if ended else "complete"
    return Fitted(saved, metrics, source.norm_factors, status, failed)


def _told(of_call: Any) -> dict[str, Any]:
    """Return what a checkpoint says of an argument; what autoencoders do not have is not said of them."""
    told = dict(vars(of_call))
    if isinstance(of_call, SAESpec):
        defaults = vars(Family())
        told = {name: value for name, value in told.items() if value != defaults.get(name, ...)}
    return told


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
    """The batches of `fit`: checked, scaled by their norm factors, and without those that a checkpoint has
    been trained on. Several parts lie side by side."""

    def __init__(
        self,
        batches: Iterable[Tensor | Parts],
        checkpoint: Checkpoint | None,
        measured: int,
        normalize: bool,
    ) -> None:
        source = iter(batches)
        self.widths: tuple[int, ...]  # B, and the width of each part
        self.norm_factors: tuple[float, ...]
        self._stream: Iterator[list[Tensor]]
        if checkpoint:
            self.widths = tuple(checkpoint.state["shape"])
            self.norm_factors = of_parts(checkpoint.state["norm_factor"])
            self._stream = map(self._checked, itertools.islice(source, checkpoint.step, None))
            return
        parts = next(source, None)
        if parts is None:
            raise invalid("batches", "empty", "at least one batch [B, D]", "pass activations")
        self.widths = (0, *(x.shape[1] for x in _matrices(parts)))
        rest = itertools.islice(source, measured - 1)
        first = [self._checked(parts) for parts in itertools.chain([parts], rest)]
        if normalize and not all(x.isfinite().all() for parts in first for x in parts):
            remedy = "find where infinities come from, or drop those rows"
            raise invalid("batches", "not finite", "finite activations", remedy)
        self.norm_factors = tuple(
            _norm_factor(of_part) if normalize else 1.0 for of_part in zip(*first, strict=True)
        )
        self.widths = (len(first[0][0]), *self.widths[1:])
        self._stream = itertools.chain(first, map(self._checked, source))

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint needs to know."""
        factors = self.norm_factors
        return {"norm_factor": factors[0] if len(factors) == 1 else factors, "shape": self.widths}

    def next(self, device: torch.device) -> Tensor:
        """Return the next batch, scaled, on a device. Raises EndOfData."""
        parts = next(self._stream, None)
        if parts is None:
            raise EndOfData("the batches ran out")
        scaled = [
            x.to(device, torch.float32) / factor for x, factor in zip(parts, self.norm_factors, strict=True)
        ]
        return scaled[0] if len(scaled) == 1 else torch.cat(scaled, 1)

    def _checked(self, batch: Tensor | Parts) -> list[Tensor]:
        """Return a batch's matrices. Raises ValueError for what is not of the first batch's kind and
        widths."""
        parts = _matrices(batch)
        widths = tuple(x.shape[1] for x in parts)
        if widths != self.widths[1:]:
            raise invalid(
                "batches", f"widths {widths}", f"those of the first, {self.widths[1:]}", "correct it"
            )
        return parts


def _check_kinds(saes: Sequence[SAESpec], parts: int) -> None:
    """Raises ValueError where batches of so many parts are not what is trained takes."""
    found = "tensors" if parts == 1 else "pairs" if parts == 2 else f"tuples of {parts}"
    for spec in saes:
        if spec.cross_layer and (parts < 4 or parts % 2):
            remedy = "pass tuples (x_0, x_1, .., y_0, y_1, ..)"
            allowed = "tuples of what all layers read, then of what all write, for cross-layer transcoders"
            raise invalid("batches", found, allowed, remedy)
        if spec.transcode and not spec.cross_layer and parts != 2:
            remedy = "pass tuples (x, y)"
            raise invalid("batches", found, "pairs (x [B, d_in], y [B, d_out]) for transcoders", remedy)
        if spec.crosscode and parts < 2:
            remedy = "pass a tuple of the activations of all sources"
            raise invalid("batches", found, "tuples of two or more [B, D] for crosscoders", remedy)
        if parts > 1 and not (spec.transcode or spec.crosscode):
            allowed = "tensors [B, D] for an autoencoder"
            remedy = "set transcode=True or crosscode=True in its SAESpec, or pass x alone"
            raise invalid("batches", found, allowed, remedy)


def _check_arguments(
    batches: Iterable[Tensor | Parts],
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


def _matrices(batch: Tensor | Parts) -> list[Tensor]:
    """Return the matrix of a batch, or those of a tuple. Raises ValueError for anything else."""
    parts = list(batch) if isinstance(batch, tuple | list) else [batch]
    for x in parts:
        if not isinstance(x, Tensor) or x.ndim != 2 or not len(x):
            shape = tuple(getattr(x, "shape", ())) or type(x).__name__
            raise invalid("batches", shape, "tensors [B, D]", "flatten leading dimensions first")
    if len({len(x) for x in parts}) != 1:
        rows = " and ".join(str(len(x)) for x in parts)
        allowed = "matrices of equally many rows, a row of each for a token"
        raise invalid("batches", f"{rows or 'no'} rows", allowed, "pass (x, y), or all sources")
    return parts
