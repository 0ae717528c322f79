"""What the host reads of a step, long after it was launched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

OnNonfinite = Literal["stop", "skip"]


class AsyncScalars:
    """Scalars being copied to the host asynchronously.

    `read` blocks until the copy is done; callers read about 100 steps later, so it rarely does.
    """

    def __init__(self, values: Tensor) -> None:
        self._values, self._copied = values, None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values = host.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> list[float]:
        """Return the scalars as numbers."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()


class NonfiniteState(NamedTuple):
    """Counts of an SAE's updates that were not made; entries of its tensor `nonfinite` [4]."""

    skipped: Any
    """Steps skipped because the loss or a gradient was not finite."""
    first_step: Any
    """The first of them; -1: none yet."""
    batch_was_finite: Any
    """Whether all skipped batches were finite (1) or not (0)."""
    overflowed: Any
    """Steps skipped because a list of fixed length was full."""


@dataclass(frozen=True)
class StepMetrics:
    """An SAE's metrics of one step, on their way to the host."""

    on_nonfinite: OnNonfinite
    names: tuple[str, ...]
    scalars: AsyncScalars

    def read(self) -> tuple[dict[str, float], str]:
        """Return the metrics, and why the SAE was stopped; "" where it was not."""
        values = self.scalars.read()
        state = NonfiniteState(*values[len(self.names) :])
        metrics = dict(zip(self.names, values, strict=False)) | {"skipped": state.skipped + state.overflowed}
        if state.skipped == 0 or self.on_nonfinite == "skip":
            return metrics, ""
        batch = "was finite" if state.batch_was_finite else "was not finite either"
        return (
            metrics,
            f"its loss or gradient was not finite at step {state.first_step:.0f}, with a batch that {batch}",
        )
