"""The reconstruction's error with its gradient, and what a step counts.

B tokens, D d_in, F latents.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from monosemy.ops.backends import backend_for
from monosemy.ops.reference import Counters, StepOutcome


class _SquaredError(Function):
    @staticmethod
    def forward(ctx: Any, x_BD: Tensor, x_hat_BD: Tensor) -> tuple[Tensor, Tensor]:
        error_BD, mse = backend_for(x_hat_BD).squared_error(x_BD, x_hat_BD)
        ctx.save_for_backward(error_BD)
        ctx.mark_non_differentiable(error_BD)
        ctx.set_materialize_grads(False)  # of zeros for the error
        return mse, error_BD

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: None) -> tuple[Tensor | None, Tensor | None]:
        (error_BD,) = ctx.saved_tensors
        d_x_hat_BD = None if g is None else error_BD * (-2 * (g / len(error_BD)))
        return -d_x_hat_BD if ctx.needs_input_grad[0] and d_x_hat_BD is not None else None, d_x_hat_BD


def squared_error(x_BD: Tensor, x_hat_BD: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean over tokens of ||x - x_hat||^2, and x - x_hat itself, [B, D], held fixed."""
    return _SquaredError.apply(x_BD, x_hat_BD)


def firing(
    fired_F: Tensor, since_fired_F: Tensor, tokens: int, dead_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tokens since each latent fired, [F], after a batch in which some did; which are dead by
    that, [F], and how many."""
    return backend_for(fired_F).firing(fired_F, since_fired_F, tokens, dead_tokens)


def mean_of_finite(values_B: Tensor) -> Tensor:
    """Return the mean of what is below infinity; NaN where nothing is."""
    return backend_for(values_B).mean_of_finite(values_B)


def follow_threshold(
    threshold: Tensor, values: Tensor, smallest_kept: Tensor, weight: float, *, mean: bool
) -> None:
    """Move a running threshold towards the smallest value that a batch kept, in place.

    `values` counts how many it has followed; with `mean` it is their plain mean at first.
    """
    backend_for(threshold).follow_threshold(threshold, values, smallest_kept, weight, mean=mean)


def count_step(counters: Counters, step: StepOutcome) -> None:
    """Count a step in place: what fired where it was updated, otherwise why it was not."""
    backend_for(step.updated).count_step(counters, step)
