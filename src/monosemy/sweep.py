"""The grid of SAEs and the one loop that trains it, on activations of a language model or of anywhere.

B tokens, D d_in.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from monosemy.checkpoints import Checkpoint, Checkpoints
from monosemy.config import TrainConfig, invalid
from monosemy.devices import checked_device
from monosemy.files import exclusive_lock
from monosemy.interrupts import Interrupts
from monosemy.ops import Workspace
from monosemy.recipe import MONOSEMY, Recipe
from monosemy.sae import SAE, architecture
from monosemy.schedule import Schedule
from monosemy.training import OnNonfinite, SAESpec, SAETrainer, StepMetrics, group_trainers

Record = dict[str, Any]


def grid(config: TrainConfig, init_from: SAE | None = None) -> list[SAESpec]:
    """Every architecture at every sparsity, width, learning rate and seed of a configuration, in dictionary_learning's order."""
    specs = []
    for seed, width, lr in itertools.product(config.random_seeds, config.dictionary_widths, config.learning_rates or (None,)):
        for name in config.architectures:
            kind = architecture(name)
            offered = {n: getattr(config, n) for n in ("auxk_alpha", "bandwidth", "sparsity_penalty", "l0_loss", "group_fractions")}
            settings = {n: v for n, v in offered.items() if n in kind.Settings.__dataclass_fields__}
            specs += [SAESpec(name, width, lr, seed, settings | {kind.sparsity: value}, init_from) for value in config.sparsities(name)]
    return specs


class Sweep:
    """SAEs in training, by site, on batches that all SAEs of a site share."""

    def __init__(self, members: Mapping[Any, Sequence[SAETrainer]]) -> None:
        self.members = members
        self.groups = group_trainers(member for group in members.values() for member in group)
        self.failed: dict[str, str] = {}  # member -> why it was stopped
        self.done = 0  # steps
        self._sent: list[tuple[int, int, SAETrainer, StepMetrics]] = []
        self._on_record: Callable[[Record], None] = lambda record: None

    def run(
        self,
        batches: Callable[[], dict[Any, Tensor]],
        steps: int,
        *,
        log_steps: int = 100,
        start: int = 0,
        on_record: Callable[[Record], None] = lambda record: None,
        before_step: Callable[[int], None] = lambda step: None,
    ) -> None:
        """Train from step `start` to `steps`. A record of each SAE is made every `log_steps` steps and after the last; records only look.

        On a GPU a record's numbers are read when the next one has been sent, so that no step waits for them. An SAE whose loss or
        gradient is not finite keeps the weights that it had, and is named in `failed` when its numbers are read; the others go on.
        Where none is left, training ends. `done` counts the steps that were made.
        """
        self._on_record, self.done = on_record, start
        site_of = {member.name: site for site, group in self.members.items() for member in group}
        try:
            for step in range(start, steps):
                if len(self.failed) == len(site_of):
                    break
                before_step(step)
                of_site = batches()
                for group in self.groups:
                    group.step({member.name: of_site[site_of[member.name]] for member in group.members}, step)
                self.done = step + 1
                if step % log_steps == 0 or step == steps - 1:
                    self.settle()
                    self._sent = [(step, len(x), m, m.record(x)) for site, x in of_site.items() for m in self.members[site]]
                    if not any(group.captured for group in self.groups):
                        self.settle()
        finally:
            self.settle()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """By member, everything that its next step depends on."""
        return {member.name: member.state() for group in self.members.values() for member in group}

    def restore(self, kept: Checkpoint) -> None:
        """Go on from a checkpoint of an equal sweep."""
        self.failed = dict(kept.state["failed"])
        for member in (member for group in self.members.values() for member in group):
            member.restore(kept.member(member.name))

    def settle(self) -> None:
        """Read the numbers that are under way."""
        while self._sent:
            step, batch, member, late = self._sent.pop(0)
            numbers, why = late.read()
            if why:
                self.failed.setdefault(member.name, why)
            else:
                self._on_record({"step": step, "tokens": (step + 1) * batch, "sae": member.name} | numbers)


