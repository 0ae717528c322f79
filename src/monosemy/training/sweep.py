"""The grid of SAEs that a configuration asks for, and their training side by side on shared batches."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from monosemy.config import SAEConfig, TrainConfig
from monosemy.errors import EndOfData, invalid
from monosemy.sae import SAE, architecture
from monosemy.schedule import Schedule
from monosemy.system.ranks import ALONE, Ranks
from monosemy.training.checkpoints import Checkpoint
from monosemy.training.group import group_trainers
from monosemy.training.readback import StepMetrics
from monosemy.training.shards import reshard, shard_name
from monosemy.training.trainer import SAESpec, SAETrainer

Record = dict[str, Any]


def grid(config: TrainConfig, init_from: SAE | None = None, **family: bool) -> list[SAESpec]:
    """Every architecture at every sparsity, width, learning rate and seed of a configuration, in
    dictionary_learning's order."""
    specs = []
    beside: dict[str, Any] = dict(family)
    if family.get("transcode"):
        beside["skip_connection"] = config.skip_connection
    if family.get("crosscode"):
        beside |= {"mask": config.crosscoder_mask, "dedicated_share": config.dedicated_share}
    for seed, width, lr in itertools.product(
        config.random_seeds, config.dictionary_widths, config.learning_rates or (None,)
    ):
        for name in config.architectures:
            kind = architecture(name)
            flags = SAEConfig.__dataclass_fields__.keys() & kind.Settings.__dataclass_fields__.keys()
            settings = {name: getattr(config, name) for name in sorted(flags)}
            specs += [
                SAESpec(name, width, lr, seed, settings | {kind.sparsity_setting: value}, init_from, **beside)
                for value in kind.sweep_of(config)
            ]
    return specs


