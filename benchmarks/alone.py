"""One SAE trained by itself, for benchmarks and tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from monosemy.training.group import TrainerGroup
from monosemy.training.readback import StepMetrics
from monosemy.training.trainer import SAETrainer


class LoneTrainer(SAETrainer):
    """A trainer in a group of its own. `last` holds the metrics of its last step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = TrainerGroup([self])

    @property
    def last(self) -> dict[str, Tensor]:
        return self.group.last[self.name]

    def step(self, x_BD: Tensor, step: int) -> None:
        """Take one optimizer step on a batch of scaled activations [B, D]."""
        self.group.step({self.name: x_BD}, step)

    def record(self, x_BD: Tensor) -> StepMetrics:
        """Read the last step's metrics as logging does."""
        return self.read_metrics(x_BD, self.last)

    def save(self) -> dict[str, Tensor]:
        """Return everything that the next step depends on."""
        return self.group.state_dict(self.name)

    def resume(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `save` returned."""
        self.group.load_state_dict(self.name, state)
