"""The grid of SAEs and the one loop that trains it, on activations of a language model or of anywhere.

B tokens, D d_in.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from monosemy.config import TrainConfig, invalid
from monosemy.recipe import MONOSEMY, Recipe
from monosemy.sae import SAE, architecture
from monosemy.schedule import Schedule
from monosemy.training import Member, SAESpec

Record = dict[str, Any]


def grid(config: TrainConfig, init_from: SAE | None = None) -> list[SAESpec]:
    """Every architecture at every sparsity, width, learning rate and seed of a configuration, in the seed's order."""
    specs = []
    for seed, width, lr in itertools.product(config.random_seeds, config.dictionary_widths, config.learning_rates or (None,)):
        for name in config.architectures:
            kind = architecture(name)
            offered = {n: getattr(config, n) for n in ("auxk_alpha", "bandwidth", "sparsity_penalty", "group_fractions")}
            settings = {n: v for n, v in offered.items() if n in kind.Settings.__dataclass_fields__}
            specs += [SAESpec(name, width, lr, seed, settings | {kind.sparsity: value}, init_from) for value in config.sparsities(name)]
    return specs


@dataclass
class Sweep:
    """SAEs in training, by site, on batches that all SAEs of a site share."""

    members: dict[Any, list[Member]]
    failed: dict[str, str] = field(default_factory=dict)  # member -> why it was stopped

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
        """Train for `steps` steps. A record of each SAE is made every `log_steps` steps and after the last; records only look.

        An SAE whose loss is not finite is stopped and named in `failed`; the others go on.
        """
        for step in range(start, steps):
            before_step(step)
            for site, x_BD in batches().items():
                for member in self.members[site]:
                    if member.name in self.failed:
                        continue
                    member.step(x_BD, step)
                    if step % log_steps == 0 or step == steps - 1:
                        record = member.record(x_BD)
                        if not math.isfinite(record["loss"]):
                            self.failed[member.name] = f"its loss was {record['loss']} at step {step}"
                            continue
                        on_record({"step": step, "tokens": (step + 1) * len(x_BD), "sae": member.name} | record)


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
    **schedule: Any,
) -> Fitted:
    """Train SAEs on any iterable of activations [B, D], all on the same batches, without a language model.

    `steps` defaults to the number of batches, where they have one; `schedule` takes what `Schedule.of_run` does. With `normalize`
    the first batches (up to 100, which are then trained on) measure sqrt(E ||x||^2), which activations are divided by and which is
    folded into the SAEs' weights at the end.
    Raises ValueError where the number of steps is not known, or batches are empty, not matrices of one width, or not finite.
    """
    if steps is None:
        if not hasattr(batches, "__len__"):
            raise invalid("steps", None, "a number of steps where the batches do not have a length", "pass steps=")
        steps = len(batches)  # type: ignore[arg-type]
    source = iter(batches)
    first = [_checked(x) for x in itertools.islice(source, min(100, steps))]
    if not first:
        raise invalid("batches", "empty", "at least one batch [B, D]", "pass activations")
    factor = math.sqrt(sum(float(x.double().pow(2).sum()) for x in first) / sum(len(x) for x in first)) if normalize else 1.0
    factor = factor or 1.0
    plan = Schedule.of_run(steps, len(first[0]), recipe=recipe, **schedule)
    members = [
        Member(f"{i}", spec, first[0].shape[1], plan, device=device, recipe=recipe, bf16=bf16, norm_factor=factor)
        for i, spec in enumerate(saes)
    ]
    stream = itertools.chain(first, (_checked(x) for x in source))
    metrics: list[Record] = []
    sweep, status = Sweep({"": members}), "complete"
    try:
        sweep.run(lambda: {"": next(stream).to(device, torch.float32) / factor}, steps, log_steps=log_steps, on_record=metrics.append)
    except StopIteration:
        status = "stopped_early"
    failed = {int(name): why for name, why in sweep.failed.items()}
    return Fitted([member.finished() for member in members], metrics, factor, "failed" if failed else status, failed)


def _checked(x: Tensor) -> Tensor:
    if not isinstance(x, Tensor) or x.ndim != 2 or not len(x):
        raise invalid("batches", getattr(x, "shape", type(x).__name__), "tensors [B, D]", "flatten leading dimensions first")
    if not x.isfinite().all():
        raise invalid("batches", "not finite", "finite activations", "find where infinities come from, or drop those rows")
    return x