class Sweep:
    """SAEs in training by site, on batches that all SAEs of a site share.

    Several ranks train SAEs of their own, of which `names` are all; records and failures go to every rank.
    """

    def __init__(
        self,
        trainers: Mapping[Any, Sequence[SAETrainer]],
        ranks: Ranks = ALONE,
        names: Sequence[str] | None = None,
    ) -> None:
        self.trainers, self.ranks = trainers, ranks
        self.all_trainers = [trainer for of_site in trainers.values() for trainer in of_site]
        self.groups = group_trainers(self.all_trainers)
        self.failed: dict[str, str] = {}
        """By SAE, why it was stopped."""
        self.done = 0  # steps
        self._site_of = {trainer.name: site for site, of_site in trainers.items() for trainer in of_site}
        self._group_of = {name: group for group in self.groups for name in group.index}
        self._pending: list[tuple[int, int, str, StepMetrics]] = []
        self._records: list[Record] = []  # read, and not told yet
        self._on_record: Callable[[Record], None] = lambda record: None
        self._order = {name: i for i, name in enumerate(self._site_of if names is None else names)}

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
        """Train from step `start` to `steps`, and record each SAE every `log_steps` steps and after the last.

        Records only look. On a GPU a record's metrics are read when the next one has been sent, so that no
        step waits for them. An SAE whose loss or gradient is not finite keeps the weights that it had and is
        named in `failed` once its metrics are read; the others go on. Training ends where none is left.
        `done` counts the steps made.
        """
        self._on_record, self.done = on_record, start
        try:
            for step in range(start, steps):
                if len(self.failed) == len(self._order):
                    break
                before_step(step)
                of_site = batches()
                for group in self.groups:
                    group.step({name: of_site[self._site_of[name]] for name in group.index}, step)
                self.done = step + 1
                if step % log_steps == 0 or step == steps - 1:
                    self.flush_metrics()
                    self._send_metrics(of_site, step)
                    if not any(group.graphs for group in self.groups):
                        self.flush_metrics()
        except BaseException as error:
            if self.ranks.size == 1 or isinstance(error, EndOfData):  # other ranks may not come here
                self.flush_metrics()
            raise
        self.flush_metrics()

    def _send_metrics(self, batches: Mapping[Any, Tensor], step: int) -> None:
        """Start copying each SAE's metrics of this step to the host."""
        for site, x_BD in batches.items():
            for trainer in self.trainers[site]:
                metrics = trainer.read_metrics(x_BD, self._group_of[trainer.name].last[trainer.name])
                self._pending.append((step, len(x_BD), trainer.name, metrics))

    def flush_metrics(self) -> None:
        """Read the metrics that are being copied, and record them, those of all ranks in the SAEs' order."""
        while self._pending:
            step, batch, name, metrics = self._pending.pop(0)
            values, why = metrics.read()
            if why:
                self.failed.setdefault(name, why)
            elif self._trainer(name).leads:
                self._records.append({"step": step, "tokens": (step + 1) * batch, "sae": name} | values)
        told, self._records = self._records, []
        of_ranks = self.ranks.gather((told, self.failed))
        self.failed |= {name: why for _, failed in of_ranks for name, why in failed.items()}
        records = [record for of_rank, _ in of_ranks for record in of_rank]
        for record in sorted(records, key=lambda record: (record["step"], self._order[record["sae"]])):
            self._on_record(record)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return by SAE everything that its next step depends on; of a sharded one this rank's, by
        `shard_name`."""
        return {
            _saved_name(self._trainer(name)): self._group_of[name].state_dict(name) for name in self._site_of
        }

    def _trainer(self, name: str) -> SAETrainer:
        group = self._group_of[name]
        return group.trainers[group.index[name]]

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds beside the tensors, as JSON can: why SAEs were stopped, and each
        one's peak learning rate, schedule and number of shards."""
        own = [
            (t.name, t.lr, dataclasses.asdict(t.schedule), t.shards.size if t.shards else 1)
            for t in self.all_trainers
        ]
        of_ranks = itertools.chain.from_iterable(self.ranks.gather(own))
        of_all = sorted(of_ranks, key=lambda told: self._order[told[0]])
        return {
            "failed": self.failed,
            "lr": {name: lr for name, lr, *_ in of_all},
            "schedule": {name: schedule for name, _, schedule, _ in of_all},
            "latent_shards": {name: shards for name, *_, shards in of_all},
        }

    def load_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of an equal sweep, with the learning rates and schedules that it began
        with: the defaults of another version may be others.

        Raises ValueError for one that does not say them, but where the recipe's have never changed.
        """
        state = checkpoint.state
        self.failed = dict(state["failed"])
        for trainer in self.all_trainers:
            if "lr" in state:
                trainer.lr = state["lr"][trainer.name]
                trainer.schedule = Schedule(**state["schedule"][trainer.name])
            elif trainer.recipe.scaled_schedules or trainer.recipe.scaled_learning_rate:
                raise invalid(
                    "checkpoint",
                    str(checkpoint.folder),
                    "one of this version: the one that wrote it had other default rates and schedules",
                    "go on with that version (versions, in run.json), or train in another folder",
                )
        for name, group in self._group_of.items():
            saved = state.get("latent_shards", {}).get(name, 1)
            group.load_state_dict(name, _state(checkpoint, self._trainer(name), saved))


def _saved_name(trainer: SAETrainer) -> str:
    """Return the name of what a checkpoint holds of an SAE, or of this rank's shard of it."""
    shards = trainer.shards
    return trainer.name if shards is None else shard_name(trainer.name, shards.rank, shards.size)


def _state(checkpoint: Checkpoint, trainer: SAETrainer, saved: int) -> Mapping[str, Tensor]:
    """Return what a trainer goes on from, of an SAE that so many shards saved."""
    shards = trainer.shards
    if saved == 1 and shards is None:
        return checkpoint.tensors(trainer.name)
    names = [shard_name(trainer.name, rank, saved) for rank in range(saved)] if saved > 1 else [trainer.name]
    of_latents = trainer.spec.latent_tensors(trainer.sae.widths)
    rank, size = (0, 1) if shards is None else (shards.rank, shards.size)
    return reshard([checkpoint.opened(name) for name in names], rank, size, of_latents)