@dataclass(frozen=True)
class Fitted:
    """What `fit` gives: finished SAEs for raw activations, in the order of the specs, and the record of their training."""

    saes: list[SAE]
    metrics: list[Record]
    norm_factor: float
    status: str  # "complete", "stopped_early" where the batches ran out, "failed" where an SAE's loss did not stay finite
    failed: dict[int, str]  # which SAE, by its place in the list, and why


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
    checkpoint_every: int = 1000,
    **schedule: Any,
) -> Fitted:
    """Train SAEs on any iterable of activations [B, D], all on the same batches, without a language model.

    `steps` defaults to the number of batches, where they have one; `schedule` takes what `Schedule.of_run` does. With `normalize`
    the first batches (up to 100, which are then trained on) measure sqrt(E ||x||^2), which activations are divided by and which is
    folded into the SAEs' weights at the end.
    `checkpoints` names a folder to keep checkpoints in, every `checkpoint_every` steps or ten minutes, and to go on from: batches must
    then be the same ones again, and those that were trained on are passed over. SIGTERM and Ctrl-C save one first.
    Raises ValueError where the number of steps is not known, batches are empty or no matrices, those that are measured are not finite,
    or the folder holds checkpoints of something else.
    """
    device = checked_device(device)
    if not saes:
        raise invalid("saes", saes, "one SAESpec or more", "say what to train, such as SAESpec('batch_top_k', d_sae=4096)")
    for field, value in (("steps", steps), ("log_steps", log_steps), ("checkpoint_every", checkpoint_every)):
        if value is not None and value < 1:
            raise invalid(field, value, "1 or more", "raise it")
    if steps is None:
        if not hasattr(batches, "__len__"):
            raise invalid("steps", None, "a number of steps where the batches do not have a length", "pass steps=")
        steps = len(batches)  # type: ignore[arg-type]
    store = Checkpoints(Path(checkpoints), checkpoint_every) if checkpoints else None
    kept = store.newest() if store else None
    source = iter(batches)
    stream: Iterator[Tensor]
    if kept:
        start, factor, metrics, (B, D) = kept.step, kept.state["norm_factor"], kept.state["metrics"], kept.state["shape"]
        stream = (_checked(x) for x in itertools.islice(source, start, None))
    else:
        first = [_checked(x) for x in itertools.islice(source, min(100, steps) if normalize else 1)]
        if not first:
            raise invalid("batches", "empty", "at least one batch [B, D]", "pass activations")
        if normalize and not all(x.isfinite().all() for x in first):
            raise invalid("batches", "not finite", "finite activations", "find where infinities come from, or drop those rows")
        start, factor, metrics, (B, D) = 0, _norm_factor(first) if normalize else 1.0, [], first[0].shape
        stream = itertools.chain(first, (_checked(x) for x in source))
    plan = Schedule.of_run(steps, B, recipe=recipe, **schedule)
    how: dict[str, Any] = {"device": device, "recipe": recipe, "bf16": bf16, "norm_factor": factor, "on_nonfinite": on_nonfinite}
    told = json.dumps([[dataclasses.replace(spec, init_from=None) for spec in saes], plan, recipe], default=vars)
    if kept and kept.state["told"] != told:
        raise invalid("checkpoints", str(checkpoints), "a folder for these SAEs and this schedule alone", "name another folder")
    scratch, interrupts = Workspace(), Interrupts()
    members = [SAETrainer(f"{i}", spec, D, plan, scratch=scratch, **how) for i, spec in enumerate(saes)]
    sweep, status = Sweep({"": members}), "complete"
    if kept:
        sweep.restore(kept)

    def keep(store: Checkpoints) -> None:
        sweep.settle()
        state = {"told": told, "norm_factor": factor, "metrics": metrics, "shape": (B, D), "failed": sweep.failed}
        store.save(sweep.done, sweep.state(), state)

    def before_step(step: int) -> None:
        if store and step > start and (store.due(step) or interrupts.asked):
            keep(store)
        interrupts.obey()

    with ExitStack() as ending:
        if device.type == "cuda":
            ending.enter_context(torch.cuda.device(device))  # kernels and streams are made on the current one
        if store:
            for context in (exclusive_lock(store.folder, "checkpoints"), interrupts, closing(store), interrupts.held()):
                ending.enter_context(context)
        try:
            sweep.run(
                lambda: {"": next(stream).to(device, torch.float32) / factor},
                steps,
                start=start,
                log_steps=log_steps,
                on_record=metrics.append,
                before_step=before_step,
            )
        except StopIteration:
            status = "stopped_early"
        if store and sweep.done > start:
            keep(store)
        interrupts.obey()
    failed = {int(name): why for name, why in sweep.failed.items()}
    return Fitted([member.finished() for member in members], metrics, factor, "failed" if failed else status, failed)


def _norm_factor(batches: Sequence[Tensor]) -> float:
    """sqrt(E ||x||^2), or 1 where everything is zero."""
    return math.sqrt(sum(float(x.double().pow(2).sum()) for x in batches) / sum(len(x) for x in batches)) or 1.0


def _checked(x: Tensor) -> Tensor:
    if not isinstance(x, Tensor) or x.ndim != 2 or not len(x):
        raise invalid("batches", getattr(x, "shape", type(x).__name__), "tensors [B, D]", "flatten leading dimensions first")
    return x
