"""Learning rate, sparsity warm-up and the rest of what changes over a run, as pure functions of the step.

dictionary_learning fixes its warm-ups in steps and its dead-latent limit in tokens, for runs of 244,140
steps. In a run of 300 steps they would never end. Here each is the smaller of its number and a share of the
run, so that short runs go through the same phases and a run of its length has exactly its numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from monosemy.errors import invalid
from monosemy.recipe import MONOSEMY, REFERENCE_TOKENS, Recipe

REFERENCE = {
    "warmup_steps": 1000,
    "sparsity_warmup_steps": 5000,
    "threshold_start_step": 1000,
    "anneal_start": 10_000,
}
SHARE = {"warmup_steps": 0.1, "sparsity_warmup_steps": 0.2, "threshold_start_step": 0.5, "anneal_start": 0.2}
DEAD_TOKENS = 10_000_000
THRESHOLD_BETA = 0.999


@dataclass(frozen=True)
class Schedule:
    """When things happen in a run of `steps` steps.

    All counts are optimizer steps but `batch` and `dead_tokens`, which are tokens.
    """

    steps: int
    batch: int
    warmup_steps: int
    decay_start: int
    sparsity_warmup_steps: int
    threshold_start_step: int
    threshold_beta: float
    anneal_start: int
    dead_tokens: int

    @classmethod
    def of_run(
        cls,
        steps: int,
        batch: int,
        *,
        recipe: Recipe = MONOSEMY,
        decay_start_fraction: float = 0.8,
        **fixed: Any,
    ) -> Schedule:
        """Return the schedule of a run of `steps` steps of `batch` tokens; what is given in `fixed` (and not
        None) stands as it is.

        Raises ValueError where a phase would not end before the decay begins.
        """

        def steps_of(name: str) -> int:
            if fixed.get(name) is not None:
                return int(fixed[name])
            return (
                min(REFERENCE[name], int(SHARE[name] * steps)) if recipe.scaled_schedules else REFERENCE[name]
            )

        beta, dead, start = (
            fixed.get("threshold_beta"),
            fixed.get("dead_feature_threshold"),
            steps_of("threshold_start_step"),
        )
        if dead is None:
            dead = (
                min(DEAD_TOKENS, max(batch, DEAD_TOKENS * steps * batch // REFERENCE_TOKENS))
                if recipe.scaled_schedules
                else DEAD_TOKENS
            )
        schedule = cls(
            steps=steps,
            batch=batch,
            warmup_steps=steps_of("warmup_steps"),
            decay_start=int(decay_start_fraction * steps),
            sparsity_warmup_steps=steps_of("sparsity_warmup_steps"),
            threshold_start_step=min(start, steps - 2) if recipe.threshold_always_set else start,
            threshold_beta=THRESHOLD_BETA if beta is None else float(beta),
            anneal_start=steps_of("anneal_start"),
            dead_tokens=int(dead),
        )
        for name in ("warmup_steps", "sparsity_warmup_steps"):
            value = getattr(schedule, name)
            if value < 0 or (value and value >= schedule.decay_start):
                raise invalid(
                    name,
                    value,
                    f"0 to {max(schedule.decay_start - 1, 0)}, below the decay's start in a run of {steps} "
                    "steps",
                    "train for more tokens, shorten the warm-up, or leave it out to have it scale with the "
                    "run",
                )
        return schedule

    def lr(self, step: int) -> float:
        """Return the factor on the learning rate: linear from 0 over the warm-up, 1, then linear to 0 from
        `decay_start` on."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        if step >= self.decay_start:
            return (self.steps - step) / (self.steps - self.decay_start)
        return 1.0

    def sparsity(self, step: int) -> float:
        """Return the factor on a sparsity penalty: linear from 0 to 1 over `sparsity_warmup_steps`."""
        return min(step / self.sparsity_warmup_steps, 1.0) if self.sparsity_warmup_steps else 1.0
